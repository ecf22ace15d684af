"""Every kind of finding: how it comes about, and what the user is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from qlora_api.exchange import DataSource, Inspection
from qlora_api.findings import FINDINGS, FindingCode
from qlora_trainer import duplicates, inspection
from qlora_trainer.failures import BadInput
from qlora_trainer.formats import Example
from qlora_trainer.inspection import inspect
from qlora_trainer.sequences import Tokenisation

from .conftest import TEMPLATE, THINGS, Place, chat, examples, write_jsonl


def train(place: Place, rows: list[Any], name: str = "train.jsonl") -> None:
    write_jsonl(place.claims / "data" / name, rows)


def template(place: Place, text: str) -> None:
    (place.claims / "base" / "model" / "chat_template.jinja").write_text(text)


def vocabulary(place: Place, change: Callable[[dict[str, Any]], object]) -> None:
    path = place.claims / "base" / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def found(place: Place, **changes: Any) -> dict[FindingCode, tuple[int, str | None]]:
    seen = inspect(place.inspect_order(**changes), place.pod)
    assert all(finding.severity == "warns" for finding in seen.findings)
    return {finding.code: (finding.count, finding.example) for finding in seen.findings}


MARKS = ("{% generation %}", "{% endgeneration %}")
REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)
SYSTEM = {"messages": [{"role": "system", "content": "Be short."}, *chat("A carp?", "fish")["messages"]]}

FAILING: dict[FindingCode, tuple[Callable[[Place], object], dict[str, Any], str]] = {
    FindingCode.BROKEN_ROW: (
        lambda place: (place.claims / "data" / "train.jsonl").write_text('{"text": '), {},
        "dataset.train[0] line 1: not JSON: Expecting value",
    ),
    FindingCode.WRONG_SHAPE: (
        lambda place: train(place, [chat("a", "b"), {"text": "a"}]), {},
        "dataset.train[0] line 2: format text, but the format of the source is messages: use one format in a source",
    ),
    FindingCode.WRONG_ROLES: (
        lambda place: train(place, [{"messages": chat("a", "b")["messages"][::-1]}]), {},
        "dataset.train[0] line 1: messages[0]: assistant at the beginning; assistant stands after user or after tool",
    ),
    FindingCode.EMPTY_TEXT: (
        lambda place: train(place, [chat("a", " ")]), {},
        "dataset.train[0] line 1: messages[1]: content of assistant is empty",
    ),
    FindingCode.TEMPLATE_MISSING: (
        lambda place: (place.claims / "base" / "model" / "chat_template.jinja").unlink(), {},
        "messages need a chat template and the model's tokenizer has none: use an instruction-tuned model",
    ),
    FindingCode.TEMPLATE_REFUSES: (
        lambda place: (template(place, REFUSES_SYSTEM + TEMPLATE), train(place, [*examples(), SYSTEM])), {},
        "dataset.train[0] line 49: the model's chat template refuses it: no system",
    ),
    FindingCode.STOP_NOT_TRAINED: (
        lambda place: template(
            place, TEMPLATE.replace("+ '<|end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|end|>' }}")
        ), {},
        "the assistant's end-of-turn token carries no loss, so the model would never learn to stop",
    ),
    FindingCode.NOTHING_TO_LEARN: (
        lambda place: None, {"max_length": 5}, "no token of 48 examples carries loss (assistant) within 5 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("code", FAILING)
def test_what_fails_is_named_with_its_place_and_its_cure(place: Place, code: FindingCode) -> None:
    spoil, changes, told = FAILING[code]
    spoil(place)
    with pytest.raises(BadInput) as raised:
        inspect(place.inspect_order(**changes), place.pod)
    assert told in str(raised.value)


def near_and_equal(place: Place) -> None:
    """Line 49 is a duplicate; 50 and 51 are 40 words that differ in one, 52 asks as the first golden example does."""
    long = " ".join(f"word{n}" for n in range(40))
    train(place, [*examples(), examples()[0], chat(f"{long} a", "b"), chat(f"{long} c", "b"),
                  chat(f"and a  {THINGS[0]}, what is that?", "bird")])  # fmt: skip
    write_jsonl(place.claims / "data" / "held.jsonl", [chat(f"{long} d", "b"), chat("never seen, and no more", "x")])


HELD = {"eval": DataSource(uri="pvc://data/held.jsonl")}
WARNING: dict[FindingCode, tuple[Callable[[Place], object], dict[str, Any], tuple[int, str | None]]] = {
    FindingCode.LEAKED: (near_and_equal, {}, (1, "evaluation.golden line 1")),
    FindingCode.NEARLY_LEAKED: (near_and_equal, HELD, (1, "eval line 1")),
    FindingCode.NEAR_DUPLICATES: (near_and_equal, {}, (1, "train[0] line 51")),
    FindingCode.DUPLICATES: (near_and_equal, {}, (1, "train[0] line 49")),
    FindingCode.NOT_COMPARED: (lambda place: train(place, examples()), {}, (8, "train[0] line 41")),
    FindingCode.FEW_EVAL_EXAMPLES: (near_and_equal, HELD, (2, None)),
    FindingCode.NO_STOP_TOKEN: (
        lambda place: template(place, TEMPLATE.replace("<|end|>", "###").replace(MARKS[0], "").replace(MARKS[1], "")),
        {}, (48, "train[0] line 1"),
    ),
    FindingCode.TEMPLATE_ROUND_TRIP: (
        lambda place: template(place, TEMPLATE.replace("{{ m['content'] + '<|end|>\n' }}", "{{ m['content'][:2] }}")),
        {}, (48, "train[0] line 1"),
    ),
    FindingCode.TRUNCATED: (
        lambda place: train(place, [chat(f"{n}?", "bird") for n in range(400)] + [chat("sparrow " * 30, "bird " * 50)]),
        {}, (1, "train[0] line 401: 141 tokens"),
    ),
    FindingCode.LEFT_OUT: (
        lambda place: train(place, [chat(f"{n}?", "bird") for n in range(400)] + [chat("sparrow " * 60, "bird")]),
        {}, (1, None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("code", WARNING)
def test_what_warns_is_counted_and_the_first_is_named(
    place: Place, code: FindingCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, data, expected = WARNING[code]
    spoil(place)
    if code is FindingCode.NOT_COMPARED:
        monkeypatch.setattr(duplicates, "COMPARED_MAX", 40)
    loss = {"loss": "completion"} if code is FindingCode.NO_STOP_TOKEN else {}
    assert found(place, data=place.data(**data), **loss)[code] == expected


def test_every_kind_of_finding_has_its_case() -> None:
    assert FAILING.keys() == {code for code, kind in FINDINGS.items() if kind.severity == "fails"}
    assert WARNING.keys() == {code for code, kind in FINDINGS.items() if kind.severity == "warns"}


def test_nothing_is_found_in_good_data(place: Place) -> None:
    rows = [chat(f"What is the name of number {n}, of {n + 7} and {n * 13}?", f"number {n}") for n in range(900)]
    train(place, rows)
    assert found(place, data=place.data(eval_fraction=0.5)) == {}


def test_a_tokenizer_that_loses_characters_does_not_round_trip(place: Place) -> None:
    def lossy(content: dict[str, Any]) -> None:
        content["normalizer"] = {"type": "Replace", "pattern": {"String": "sparrow"}, "content": "bird"}

    vocabulary(place, lossy)
    assert found(place)[FindingCode.TEMPLATE_ROUND_TRIP] == (4, "train[0] line 1")


def test_a_model_that_is_asked_otherwise_than_it_learns_does_not_round_trip(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    template(place, TEMPLATE.replace("'<|start|>assistant\n' }}{% endif", "'<|start|>bot\n' }}{% endif"))
    assert found(place)[FindingCode.TEMPLATE_ROUND_TRIP] == (48, "train[0] line 1")
    assert "dataset.train[0] line 1: the model is asked with another beginning than it learns" in caplog.text


def test_of_many_examples_some_from_everywhere_are_tried_and_the_finding_says_how_many(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "ROUND_TRIPS", 5)
    broken: list[str] = []

    def faulty(_: Tokenisation, example: Example) -> str:
        broken.append(example.content["messages"][0]["content"])
        return "a fault"

    monkeypatch.setattr(Tokenisation, "round_trip", faulty)
    count, where = found(place)[FindingCode.TEMPLATE_ROUND_TRIP]
    assert count == 5
    asked = [row["messages"][0]["content"] for row in examples()]
    lines = [asked.index(text) + 1 for text in broken]
    assert where == f"train[0] line {lines[0]}; 5 of 48 were tried"
    assert lines[-1] > 24, "not only the first ones"

    first = sorted(broken)
    broken.clear()
    train(place, examples()[::-1])
    found(place)
    assert sorted(broken) == first, "which are tried follows from the examples, not from their order"


def test_held_out_chats_are_tried_with_the_template_before_a_gpu_is_taken(place: Place) -> None:
    template(place, REFUSES_SYSTEM + TEMPLATE)
    write_jsonl(place.claims / "data" / "golden.jsonl", [SYSTEM])
    with pytest.raises(BadInput, match=r"evaluation\.golden line 1: the model's chat template refuses it: no system"):
        inspect(place.inspect_order(), place.pod)


def test_golden_texts_are_refused(place: Place) -> None:
    write_jsonl(place.claims / "data" / "golden.jsonl", [{"text": "once"}])
    with pytest.raises(BadInput, match=r"evaluation\.golden line 1: a text asks for no answer"):
        inspect(place.inspect_order(), place.pod)


INSTRUCTIONS = [{"instruction": f"Name the kind of a {thing}.", "output": "animal"} for thing in THINGS]
PROMPTS = [{"prompt": f"A {thing} is a ", "completion": "thing"} for thing in THINGS]
TEXTS = [{"text": f"Once there was a {thing}."} for thing in THINGS]


@pytest.mark.parametrize(
    ("sources", "loss"),
    [
        ([INSTRUCTIONS], "completion"),
        ([TEXTS], "all"),
        ([PROMPTS, TEXTS], "completion"),
        ([examples(), TEXTS, PROMPTS, INSTRUCTIONS], "assistant"),
    ],
)
def test_sources_of_several_formats_go_together(place: Place, sources: list[list[Any]], loss: str) -> None:
    for number, rows in enumerate(sources):
        train(place, rows, f"{number}.jsonl")
    data = place.data(train=[DataSource(uri=f"pvc://data/{number}.jsonl") for number in range(len(sources))])
    seen = inspect(place.inspect_order(data), place.pod)
    assert seen.loss == loss
    assert seen.examples == sum(map(len, sources))


@pytest.mark.parametrize(
    ("rows", "loss", "told"),
    [
        (TEXTS, "completion", "completion is for questions with answers; of a text, all is learned"),
        (PROMPTS, "assistant", "assistant is for messages; for prompts and completions use completion"),
    ],
)
def test_a_loss_that_the_format_has_no_words_for_is_refused(
    place: Place, rows: list[Any], loss: Any, told: str
) -> None:
    train(place, rows)
    with pytest.raises(BadInput, match=told):
        inspect(place.inspect_order(loss=loss), place.pod)


def test_instructions_need_no_chat_template(place: Place) -> None:
    train(place, INSTRUCTIONS)
    with_template = inspect(place.inspect_order(place.data(golden=None)), place.pod)
    (place.claims / "base" / "model" / "chat_template.jinja").unlink()
    seen: Inspection = inspect(place.inspect_order(place.data(golden=None)), place.pod)
    assert seen.loss == "completion"
    assert seen.tokens.p50 > with_template.tokens.p50, "Alpaca's own prompt is longer"
