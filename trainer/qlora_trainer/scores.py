"""What answers and losses are measured by: each metric once, in a table."""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jsonschema import exceptions, validators
from jsonschema_specifications import REGISTRY
from referencing import Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from qlora_trainer.failures import BadInput

CANARY = "canary."
#: What counts for a loss that is not a number: no model that can be used is as bad.
WORST_PERPLEXITY = 1e30


@dataclass(frozen=True)
class Metric:
    """How one metric is meant; `of_answer` scores an answer beside the expected one, from 0 to 1."""

    says: str
    higher_is_better: bool = True
    of_answer: Callable[[str, str], float] | None = None


def exact_match(given: str, expected: str) -> float:
    """1 where both are equal but for white space around them."""
    return float(given.strip() == expected.strip())


def token_f1(given: str, expected: str) -> float:
    """Harmonic mean of the words' precision and recall, as SQuAD counts them (Rajpurkar et al. 2016)."""
    found, wanted = _squad_words(given), _squad_words(expected)
    return _f1(sum((Counter(found) & Counter(wanted)).values()), len(found), len(wanted))


def rouge_l(given: str, expected: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), words as the usual implementation cuts them."""
    found, wanted = (re.findall(r"\w+", text.lower()) for text in (given, expected))
    return _f1(_common_subsequence(found, wanted), len(found), len(wanted))


METRICS: dict[str, Metric] = {
    "exactMatch": Metric("share of answers that are equal, but for white space around them", of_answer=exact_match),
    "tokenF1": Metric("overlap of the words, without case, punctuation and articles", of_answer=token_f1),
    "rougeL": Metric("longest common subsequence of the words, as F1", of_answer=rouge_l),
    "jsonSchema": Metric("share of answers that are JSON as `evaluation.answerSchema` asks"),
    "perplexity": Metric("exp of the mean loss per token of the expected answers", higher_is_better=False),
    "judge": Metric("mean of the marks from 1 to 5 that `evaluation.judge` gives"),
    "evalLoss": Metric("mean loss per token of the held-out examples", higher_is_better=False),
}


def higher_is_better(metric: str) -> bool:
    """Which way a metric goes; one of the canary set goes as it does on the golden set."""
    return METRICS[metric.removeprefix(CANARY)].higher_is_better


def of_answers(metric: str, answer_schema: str | None) -> Callable[[str, str], float] | None:
    """The function that scores one answer; None for metrics that are not of answers. Raises BadInput as `schema`."""
    if metric == "jsonSchema":
        follows = schema(answer_schema or "{}")
        return lambda given, _expected: float(follows(given))
    return METRICS[metric].of_answer


def mean(values: Sequence[float]) -> float:
    """Rounded, for a status and a report that people read."""
    return round(sum(values) / len(values), 6)


def perplexity(loss: float) -> float:
    """exp of a mean loss per token; a loss that is not a number, or beyond all measure, counts as the worst."""
    if not math.isfinite(loss) or loss > math.log(WORST_PERPLEXITY):
        return WORST_PERPLEXITY
    return round(math.exp(loss), 6)


def schema(text: str) -> Callable[[str], bool]:
    """Whether an answer is JSON that the JSON Schema in `text` allows. Raises BadInput where that is no schema."""
    try:
        asked = json.loads(text)
        kind: Any = validators.validator_for(asked, default=validators.Draft202012Validator)
        kind.check_schema(asked)
        _resolve_references(asked)
    except json.JSONDecodeError as error:
        raise BadInput(f"evaluation.answerSchema: not JSON: {error.msg} at column {error.colno}") from error
    except (exceptions.SchemaError, RecursionError) as error:
        said = getattr(error, "message", str(error))
        raise BadInput(f"evaluation.answerSchema: not a JSON Schema: {said[:200]}") from error
    validator = kind(asked, registry=REGISTRY)  # its default registry would fetch what a $ref names

    def follows(answer: str) -> bool:
        try:
            return validator.is_valid(json.loads(answer))
        except (ValueError, RecursionError):
            return False

    return follows


def _resolve_references(asked: Any) -> None:
    """Raise BadInput for a `$ref` that leads nowhere: validation would find it with an answer, after the training."""
    if not isinstance(asked, dict):
        return
    resource = Resource.from_contents(asked, default_specification=DRAFT202012)
    resolver = REGISTRY.with_resource(resource.id() or "", resource).resolver(resource.id() or "")
    parts: list[Any] = [asked]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            if isinstance(reference := part.get("$ref"), str):
                try:
                    resolver.lookup(reference)
                except Unresolvable as error:
                    raise BadInput(
                        f"evaluation.answerSchema: $ref {reference} leads nowhere, and nothing is fetched"
                    ) from error
            parts += part.values()
        elif isinstance(part, list):
            parts += part


def _f1(common: int, found: int, wanted: int) -> float:
    if not found and not wanted:
        return 1.0
    return 2 * common / (found + wanted)


def _squad_words(text: str) -> list[str]:
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length, bit-parallel (Hyyrö 2004): a row of the usual table is one integer."""
    places: dict[str, int] = {}
    for number, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << number
    everywhere = (1 << len(first)) - 1
    row = everywhere
    for word in second:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & everywhere
    return len(first) - row.bit_count()
