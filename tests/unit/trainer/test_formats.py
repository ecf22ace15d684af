"""What people write, in every kind of file, becomes the same examples; what cannot is named with its place."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example as tried
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from qlora_api.exchange import DataSource
from qlora_api.findings import FindingCode
from qlora_trainer import formats
from qlora_trainer.data import read_corpus, read_file
from qlora_trainer.failures import BadInput
from qlora_trainer.formats import DATA_SUFFIXES, Example, Mistake, parse_row, rows_of

from .conftest import Place, chat, write_jsonl

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is a carp?"},
    {"role": "assistant", "content": "fish"},
]


@pytest.mark.parametrize(
    ("row", "kind", "content"),
    [
        ({"messages": CHAT}, "messages", {"messages": CHAT}),
        ({"prompt": "a", "completion": "b"}, "prompt-completion", {"prompt": "a", "completion": "b"}),
        ({"text": "once"}, "text", {"text": "once"}),
        ({"instruction": "i", "input": "", "output": "o"}, "instruction", {"instruction": "i", "output": "o"}),
        (
            {"instruction": "i", "input": "n", "output": "o", "system": "s"},
            "instruction",
            {"instruction": "i", "input": "n", "output": "o", "system": "s"},
        ),
        (
            {"conversations": [{"from": "system", "value": "Be short."}, {"from": "human", "value": "What is a carp?"},
                               {"from": "gpt", "value": "fish"}]},
            "messages", {"messages": CHAT},
        ),
        (
            {"system": "Be short.", "conversations": [{"from": "user", "value": "What is a carp?"},
                                                      {"from": "assistant", "value": "fish"}]},
            "messages", {"messages": CHAT},
        ),
    ],
)  # fmt: skip
def test_each_format_is_recognised(row: dict[str, Any], kind: str, content: dict[str, Any]) -> None:
    assert parse_row(row, None)[0] == Example(kind, content)  # pyright: ignore[reportArgumentType]
    assert parse_row(row, None)[2] == set()


def test_sharegpt_calls_tools() -> None:
    call = json.dumps({"name": "weather", "arguments": {"city": "Bern"}})
    said = [("human", "weather?"), ("function_call", call), ("observation", "sun"), ("gpt", "sunny")]
    row = {"conversations": [{"from": who, "value": text} for who, text in said], "tools": '[{"name": "weather"}]'}
    example, _, _ = parse_row(row, None)
    turns = example.content["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "assistant"]
    assert turns[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Bern"}}
    assert example.content["tools"] == [{"name": "weather"}]


def test_an_instruction_is_a_chat_or_alpaca_s_prompt() -> None:
    example, _, _ = parse_row({"instruction": "Sort.", "input": "b a", "output": "a b"}, None)
    assert example.as_chat().content["messages"] == [
        {"role": "user", "content": "Sort.\n\nb a"},
        {"role": "assistant", "content": "a b"},
    ]
    prompt = example.as_prompt()
    assert prompt.content == {
        "prompt": "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSort.\n\n### Input:\nb a\n\n### Response:\n",
        "completion": "a b",
    }
    assert example.expected == prompt.expected == example.as_chat().expected == "a b"


@pytest.mark.parametrize(
    ("row", "code", "told"),
    [
        ({"conversations": "a"}, FindingCode.WRONG_SHAPE, "conversations is a string, not a list"),
        ({"conversations": [3]}, FindingCode.WRONG_SHAPE, "conversations[0] is a number, not an object"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, FindingCode.WRONG_ROLES, '[0]: from "bot"; those'),
        ({"conversations": [{"from": ["x"], "value": "x"}]}, FindingCode.WRONG_ROLES, 'conversations[0]: from ["x"]'),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, FindingCode.WRONG_ROLES, "[0]: assistant at the"),
        ({"conversations": [{"from": "gpt", "value": 1}]}, FindingCode.WRONG_SHAPE, "value is a number, not a string"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": " "}], "system": "s"},
         FindingCode.EMPTY_TEXT, "conversations[1]: content of assistant is empty"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "f()"}]},
         FindingCode.WRONG_SHAPE, "conversations[1]: the value of a function_call is JSON with name and arguments"),
        ({"instruction": "i", "output": ""}, FindingCode.EMPTY_TEXT, "output is empty"),
        ({"instruction": "i"}, FindingCode.WRONG_SHAPE, "no output; keys are instruction"),
        ({"instruction": "i", "output": "o", "input": 3}, FindingCode.WRONG_SHAPE, "input is a number, not a string"),
        ({"text": " \n"}, FindingCode.EMPTY_TEXT, "text is empty"),
        ({"text": "\ud800"}, FindingCode.BROKEN_ROW, "half a character"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, FindingCode.WRONG_ROLES, 'role ["user"]'),
        ({"messages": CHAT, "tools": "f"}, FindingCode.WRONG_SHAPE, "tools is a string, and not JSON"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_row_is_said(row: dict[str, Any], code: FindingCode, told: str) -> None:
    with pytest.raises(Mistake) as raised:
        parse_row(row, None)
    assert told in str(raised.value)
    assert raised.value.code == code


ROWS = [chat(f"What is {thing}?", "fish") for thing in ("a carp", "ein Döbel 🐟", 'a "pike",\nin two lines')]


def as_list(rows: list[Any]) -> bytes:
    return ("\ufeff[\n" + " ,\n".join(json.dumps(row, ensure_ascii=False, indent=1) for row in rows) + "\n]").encode()


def as_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\r\n" for row in rows).encode()


def as_csv(rows: list[Any]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0].keys())
    writer.writeheader()
    writer.writerows(
        {key: text if isinstance(text, str) else json.dumps(text) for key, text in row.items()} for row in rows
    )
    return out.getvalue().encode("utf-8-sig")


def as_parquet(rows: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl", as_lines), ("a.json", as_list), ("b.json", as_lines), ("a.csv", as_csv), ("a.parquet", as_parquet)],
)
def test_every_kind_of_file_holds_the_same(tmp_path: Path, name: str, write: Callable[[list[Any]], bytes]) -> None:
    (tmp_path / name).write_bytes(write(ROWS))
    assert [example.content for example in read_file(tmp_path / name)] == ROWS


def test_parquet_s_nulls_are_no_keys(tmp_path: Path) -> None:
    """Arrow gives every message every key; Llama's chat template asks whether `tool_calls` is one."""
    turns = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f"}}]},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "sunny"},
    ]
    (tmp_path / "a.parquet").write_bytes(as_parquet([{"messages": turns}]))
    (example,) = read_file(tmp_path / "a.parquet")
    assert example.content["messages"] == turns


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            "a.json",
            b'[{"text": "a"},\n{"text": "b"},\n{"text": }]',
            "line 3: not JSON: Expecting value, in the item that",
        ),
        ("a.json", b'[{"text": "a"}', "line 1: not JSON: the list does not end"),
        ("a.json", b'[{"text": "\xff"}]', "not UTF-8: save the file as UTF-8"),
        ("a.json", b"[\n3]", "line 2: a JSON number, not an object"),
        ("a.json", b"[" * 100_000, "nested too deep"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "line 1: not JSON that can be read"),
        ("a.csv", b"text\na\nb,c\n", "line 3: 2 columns, and the header has 1"),
        ("a.csv", b'text\n"a', "line 3: not CSV: unexpected end of data"),
        ("a.csv", b"text\n\xff\n", "not UTF-8: save the file as UTF-8"),
        ("a.csv", b"prompt,completion\na,\n", "line 2: no completion; keys are prompt"),
        ("a.parquet", b"PAR1 and no more", "row 1: not Parquet that can be read: "),
    ],
)
def test_a_broken_file_is_named_with_its_place(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput) as raised:
        read_file(tmp_path / name)
    assert told in str(raised.value)


FILES = tempfile.TemporaryDirectory()  # one for all that hypothesis tries
ROW = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["messages", "role", "content", "conversations", "from", "value", "instruction", "output", "text"]
            ),
            st.sampled_from(["user", "assistant", "human", "gpt"]) | inner,
        )
    ),
    max_leaves=12,
)


@given(st.lists(ROW, max_size=6), st.integers(1, 40), st.sampled_from([" ", "\n", "\r\n "]))
@tried([{"text": "a" * 100}, 1, None, "x"], 1, "\n")
def test_a_list_is_read_whatever_the_pieces_it_is_read_in(rows: list[Any], chunk: int, between: str) -> None:
    text = "[" + ("," + between).join(json.dumps(row) for row in rows) + between + "]"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "_CHUNK_CHARS", chunk)
        path = Path(FILES.name) / "rows.json"
        path.write_text(text, encoding="utf-8")
        assert [value for _, value in rows_of(path)] == rows


@given(ROW)
def test_whatever_stands_in_a_row_is_an_example_or_a_named_mistake(row: Any) -> None:
    try:
        example, _, _ = parse_row(row, None)
    except Mistake as mistake:
        assert str(mistake)
    else:
        assert len(example.key) == len(example.normalised) == 32
        assert example.words() or example.content.get("messages")


@given(st.binary(max_size=200), st.sampled_from(DATA_SUFFIXES))
@tried(b"\x00", ".csv")
@tried(b'["\\ud800"', ".json")
def test_whatever_bytes_a_file_has_its_rows_can_be_read_or_are_named(content: bytes, suffix: str) -> None:
    path = Path(FILES.name) / f"rows{suffix}"
    path.write_bytes(content)
    for place, row in rows_of(path):
        assert place.split(" ")[0] in ("line", "row")
        assert int(place.split(" ")[1]) > 0
        assert not isinstance(row, Mistake) or str(row)


def test_a_directory_is_read_with_what_lies_below_it(place: Place) -> None:
    folder = place.claims / "data" / "parts"
    write_jsonl(folder / "b.jsonl", ROWS[:1])
    (folder / "train").mkdir()
    (folder / "train" / "a.parquet").write_bytes(as_parquet(ROWS[1:2]))
    (folder / "z.json").write_bytes(as_list(ROWS[2:]))
    (folder / "dataset_info.json").write_text('{"features": {}}')  # no list: it says something about the data
    (folder / ".cache").mkdir()
    write_jsonl(folder / ".cache" / "old.jsonl", [chat("old?", "old")])
    corpus = read_corpus(place.data(train=[DataSource(uri="pvc://data/parts")]), place.pod)
    assert [example.content for example in corpus.train] == [ROWS[0], ROWS[1], ROWS[2]]
    assert [where for where, _ in corpus.train.placed()] == [
        "dataset.train[0] b.jsonl line 1",
        "dataset.train[0] train/a.parquet row 1",
        "dataset.train[0] z.json line 2",
    ]
