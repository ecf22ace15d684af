"""Two jobs side by side, read with `kubectl get`: what differs in the recipe, what it cost, and what came of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_api.v1alpha1 import GROUP, PLURAL, Usage
from qlora_api.v1alpha1.fields import Document
from qlora_operator.commands import kubectl, watch
from qlora_operator.commands.documents import as_text
from qlora_operator.commands.refusals import BadInput
from qlora_operator.commands.shown import GIB, WIDTH, PlanShown, duration, micro_batch, where

HELP = """\
Set two jobs side by side: where they stand, in what their recipes differ, where they ran, what that took, and the
scores of what came out. For example a job with method qlora and the same with method lora.

exit codes:
  0    compared, whatever became of the jobs
  2    bad input: one of them is not there, or was written by a version that this one cannot read
  3    no cluster: kubectl is missing, or the cluster does not answer
"""
NOT_KNOWN = "–"
#: Shown whether they differ or not: without them nobody knows what is compared.
ALWAYS = ("method", "rank")


class ScoreShown(Document):
    """Of a score, what is shown."""

    metric: str
    base: float
    tuned: float


class GateShown(Document):
    """Of a gate's verdict, what is shown."""

    metric: str
    bound: str
    limit: float
    passed: bool


class EvaluationShown(Document):
    """Of an evaluation, what is shown."""

    scores: tuple[ScoreShown, ...] = ()
    gates: tuple[GateShown, ...] = ()
    selected_step: int | None = None
    stopped_early: bool = False


class Status(watch.Status):
    """Of the job's status, what is compared."""

    plan: PlanShown | None = None
    usage: Usage = Usage()
    evaluation: EvaluationShown = EvaluationShown()


class Job(watch.Job):
    """A QLoRAJob as far as it is compared."""

    # narrower than watch's, and frozen as it is
    status: Status = Field(default=Status())  # pyright: ignore[reportIncompatibleVariableOverride]


@dataclass(frozen=True)
class Compared:
    """A job, and all of its recipe, whatever version wrote it."""

    job: Job
    recipe: dict[str, Any]

    @property
    def training_seconds(self) -> int | None:
        """So long its attempts at the training have run, as far as they have ended."""
        runs = [a for a in self.job.status.attempts if a.stage == "train" and a.started and a.ended]
        older = sum(ends.seconds for ends in self.job.status.older_attempts if ends.stage == "train")
        return older + sum(round((a.ended - a.started).total_seconds()) for a in runs if a.started and a.ended) or None

    @property
    def gpu_hours(self) -> float | None:
        """GPUs × hours of training; None on the CPU, or where it has not begun."""
        return round(self.job.status.usage.gpu_seconds / 3600, 2) or None


def declare(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = HELP
    parser.add_argument("names", metavar="NAME", nargs=2, help="names of the two QLoRAJobs, in one namespace")
    parser.add_argument("-o", "--output", choices=["json", "yaml"], help="for machines")
    kubectl.declare_options(parser)


def run(chosen: argparse.Namespace) -> int:
    """Read both jobs once and compare them."""
    first, second = chosen.names
    if first == second:
        raise BadInput(f"{first} is named twice: name two jobs")
    found = kubectl.get(chosen, f"{PLURAL}.{GROUP}", first, second).get("items", [])
    by_name = {document["metadata"]["name"]: document for document in found}
    one, other = read(by_name[first]), read(by_name[second])
    if chosen.output:
        sys.stdout.write(as_text(as_document(one, other), chosen.output))
    else:
        show(one, other, Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH))
    return 0


def read(document: dict[str, Any]) -> Compared:
    """The job in an API object. Raises BadInput when this version cannot read it."""
    try:
        job = Job.model_validate(document, by_alias=True, by_name=False)
    except ValidationError as error:
        raise BadInput(watch.unreadable(error)) from error
    return Compared(job, document.get("status", {}).get("plan", {}).get("recipe", {}))


def recipe_rows(first: Compared, second: Compared) -> list[tuple[str, Any, Any]]:
    """What the recipes differ in, and what is always shown; nothing where a job has no plan yet."""
    if not first.recipe or not second.recipe:
        return []
    names = [*ALWAYS, *sorted({*first.recipe, *second.recipe} - {*ALWAYS})]
    rows = [(name, first.recipe.get(name), second.recipe.get(name)) for name in names]
    return [row for row in rows if row[0] in ALWAYS or row[1] != row[2]]


def score_rows(first: Compared, second: Compared) -> list[tuple[str, ScoreShown | None, ScoreShown | None]]:
    """Every metric that one of them has, in the order of the first."""
    of = [{score.metric: score for score in each.job.status.evaluation.scores} for each in (first, second)]
    return [(name, of[0].get(name), of[1].get(name)) for name in dict.fromkeys([*of[0], *of[1]])]


def show(first: Compared, second: Compared, console: Console) -> None:
    """The comparison for people."""
    table = Table.grid(padding=(0, 3))
    both = (first, second)

    def row(name: str, told: Callable[[Compared], str | None]) -> None:
        cells = [told(each) or NOT_KNOWN for each in both]
        if any(cell != NOT_KNOWN for cell in cells):
            table.add_row(name, *(Text(cell) for cell in cells))

    def head(text: str) -> None:
        table.add_row()
        table.add_row(Text(text, "bold"))

    table.add_row("", *(Text(each.job.full_name, "bold") for each in both))
    row("phase", lambda each: each.job.status.phase)
    if rows := recipe_rows(*both):
        head("recipe, where it differs")
        for name, *values in rows:
            table.add_row(f"  {name}", *(Text(NOT_KNOWN if value is None else str(value)) for value in values))
    head("plan")
    row("  runs on", lambda each: where(plan) if (plan := each.job.status.plan) else None)
    row("  batch", lambda each: micro_batch(plan) if (plan := each.job.status.plan) else None)
    row("  memory, predicted", lambda each: _gib(plan.memory.total_bytes) if (plan := each.job.status.plan) else None)
    row("  memory, measured", lambda each: _gib(plan.memory.measured_bytes) if (plan := each.job.status.plan) else None)
    head("training")
    row("  steps", lambda each: _number(each.job.status.progress.step))
    row("  adapter of step", lambda each: _number(each.job.status.evaluation.selected_step))
    row("  stopped early", lambda each: "yes" if each.job.status.evaluation.stopped_early else None)
    row("  loss", lambda each: _number(each.job.status.progress.loss))
    row("  held-out loss", lambda each: _number(each.job.status.progress.eval_loss))
    row("  tokens/s", lambda each: _number(each.job.status.progress.tokens_per_second))
    row("  time", lambda each: duration(each.training_seconds) if each.training_seconds else None)
    row("  GPU-hours", lambda each: _number(each.gpu_hours))
    if scores := score_rows(*both):
        head("scores, base → tuned")
        for name, *of in scores:
            told = (NOT_KNOWN if s is None else f"{s.base:.4g} → {s.tuned:.4g}" for s in of)
            table.add_row(f"  {name}", *(Text(text) for text in told))
        row("  gates", lambda each: _gates(each.job.status.evaluation.gates))
    console.print(table)


def _gib(size: int | None) -> str | None:
    return None if size is None else f"{size / GIB:.1f} GiB"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:,}"


def _gates(gates: tuple[GateShown, ...]) -> str | None:
    broken = [f"{gate.metric} {gate.bound} {gate.limit:g}" for gate in gates if not gate.passed]
    if broken:
        return f"not held: {', '.join(broken)}"
    return "held" if gates else None


def as_document(first: Compared, second: Compared) -> dict[str, Any]:
    """The same for machines: of everything a list of two, null where one of them has nothing."""

    def of_both(told: Callable[[Compared], Any]) -> list[Any]:
        return [told(first), told(second)]

    return {
        "namespace": first.job.metadata.namespace,
        "names": of_both(lambda each: each.job.metadata.name),
        "phase": of_both(lambda each: str(each.job.status.phase)),
        "recipe": {name: values for name, *values in recipe_rows(first, second)},
        "runsOn": of_both(lambda each: where(plan) if (plan := each.job.status.plan) else None),
        "predictedBytes": of_both(lambda each: plan.memory.total_bytes if (plan := each.job.status.plan) else None),
        "measuredBytes": of_both(lambda each: plan.memory.measured_bytes if (plan := each.job.status.plan) else None),
        "progress": of_both(lambda each: each.job.status.progress.to_api()),
        "trainingSeconds": of_both(lambda each: each.training_seconds),
        "gpuHours": of_both(lambda each: each.gpu_hours),
        "scores": {
            name: [None if score is None else {"base": score.base, "tuned": score.tuned} for score in of]
            for name, *of in score_rows(first, second)
        },
        "gates": of_both(lambda each: [gate.to_api() for gate in each.job.status.evaluation.gates]),
        "selectedStep": of_both(lambda each: each.job.status.evaluation.selected_step),
        "stoppedEarly": of_both(lambda each: each.job.status.evaluation.stopped_early),
    }
