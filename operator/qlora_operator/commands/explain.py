"""`kubectl qlora explain`: what a job's status says, told in the order in which people ask."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from pydantic import Field, ValidationError
from rich.console import Console

from qlora_api.exchange import train_field
from qlora_api.findings import FINDINGS
from qlora_api.v1alpha1 import GROUP, PLURAL, Condition, Phase
from qlora_api.v1alpha1.fields import Document
from qlora_operator.commands import kubectl, watch
from qlora_operator.commands.documents import as_text
from qlora_operator.commands.refusals import BadInput
from qlora_operator.commands.shown import (
    GIB,
    WIDTH,
    PlanShown,
    micro_batch,
    needed_bytes,
    say,
    show_plan,
    show_rejected,
    where,
)

#: Reason of a job that stands still until somebody has made room.
VOLUME_FULL = "VolumeFull"

HELP = """\
Say where a job stands and why: why this GPU and not the others, what fills its memory and what was measured, why it
waits, how each attempt ended, and what to do.

exit codes:
  0    explained, whatever there is to say of the job
  2    bad input: there is no such job, or it was written by a version that this one cannot read
  3    no cluster: kubectl is missing, or the cluster does not answer
"""


class ArtifactShown(Document):
    """Of an artifact, what is shown."""

    name: str
    state: str = ""
    uri: str | None = None


class FindingShown(Document):
    """Of a finding, what is shown."""

    code: str
    count: int
    example: str | None = None


class ShareShown(Document):
    """What one source gives of an epoch."""

    examples_percent: float = 0
    tokens_percent: float = 0


class InspectionShown(Document):
    """Of what inspection found, what is to be looked at."""

    sources: tuple[ShareShown, ...] = ()
    findings: tuple[FindingShown, ...] = ()


class Spec(watch.Spec):
    """Of the job's spec, what is looked at here."""

    suspend: bool = False


class Status(watch.Status):
    """Of the job's status, what is told."""

    conditions: tuple[Condition, ...] = ()
    inspection: InspectionShown = InspectionShown()
    plan: PlanShown | None = None
    artifacts: tuple[ArtifactShown, ...] = ()


class Job(watch.Job):
    """A QLoRAJob as far as it is explained."""

    # narrower than watch's, and frozen as it is
    spec: Spec = Spec()  # pyright: ignore[reportIncompatibleVariableOverride]
    status: Status = Field(default=Status())  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def kubectl_names(self) -> str:
        """How kubectl is told which job."""
        return f"{self.metadata.name} -n {self.metadata.namespace}"


def declare(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = HELP
    parser.add_argument("name", metavar="NAME", help="name of the QLoRAJob")
    parser.add_argument("-o", "--output", choices=["json", "yaml"], help="for machines")
    kubectl.declare_options(parser)


def run(chosen: argparse.Namespace) -> int:
    """Read the job once and tell of it."""
    job = read(kubectl.get(chosen, f"{PLURAL}.{GROUP}", chosen.name))
    if chosen.output:
        sys.stdout.write(as_text(_as_document(job), chosen.output))
    else:
        show(job, Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH))
    return 0


def read(document: dict[str, Any]) -> Job:
    """The job in an API object. Raises BadInput when this version cannot read it."""
    try:
        return Job.model_validate(document, by_alias=True, by_name=False)
    except ValidationError as error:
        raise BadInput(watch.unreadable(error)) from error


def unmet(job: Job) -> list[Condition]:
    """The milestones that are refused or waited for, with their sentences."""
    about_all = ("Ready", "Reconciling", "Stalled")
    return [
        condition
        for condition in job.status.conditions
        if condition.type not in about_all and condition.status == "False" and condition.message
    ]


def in_words(finding: FindingShown) -> str:
    """A finding in a sentence, and what to do; of a kind that a later version found, no more than its name."""
    first = f" (first: {finding.example})" if finding.example else ""
    known = {code.value: kind for code, kind in FINDINGS.items()}.get(finding.code)
    said = f": {known.meaning}; {known.cure}" if known else ""
    return f"{finding.code} {finding.count:,}{first}{said}"


def why_there(plan: PlanShown) -> str:
    """Why the chosen GPU will do."""
    needed = needed_bytes(plan.memory) / GIB
    there = f", it has {plan.memory.gpu_bytes / GIB:.1f}" if plan.memory.gpu_bytes else ""
    headroom = plan.memory.headroom_percent
    return f"{plan.recipe.method} at {micro_batch(plan)} needs {needed:.1f} GiB with {headroom} % headroom{there}"


def show(job: Job, console: Console) -> None:
    """The whole story for people."""
    status = job.status
    say(console, "   ".join([f"{job.full_name}  {status.phase}", watch.done(job)[2], *watch.figures(job)]), "bold")
    if status.message:
        say(console, status.message)
    if waits := unmet(job):
        _head(console, "why it does not go on")
        for condition in waits:
            told = "" if condition.message in status.message else f": {condition.message}"
            say(console, f"  {condition.type} is {condition.status} ({condition.reason}){told}")
    if shares := status.inspection.sources:
        _head(console, "what is learned from")
        for number, share in enumerate(shares):
            of = f"{share.examples_percent:g} % of the examples, {share.tokens_percent:g} % of the tokens"
            say(console, f"  {train_field(number)}: {of}")
    if found := status.inspection.findings:
        _head(console, "to look at in the data")
        for finding in found:
            say(console, f"  {in_words(finding)}")
    if plan := status.plan:
        _head(console, "the plan")
        show_plan(plan, console)
        console.print()
        say(console, f"why {plan.flavour}: {why_there(plan)}")
        show_rejected(plan.rejected, console)
    if status.attempts:
        _head(console, "attempts")
        for attempt in status.attempts:
            change = f"; next: {attempt.change}" if attempt.change else ""
            say(console, f"  {watch.ending(attempt)}{change}")
        for older in status.older_attempts:
            say(console, f"  {watch.older(older)}")
    _head(console, "what to do")
    for sentence in advice(job):
        say(console, f"  {sentence}")


def _head(console: Console, text: str) -> None:
    console.print()
    say(console, text, "bold")


# --- what to do next ---


def advice(job: Job) -> list[str]:
    """What to do, a sentence each."""
    full = any(c.type == "Stalled" and c.status == "True" and c.reason == VOLUME_FULL for c in job.status.conditions)
    said = (_make_room if full else _ADVICE.get(job.status.phase, _follow))(job)
    if job.status.observed_generation < job.metadata.generation:
        said.append(
            "the operator has not answered the last change of the spec yet: if it stays so, see that it runs, with "
            "kubectl get pods -A -l app.kubernetes.io/name=qlora-operator"
        )
    return said


def _patch(job: Job, **spec: bool) -> str:
    patch = json.dumps({"spec": spec}, separators=(",", ":"))
    return f"kubectl patch qj {job.kubectl_names} --type=merge -p '{patch}'"


def _follow(job: Job) -> list[str]:
    waits = ["it goes on by itself when the cause above is gone"] if unmet(job) else []
    return [*waits, f"follow it with kubectl qlora watch {job.kubectl_names}"]


def _plan(job: Job) -> list[str]:
    if unmet(job):
        return [
            "add what is missing, and the job is planned within a minute; or change what it asks for: "
            f"{_patch(job, suspend=True)}, edit spec.hardware, and set suspend to false"
        ]
    return _follow(job)


def _review(job: Job) -> list[str]:
    if job.spec.plan_only:
        return [f"look at the plan; to train by it: {_patch(job, planOnly=False)}"]
    return _follow(job)


def _schedule(job: Job) -> list[str]:
    running = [attempt.job for attempt in job.status.attempts if attempt.outcome is None]
    pods = f"kubectl describe pods -n {job.metadata.namespace} -l qlora.dev/job={job.metadata.name}"
    if running:
        pods = f"kubectl describe pods -n {job.metadata.namespace} -l batch.kubernetes.io/job-name={running[-1]}"
    return [*_follow(job), f"what the scheduler and the kubelet say of its pods: {pods}"]


def _resume(job: Job) -> list[str]:
    return [f"to go on from the last checkpoint: {_patch(job, suspend=False)}"]


def _make_room(job: Job) -> list[str]:
    if job.status.phase == Phase.FAILED:  # as an earlier version left it
        return _mend(job)
    return [f"make room as it says, then {_patch(job, suspend=True)}", f"and {_patch(job, suspend=False)}"]


def _collect(job: Job) -> list[str]:
    return [f"take the {each.name} from {each.uri}" for each in job.status.artifacts if each.uri] or ["nothing"]


def _mend(job: Job) -> list[str]:
    said = ["a job is one run: correct what the message names, and apply it under another name"]
    failed = [attempt for attempt in job.status.attempts if attempt.outcome not in (None, "Succeeded")]
    if failed:
        said.append(f"the log of what failed: kubectl logs -n {job.metadata.namespace} job/{failed[-1].job}")
    return said


_ADVICE: dict[str, Callable[[Job], list[str]]] = {
    Phase.PLANNING: _plan,
    Phase.PLANNED: _review,
    Phase.SCHEDULING: _schedule,
    Phase.SUSPENDED: _resume,
    Phase.SUCCEEDED: _collect,
    Phase.FAILED: _mend,
}


def _as_document(job: Job) -> dict[str, Any]:
    """The same for machines."""
    status = job.status
    document: dict[str, Any] = {
        "namespace": job.metadata.namespace,
        "name": job.metadata.name,
        "phase": str(status.phase),
        "message": status.message,
        "progress": status.progress.to_api(),
        "unmet": [{"condition": c.type, "reason": c.reason, "message": c.message} for c in unmet(job)],
    }
    if plan := status.plan:
        document["plan"] = plan.to_api() | {"where": where(plan), "why": why_there(plan)}
    document["attempts"] = [attempt.to_api() for attempt in status.attempts]
    document["olderAttempts"] = [older.to_api() for older in status.older_attempts]
    document["advice"] = advice(job)
    return document
