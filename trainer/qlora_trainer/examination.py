"""What the tuned model is worth beside its base: on the golden set, and on the canary set what it has forgotten."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_api.exchange import EvaluationOrder, Score
from qlora_trainer.environment import log
from qlora_trainer.evaluation import Alive, answers, mean_loss
from qlora_trainer.formats import Example
from qlora_trainer.judging import Judge, JudgeUnusable, Question
from qlora_trainer.ranks import ALONE, Ranks
from qlora_trainer.scores import CANARY, mean, of_answers, perplexity
from qlora_trainer.sequences import Sequence as Row
from qlora_trainer.sequences import answering, cut, prompt_tokens

#: Examples of a set that are looked at during the training; the whole set follows at its end.
SLICE = 32
#: More tokens than the longest expected answer has: enough to see that an answer goes on where it should have ended.
ANSWER_SLACK_TOKENS = 4
#: What is always measured of the canary set.
FORGETTING = ("exactMatch", "perplexity")


@dataclass(frozen=True)
class KnownAnswers:
    """Examples with their answers; `rows` are those answers as tokens that carry loss."""

    prefix: str
    examples: list[Example]
    rows: Sequence[Row]

    @classmethod
    def of(cls, prefix: str, examples: list[Example], tokenizer: Any, max_length: int) -> KnownAnswers:
        """`examples` cut as those of the training are, for the memory that was planned."""
        tokenise = answering(tokenizer)
        rows = (cut(tokenise(example), max_length) for example in examples)
        return cls(prefix, examples, [row for row in rows if row])

    @property
    def questions(self) -> list[Example]:
        """Those that ask something; a text does not."""
        return [example for example in self.examples if example.format != "text"]

    def slice(self, tokenizer: Any, max_length: int) -> KnownAnswers:
        """A few of them, always the same, wherever they stand in their file."""
        chosen = sorted(self.examples, key=lambda example: example.key)[:SLICE]
        return self.of(self.prefix, chosen, tokenizer, max_length)


@dataclass(frozen=True)
class Sample:
    """One example of a set, and what both models answered."""

    set: str
    prompt: str
    expected: str
    base: str
    tuned: str


@dataclass
class Findings:
    """What an examination has found."""

    scores: list[Score] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


@dataclass(frozen=True)
class Examiner:
    """Who asks the model: with `size` rows at a time where losses are measured."""

    model: Any
    tokenizer: Any
    size: int
    device: torch.device
    flat: bool
    alive: Alive
    ranks: Ranks = ALONE

    def loss(self, rows: Sequence[Row], *, base: bool = False) -> float:
        """Loss per token of `rows`, of the model with or without its adapter."""
        with self.model.disable_adapter() if base else nullcontext():
            return mean_loss(
                self.model, rows, self.size, self.device,
                pad=self.tokenizer.pad_token_id, flat=self.flat, alive=self.alive, ranks=self.ranks,
            )  # fmt: skip

    def answers(self, of: KnownAnswers, name: str = "", *, base: bool = False) -> list[str]:
        """Greedy answers to every example."""
        training = self.model.training
        self.model.eval()
        with self.model.disable_adapter() if base else nullcontext():
            given = answers_to(self.model, self.tokenizer, of.questions, name, self.alive, self.ranks)
        self.model.train(training)
        return given

    def figures(self, sets: Iterable[KnownAnswers], metric: str | None) -> dict[str, float]:
        """What is looked at during the training: perplexities, and of the golden set also `metric` if it is asked."""
        found: dict[str, float] = {}
        for each in sets:
            if each.rows:
                found[f"{each.prefix}perplexity"] = perplexity(self.loss(each.rows))
            if metric and not each.prefix and each.questions and (score := of_answers(metric, None)):
                given = self.answers(each)
                found[metric] = mean([score(a, e.expected) for a, e in zip(given, each.questions, strict=True)])
        return found


def answers_to(
    model: Any,
    tokenizer: Any,
    examples: list[Example],
    name: str = "",
    alive: Alive = lambda: None,
    ranks: Ranks = ALONE,
) -> list[str]:
    """What `model` answers, with room for the longest of the expected answers."""
    longest = max(len(tokenizer(e.expected.strip(), add_special_tokens=False)["input_ids"]) for e in examples)
    prompts = [prompt_tokens(tokenizer, example) for example in examples]
    return answers(model, tokenizer, prompts, longest + ANSWER_SLACK_TOKENS, name, alive, ranks)


def examine(
    examiner: Examiner,
    golden: KnownAnswers | None,
    canary: KnownAnswers | None,
    order: EvaluationOrder,
) -> Findings:
    """Scores of base and tuned model on both sets, and their answers."""
    gated = [gate.metric for gate in order.gates]
    found = Findings()
    if golden:
        wanted = [*order.metrics, *(name for name in gated if not name.startswith(CANARY))]
        _measure(examiner, golden, wanted, order.answer_schema, found, asked_anyway=order.judge is not None)
    if canary:
        wanted = [*FORGETTING, *(name.removeprefix(CANARY) for name in gated if name.startswith(CANARY))]
        _measure(examiner, canary, wanted, order.answer_schema, found)
    for score in found.scores:
        log.info("%s of %d: %.4f before, %.4f after", score.metric, score.examples, score.base, score.tuned)
    return found


def _measure(
    examiner: Examiner,
    of: KnownAnswers,
    wanted: Sequence[str],
    answer_schema: str | None,
    found: Findings,
    *,
    asked_anyway: bool = False,
) -> None:
    names = list(dict.fromkeys(wanted))
    per_answer = {name: score for name in names if (score := of_answers(name, answer_schema))}
    kind = "canary" if of.prefix else "golden"
    if of.questions and (per_answer or asked_anyway):
        before = examiner.answers(of, f"{kind} set, base", base=True)
        after = examiner.answers(of, f"{kind} set, tuned")
        expected = [example.expected for example in of.questions]
        found.samples += [
            Sample(kind, question(example), *texts)
            for example, *texts in zip(of.questions, expected, before, after, strict=True)
        ]
        for name, score in per_answer.items():
            base, tuned = (mean([score(*pair) for pair in zip(g, expected, strict=True)]) for g in (before, after))
            found.scores.append(Score(metric=f"{of.prefix}{name}", base=base, tuned=tuned, examples=len(expected)))
    if "perplexity" in names and of.rows:
        base, tuned = (perplexity(examiner.loss(of.rows, base=which)) for which in (True, False))
        found.scores.append(Score(metric=f"{of.prefix}perplexity", base=base, tuned=tuned, examples=len(of.rows)))


def judged(found: Findings, judge: Judge, alive: Alive) -> Findings:
    """`found` with the judge's marks; a judge that cannot be had is told in the log, and leaves the metric out."""
    samples = [sample for sample in found.samples if sample.set == "golden"]
    try:
        before = judge.marks([Question(s.prompt, s.expected, s.base) for s in samples], alive)
        after = judge.marks([Question(s.prompt, s.expected, s.tuned) for s in samples], alive)
    except JudgeUnusable as error:
        log.warning("evaluation.judge: no marks: %s", error)
        return found
    both = [(b, t) for b, t in zip(before, after, strict=True) if b is not None and t is not None]
    if len(both) < len(samples):
        log.warning("evaluation.judge: %d of %d answers got no mark", len(samples) - len(both), len(samples))
    if both:
        base, tuned = (mean(marks) for marks in zip(*both, strict=True))
        found.scores.append(Score(metric="judge", base=base, tuned=tuned, examples=len(both)))
    return found


def question(example: Example) -> str:
    """What was asked, for people and judges."""
    if example.format != "messages":
        asked = (example.content.get(key) for key in ("prompt", "instruction", "input"))
        return "\n".join(part for part in asked if part)
    return "\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in example.content["messages"][:-1])
