from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_api.exchange import DataSource
from qlora_trainer.data import read_corpus, read_file
from qlora_trainer.failures import BadInput
from qlora_trainer.formats import parse_line

from .conftest import Place, chat, examples, write_jsonl


def messages(*turns: tuple[str, object]) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}).encode()


GOOD = messages(("user", "a"), ("assistant", "b"))


@pytest.mark.parametrize(
    ("line", "mistake"),
    [
        (messages(("user", "a"), ("asistant", "b")), 'role "asistant"; roles are system, user, assistant, tool'),
        (b'{"messages": [', "not JSON: Expecting value at column 15; each line is one whole example"),
        (b'{"messages": [{"role": "us', "not JSON: Unterminated string starting at column 24; each line"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        (b"[1, 2]", "a JSON list, not an object"),
        (b"7", "a JSON number, not an object"),
        (
            b'{"story": "a"}',
            "neither messages, prompt and completion, conversations, instruction and output, text; keys",
        ),
        (b'{"prompt": "a"}', "no completion; keys are prompt"),
        (b'{"prompt": "a", "completion": " "}', "completion is empty"),
        (b'{"prompt": "", "completion": "b"}', "prompt is empty"),
        (b'{"prompt": "a", "completion": 3}', "completion is a number, not a string"),
        (b'{"messages": "a"}', "messages is a string, not a list"),
        (b'{"messages": []}', "messages is empty"),
        (b'{"messages": ["a"]}', "messages[0] is a string, not an object"),
        (messages(("user", ""), ("assistant", "b")), "messages[0]: content of user is empty"),
        (messages(("user", ["a"]), ("assistant", "b")), "messages[0]: content is a list, not a string"),
        (messages(("assistant", "b")), "assistant at the beginning; assistant stands after user or after tool"),
        (messages(("user", "a"), ("user", "a"), ("assistant", "b")), "messages[1]: user after user"),
        (messages(("user", "a"), ("system", "s"), ("assistant", "b")), "messages[1]: system after user"),
        (messages(("user", "a"), ("assistant", "b"), ("user", "c")), "the last message is of user"),
        (messages(("user", "a"), ("assistant", None)), "messages[1]: content of assistant is empty"),
    ],
)
def test_a_mistake_is_named_with_its_line(line: bytes, mistake: str, file_of: Callable[[bytes], Path]) -> None:
    with pytest.raises(BadInput) as raised:
        read_file(file_of(b"\n\n" + line + b"\n" + GOOD))
    assert "rows.jsonl line 3: " in str(raised.value)
    assert mistake in str(raised.value)


def test_formats_are_not_mixed_in_a_source(file_of: Callable[[bytes], Path]) -> None:
    with pytest.raises(BadInput, match="line 2: format prompt-completion, but the format of the source is messages"):
        read_file(file_of(GOOD + b'\n{"prompt": "a", "completion": "b"}\n'))


def test_many_mistakes_are_named_up_to_a_few(file_of: Callable[[bytes], Path]) -> None:
    with pytest.raises(BadInput) as raised:
        read_file(file_of(b"{}\n" * 90 + b"{\n" * 10))
    lines = str(raised.value).splitlines()
    assert [line.split(":")[0].rpartition("/")[2] for line in lines[:-1]] == [
        f"rows.jsonl line {n}" for n in range(1, 6)
    ]
    assert lines[-1] == "and 95 more; in all wrongShape 90, brokenRow 10"


@given(st.one_of(st.binary(), st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["messages", "role", "content", "prompt"]), inner),
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_whatever_users_write_is_an_example_or_a_named_mistake(line: bytes) -> None:
    try:
        example, _ = parse_line(line, None)
    except ValueError as error:
        assert str(error)
    else:
        assert example.format == "text" or example.expected.strip() or example.content["messages"][-1]["tool_calls"]


def test_tool_calls_may_stand_without_content() -> None:
    turns = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "sunny"},
    ]
    example, unused = parse_line(json.dumps({"messages": turns, "tools": [{"a": 1}], "id": 4}).encode(), None)
    assert example.content["tools"] == [{"a": 1}]
    assert unused == {"id"}


def test_duplicates_go_and_the_split_follows_the_example_itself(place: Place) -> None:
    write_jsonl(place.claims / "data" / "train.jsonl", examples() * 2)
    whole = read_corpus(place.data(eval_fraction=0.25), place.pod)
    assert whole.duplicates == 48
    assert len(whole.train) + len(whole.eval) == 48
    assert 4 <= len(whole.eval) <= 20
    before = {example.key for example in whole.eval}

    write_jsonl(place.claims / "data" / "train.jsonl", [chat("new", "bird"), *reversed(examples())])
    grown = read_corpus(place.data(eval_fraction=0.25), place.pod)
    after = {example.key for example in grown.eval}
    assert before <= after
    assert len(after - before) <= 1, "old examples changed sides when one was added"
    with pytest.raises(BadInput, match=r"dataset\.train\[0\] line 1: the file was changed while it was read"):
        list(whole.eval)


def test_leakage_is_seen_through_case_and_white_space(place: Place) -> None:
    leaked = [chat("  what IS a sparrow? ", "Bird"), chat("never seen", "bird")]
    write_jsonl(place.claims / "data" / "golden.jsonl", leaked)
    assert read_corpus(place.data(), place.pod).leaked == {"golden": 1}


def test_a_directory_is_read_in_order_and_counts_in_the_digest(place: Place) -> None:
    folder = place.claims / "data" / "parts"
    write_jsonl(folder / "b.jsonl", examples()[20:])
    write_jsonl(folder / "a.jsonl", examples()[:20])
    data = place.data(train=[DataSource(uri="pvc://data/parts")])
    corpus = read_corpus(data, place.pod)
    assert [example.content for example in corpus.train] == examples()
    write_jsonl(folder / "a.jsonl", [*examples()[:20], chat("one more", "fish")])
    assert read_corpus(data, place.pod).digest != corpus.digest


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("pvc://data/trian.jsonl", "pvc://data/trian.jsonl does not exist; there is golden.jsonl, train.jsonl"),
        ("pvc://data", "pvc://data/golden.jsonl"),
        ("pvc://nowhere/a.jsonl", "check the claim's name"),
        ("s3://bucket/a.jsonl", "expected pvc://<claim>/<path>"),
        ("pvc://base/model", "a directory without"),
    ],
)
def test_a_source_that_is_not_there_says_what_is(place: Place, uri: str, told: str) -> None:
    if uri == "pvc://data":  # a directory of JSONL files is a source
        assert len(read_corpus(place.data(train=[DataSource(uri=uri)]), place.pod).train) == 60
        return
    with pytest.raises(BadInput) as raised:
        read_corpus(place.data(train=[DataSource(uri=uri)]), place.pod)
    assert str(raised.value).startswith("dataset.train[0]: ")
    assert told in str(raised.value)


def test_an_empty_source_is_refused(place: Place) -> None:
    (place.claims / "data" / "train.jsonl").write_text("\n\n")
    with pytest.raises(BadInput, match=r"dataset\.train\[0\]: .* has no examples"):
        read_corpus(place.data(), place.pod)
