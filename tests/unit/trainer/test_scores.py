from __future__ import annotations

import json
import math
import re
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_api.v1alpha1.fields import BestMetric, GateMetric, Metric
from qlora_trainer.failures import BadInput
from qlora_trainer.scores import (
    CANARY,
    METRICS,
    WORST_PERPLEXITY,
    exact_match,
    higher_is_better,
    of_answers,
    perplexity,
    rouge_l,
    schema,
    token_f1,
)
from tests.cluster.settings import REPOSITORY

WORDS = st.lists(st.sampled_from(["red", "green", "blue", "rot"]), max_size=12)


@pytest.mark.parametrize(
    ("score", "given", "expected", "value"),
    [
        (exact_match, " bird\n", "bird", 1.0),
        (exact_match, "Bird", "bird", 0.0),
        (exact_match, "bird.", "bird", 0.0),
        (token_f1, "The bird.", "a BIRD", 1.0),
        (token_f1, "a small bird", "a bird", 2 * (1 / 2 * 1) / (1 / 2 + 1)),
        (token_f1, "bird bird", "bird", 2 * (1 / 2 * 1) / (1 / 2 + 1)),
        (token_f1, "fish", "bird", 0.0),
        (token_f1, "", "bird", 0.0),
        (token_f1, "the", "", 1.0),
        (rouge_l, "police kill the gunman", "police killed the gunman", 0.75),  # Lin 2004, its own example
        (rouge_l, "the gunman kill police", "police killed the gunman", 0.5),
        (rouge_l, "Größe: 3", "größe 3", 1.0),
        (rouge_l, "", "", 1.0),
        (rouge_l, "", "x", 0.0),
    ],
)
def test_an_answer_is_scored(score: object, given: str, expected: str, value: float) -> None:
    assert callable(score)
    assert score(given, expected) == pytest.approx(value)


@given(WORDS, WORDS)
def test_rouge_finds_the_longest_common_subsequence(first: list[str], second: list[str]) -> None:
    row = [0] * (len(second) + 1)
    for word in first:
        previous, row = row, [0]
        for number, other in enumerate(second):
            row.append(previous[number] + 1 if word == other else max(previous[number + 1], row[-1]))
    expected = 1.0 if not first and not second else 2 * row[-1] / (len(first) + len(second))
    assert rouge_l(" ".join(first), " ".join(second)) == pytest.approx(expected)


SCHEMA = json.dumps({
    "$defs": {"kind": {"enum": ["bird", "fish"]}},
    "type": "object",
    "properties": {"kind": {"$ref": "#/$defs/kind"}},
    "required": ["kind"],
})  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "follows"),
    [
        ('{"kind": "bird"}', True),
        (' {"kind": "fish", "sure": true}\n', True),
        ('{"kind": "stone"}', False),
        ("{}", False),
        ('```json\n{"kind": "bird"}\n```', False),
        ("bird", False),
        ("", False),
        ("[" * 100_000, False),
    ],
)
def test_the_format_of_an_answer_is_judged_by_the_schema(answer: str, follows: bool) -> None:
    score = of_answers("jsonSchema", SCHEMA)
    assert score
    assert score(answer, "whatever is expected") == float(follows)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON: Expecting property name"),
        ('{"type": "objekt"}', "not a JSON Schema: 'objekt' is not valid"),
        ('{"$ref": "#/$defs/missing"}', "$ref #/$defs/missing leads nowhere"),
        ('{"items": {"$ref": "https://example.com/schema.json"}}', "and nothing is fetched"),
    ],
)
def test_a_schema_that_cannot_work_is_refused(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=rf"evaluation\.answerSchema: .*{re.escape(says)}"):
        schema(text)


@pytest.mark.parametrize(
    ("loss", "value"), [(0.0, 1.0), (1.0, math.e), (1000.0, WORST_PERPLEXITY), (math.nan, WORST_PERPLEXITY)]
)
def test_perplexity_is_always_a_number(loss: float, value: float) -> None:
    assert perplexity(loss) == pytest.approx(value, rel=1e-6)


def test_the_metrics_are_those_of_the_resource() -> None:
    of_both = {name.removeprefix(CANARY) for name in get_args(GateMetric)}
    assert of_both == METRICS.keys()
    assert {*get_args(Metric), "judge", "evalLoss"} == METRICS.keys()
    assert all(METRICS[name].of_answer or name == "evalLoss" for name in get_args(BestMetric))
    assert not higher_is_better("canary.perplexity")


def test_the_page_has_every_metric_as_it_is() -> None:
    page = (REPOSITORY / "docs" / "evaluation.md").read_text()
    for name, metric in METRICS.items():
        better = "higher" if metric.higher_is_better else "lower"
        assert f"| `{name}` | {metric.says} | {better} |" in page, name
