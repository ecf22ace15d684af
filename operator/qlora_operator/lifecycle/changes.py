"""What the next attempt does differently after one that ran out of something, and what helps where nothing is left."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_api.v1alpha1 import Plan
from qlora_operator import planner
from qlora_operator.lifecycle.answers import Change, Outcome
from qlora_operator.lifecycle.observed import Job, Observed
from qlora_operator.lifecycle.tasks import TRAIN, Task, ended
from qlora_operator.sizing.memory import GIB

#: So much more host memory an attempt asks for than the one that was killed for want of it.
MORE_MEMORY = 1.5


@dataclass(frozen=True)
class Changed:
    """What is changed, for people, and the plan with it."""

    said: str
    plan: Plan | None


def change_for(kind: Change, job: Job, task: Task, seen: Observed) -> Changed | None:
    """What to do differently after the last attempt at `task`, as recorded in `job`; None where nothing is left."""
    return {Change.LESS_GPU_MEMORY: _less_gpu_memory, Change.MORE_HOST_MEMORY: _more_host_memory}[kind](job, task, seen)


def advice(kind: Change, job: Job, task: Task, seen: Observed) -> str:
    """What a user can do where there is no such change; empty where there is nothing to be said."""
    plan, inspection = job.status.plan, job.status.inspection
    if kind is Change.LESS_GPU_MEMORY:
        if plan is None or inspection is None:
            return ""
        return planner.after_out_of_memory(job.spec, inspection, plan, seen.inventory, seen.installation)
    if not _raises(job, task):
        had = _larger_than_nodes(job, task, seen) or "no node had it"
        return f"with half as much again, {had}: add a larger one, and apply the job anew"
    if task != TRAIN:
        return (
            "it was given half as much again and that was not enough: give such stages more, by the chart's cpuStages"
        )
    return "it was given half as much again and that was not enough; look for what else takes the node's memory"


def memory_factor(job: Job, task: Task) -> float:
    """How much more host memory than planned the next attempt at `task` asks for."""
    return MORE_MEMORY ** _raises(job, task)


def _raises(job: Job, task: Task) -> int:
    return sum(a.outcome == Outcome.HOST_OUT_OF_MEMORY and a.change is not None for a in ended(job.status, task))


def _less_gpu_memory(job: Job, task: Task, seen: Observed) -> Changed | None:
    plan, inspection = job.status.plan, job.status.inspection
    if task != TRAIN or plan is None or inspection is None or job.spec.retry.on_out_of_memory == "fail":
        return None
    smaller = planner.with_less_memory(job.spec, plan, inspection)
    return Changed(smaller.change, smaller.plan) if smaller else None


def _more_host_memory(job: Job, task: Task, seen: Observed) -> Changed | None:
    """Once: what needs more than half as much again is not what was planned."""
    if _raises(job, task) or _larger_than_nodes(job, task, seen):
        return None
    asked = _asked_bytes(job, task, seen)
    more = f"{asked / GIB:.1f} GiB → {asked * MORE_MEMORY / GIB:.1f} GiB" if asked else f"× {MORE_MEMORY:g}"
    return Changed(f"memory {more}", job.status.plan)


def _larger_than_nodes(job: Job, task: Task, seen: Observed) -> str:
    """That the nodes that can take the next attempt at `task` have less than the first increase would ask for; empty
    where one has it. Where no such node is there at the moment, that is for the pod to wait for."""
    plan = job.status.plan if task == TRAIN else None
    host = planner.largest_host(job.spec, plan, seen.inventory, seen.installation)
    if host is None or _raises(job, task):
        return ""
    return planner.too_large(round(_asked_bytes(job, task, seen) * MORE_MEMORY), plan, host)


def _asked_bytes(job: Job, task: Task, seen: Observed) -> int:
    """What the first attempt at `task` asks for of its node's memory."""
    if task == TRAIN and job.status.plan is not None:
        return job.status.plan.host_memory_bytes
    return seen.installation.stage_memory_bytes
