"""The decisions: one policy per situation, asked in order; the first that applies answers.

Each takes the job as recorded, what the cluster has of it and the time, and returns a `Step` or None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, TypeVar

from qlora_api.exchange import Recipe, Stage, claim_of
from qlora_api.support import unsupported
from qlora_api.v1alpha1 import Attempt, JobStatus, Phase, Plan, Progress, WorkVolume
from qlora_operator import planner
from qlora_operator.lifecycle import budget, results
from qlora_operator.lifecycle.answers import Again, AgainWithHalfTheMicroBatch, GiveUp, Outcome, answer
from qlora_operator.lifecycle.claims import fields_on
from qlora_operator.lifecycle.conditions import Situation, Stance, with_situation
from qlora_operator.lifecycle.milestones import in_brief, milestones
from qlora_operator.lifecycle.observed import Absent, Active, Ended, Job, Observed, Stopping
from qlora_operator.lifecycle.pending import FOR_HARDWARE, Wait
from qlora_operator.lifecycle.progress import percent, progress
from qlora_operator.lifecycle.step import Action, CreateWorkVolume, DeleteWorkVolume, Remove, Start, Step, Stop
from qlora_operator.lifecycle.tasks import TRAIN, Task, current, ended, is_done, tasks

S = TypeVar("S", Absent, Stopping, Active, Ended)

NOW = timedelta()
SOON = timedelta(seconds=2)
WHEN_CLAIMS_CHANGE = timedelta(seconds=30)

FINISHED = (Phase.SUCCEEDED, Phase.FAILED)
PHASE_OF = {
    Stage.INSPECT: Phase.INSPECTING,
    Stage.TRAIN: Phase.TRAINING,
    Stage.MERGE: Phase.MERGING,
    Stage.PUBLISH: Phase.PUBLISHING,
}


def next_step(job: Job, seen: Observed, now: datetime) -> Step:
    """What to do for `job`, given what exists in the cluster. Pure."""
    for policy in POLICIES:
        if step := policy(job, seen, now):
            return _in_time_for_the_budget(step, job, seen, now)
    raise AssertionError("the last policy applies always")


def work_claim(job: Job) -> str:
    """Name of the claim that the stages work in: the user's, or the job's own."""
    return job.spec.storage.claim_name or f"{job.metadata.name}-work"


def output_claim(job: Job) -> str | None:
    """Name of the claim that the results go to; None where they go elsewhere."""
    uri = job.spec.output.uri
    return claim_of(uri)[0] if uri.startswith("pvc://") else None


def is_to_be_planned(job: Job) -> bool:
    """Whether the cluster's nodes are to be looked at for a plan, the first or another."""
    plan = job.status.plan
    if job.status.inspection is None or job.status.phase in FINISHED or is_done(job.status, TRAIN):
        return False
    return plan is None or plan.planned_for != planned_for(job)


def call_refused(job: Job, reason: str, message: str, now: datetime) -> JobStatus:
    """The status of a job with which the API server did not let the operator do what it decided."""
    return _say(job, Observed(), now, Situation(_underway(job, Observed()).phase, reason, message)).status


# --- the end ---


def job_is_over(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Stop what a failed job still runs, and give the work volume back unless it is to be kept. Nothing else, ever."""
    if job.status.phase not in FINISHED:
        return None
    actions: list[Action] = [Stop(task, n) for task, n, _ in _in_state(job, seen, Active)]
    status = job.status.model_copy(update={"attempts": tuple(a for a in job.status.attempts if a.outcome)})
    volume = status.work_volume
    if volume and volume.retained and not _is_kept(job):
        # a claim stays in use for as long as a pod that mounted it exists, be it finished
        mounted = [a for a in status.attempts if a.stage != Stage.INSPECT]
        actions += [Stop(task, a.number) for a in mounted for task in tasks(job.spec) if _is_of(a, task)]
        actions.append(DeleteWorkVolume())
        left = tuple(artifact for artifact in status.artifacts if artifact.state == "Published")
        gone = volume.model_copy(update={"retained": False})
        status = status.model_copy(update={"work_volume": gone, "artifacts": left})
    # suspend may still be edited, to no effect
    status = status.model_copy(update={"observed_generation": job.metadata.generation})
    left = _until_cleanup(job, now)
    if left is not None and left <= NOW:
        return Step(*_cleaned_up(job, status, now))
    return Step(status, tuple(actions), left)


def _until_cleanup(job: Job, now: datetime) -> timedelta | None:
    """Until what is left of a finished job is to be deleted; None where nothing is, or where it is done."""
    ttl, end = job.spec.ttl_seconds_after_finished, job.status.completion_time
    if ttl is None or end is None or job.status.cleanup_time is not None:
        return None
    return end + timedelta(seconds=ttl) - now


def _cleaned_up(job: Job, status: JobStatus, now: datetime) -> tuple[JobStatus, tuple[Action, ...]]:
    """Everything that was made for the job goes, but for what is published, and a volume that is to be kept."""
    actions: list[Action] = [
        Remove(task, a.number) for a in status.attempts for task in tasks(job.spec) if _is_of(a, task)
    ]
    actions += [Remove(task, n) for task, n in current(job.spec, status)]  # one that was stopped has left its order
    update: dict[str, Any] = {"cleanup_time": now.replace(microsecond=0)}
    volume, storage = job.status.work_volume, job.spec.storage
    if volume and storage.claim_name is None and storage.retain != "Keep":
        actions.append(DeleteWorkVolume())
        update["work_volume"] = volume.model_copy(update={"retained": False})
        update["artifacts"] = tuple(artifact for artifact in status.artifacts if artifact.state == "Published")
    return status.model_copy(update=update), tuple(actions)


def _in_time_for_the_budget(step: Step, job: Job, seen: Observed, now: datetime) -> Step:
    """`step`, looking again when the budget will be used up at the latest."""
    left = budget.time_left(job, seen, now)
    if left is None or step.status.phase in FINISHED:
        return step
    return replace(step, after=left if step.after is None else min(left, step.after))


def _is_of(attempt: Attempt, task: Task) -> bool:
    return (attempt.stage, attempt.artifact) == (task.stage, task.artifact)


def _is_kept(job: Job) -> bool:
    return _keeps_after_failure(job) if job.status.phase is Phase.FAILED else _keeps_after_success(job)


def _keeps_after_success(job: Job) -> bool:
    return job.spec.storage.claim_name is not None or job.spec.storage.retain == "Keep"


def _keeps_after_failure(job: Job) -> bool:
    return _keeps_after_success(job) or job.spec.storage.retain == "OnFailure"


def spec_asks_for_what_is_not_built(job: Job, seen: Observed, now: datetime) -> Step | None:
    """A field that this version would ignore is refused instead."""
    if not (sentences := unsupported(job.spec)):
        return None
    if job.status.attempts:  # edited on its way: nothing is lost, it goes on when the edit is taken back
        situation = Situation(job.status.phase or Phase.PENDING, "NotSupported", "; ".join(sentences), Stance.FAILED)
        stopped = [Stop(task, n) for task, n, _ in _in_state(job, seen, Active) if job.spec.suspend]
        return _say(job, seen, now, situation, actions=tuple(stopped))
    return _fail(job, seen, now, "NotSupported", "; ".join(sentences))


def a_task_is_given_up(job: Job, seen: Observed, now: datetime) -> Step | None:
    """No further attempt can help: the job fails, and what else runs is stopped."""
    for task, _ in current(job.spec, job.status):
        if isinstance(verdict := _answer(job, task), GiveUp):
            return _fail(job, seen, now, verdict.reason, verdict.message, at=task)
    return None


def everything_is_published(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Done: every task has succeeded."""
    if not all(is_done(job.status, task) for task in tasks(job.spec)):
        return None
    where = ", ".join(f"{artifact.name} at {artifact.uri}" for artifact in job.status.artifacts if artifact.uri)
    return _say(job, seen, now, Situation(Phase.SUCCEEDED, "Published", f"published {where}", Stance.READY), after=NOW)


def budget_is_used_up(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Stop what runs, with a checkpoint; then the job has failed. (A suspended job's budget may still be edited.)"""
    used_up = None if job.spec.suspend else budget.exceeded(job, seen, now)
    if used_up is None:
        return None
    running = [(task, n) for task, n, _ in _in_state(job, seen, Active)]
    if running or any(_in_state(job, seen, Stopping)):
        situation = Situation(_underway(job, seen).phase, "BudgetExceeded", f"{used_up}; stopping, with a checkpoint")
        return _say(job, seen, now, situation, actions=tuple(Stop(*attempt) for attempt in running), after=SOON)
    return _fail(job, seen, now, "BudgetExceeded", f"{used_up}{_where_the_checkpoint_is(job)}")


def _where_the_checkpoint_is(job: Job) -> str:
    progress, volume = job.status.progress, job.status.work_volume
    if is_done(job.status, TRAIN) or volume is None or progress is None or not progress.step:
        return ""
    kept = "is kept on" if _keeps_after_failure(job) else "goes with"
    at = f"step {progress.step} of {progress.steps}"
    return f"; training was at {at}, its checkpoint {kept} the claim {volume.claim_name}"


# --- attempts ---


def attempts_have_ended(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Record every attempt that is over, with its result, before anything builds on it."""
    status = job.status
    for task, n, state in _in_state(job, seen, Ended):
        status = results.recorded(status, job.metadata.name, task, n, state)
        verdict = _answer(Job(job.metadata, job.spec, status), task)
        if isinstance(verdict, AgainWithHalfTheMicroBatch) and status.plan:
            status = _with_half_the_micro_batch(status, status.plan)
    if status is job.status:
        return None
    after = Job(job.metadata, job.spec, status)
    return _say(after, seen, now, _underway(after, seen), after=NOW)


def _with_half_the_micro_batch(status: JobStatus, old: Plan) -> JobStatus:
    """The status with the smaller plan, and with the change noted on the attempt that ran out of memory."""
    if status.inspection is None:
        return status
    new = planner.with_half_the_micro_batch(old, status.inspection)
    change = (
        f"micro-batch {old.micro_batch_size} → {new.micro_batch_size}, "
        f"accumulation {old.gradient_accumulation} → {new.gradient_accumulation}"
    )
    last = status.attempts[-1].model_copy(update={"change": change})
    return status.model_copy(update={"plan": new, "attempts": (*status.attempts[:-1], last)})


def pod_template_was_edited(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Stop what was started from another `spec.podTemplate`, such as an inspection whose image cannot be pulled.

    It is not over: the attempt starts anew, from its checkpoint where it had one.
    """
    wanted = template_of(job)
    outdated = [(task, n) for task, n, a in _in_state(job, seen, Active) if a.template and a.template != wanted]
    if not outdated:
        return None
    names = ", ".join(task.name for task, _ in outdated)
    message = f"stopping {names}: spec.podTemplate has changed since it was started"
    situation = Situation(_underway(job, seen).phase, "Restarting", message)
    return _say(job, seen, now, situation, actions=tuple(Stop(*attempt) for attempt in outdated), after=SOON)


def template_of(job: Job) -> str:
    """Fingerprint of the spec's pod template, which every stage's Job carries."""
    return results.fingerprint(job.spec.pod_template.model_dump(mode="json", exclude_defaults=True))


def inspection_is_missing(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Look at model and data, on a CPU, before anything else."""
    if job.status.inspection is not None:
        return None
    return _start(job, seen, now)


# --- the plan ---


def plan_is_missing(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Size and place; anew when hardware or pod template were edited while suspended."""
    inspection = job.status.inspection
    if inspection is None or not is_to_be_planned(job):
        return None
    if running := [(task, n) for task, n, _ in _in_state(job, seen, Active) if task == TRAIN]:
        situation = Situation(Phase.PLANNING, "Replanning", "stopping train, with a checkpoint, to plan it anew")
        return _say(job, seen, now, situation, actions=tuple(Stop(*attempt) for attempt in running), after=SOON)
    made = planner.plan(job.spec, inspection, seen.inventory, seen.installation, keep=_begun(job))
    if isinstance(made, Plan):
        made = _not_larger_than_what_fitted(made, job.status)
        planned = job.status.model_copy(
            update={
                "plan": made.model_copy(update={"planned_for": planned_for(job)}),
                "progress": Progress(percent=percent(job.spec, job.status), steps=made.steps),
            }
        )
        message = f"planned: {in_brief(made)}, micro-batch {made.micro_batch_size}"
        situation = Situation(Phase.PLANNING, "Planned", message)
        return _say(Job(job.metadata, job.spec, planned), seen, now, situation, after=NOW)
    if made.final and job.status.plan is None:
        return _fail(job, seen, now, made.reason, made.message)
    # no time to look again: it is queued when nodes change, or when the edit that left it without a plan is taken back
    return _say(job, seen, now, Situation(Phase.PLANNING, made.reason, made.message))


def _begun(job: Job) -> Recipe | None:
    """The recipe of a training that may have left checkpoints: it was at work once. (On a CPU nothing counts that.)"""
    status = job.status
    if status.plan is None:
        return None
    attempts = any(attempt.stage == Stage.TRAIN for attempt in status.attempts)
    ran = bool(status.usage and status.usage.gpu_seconds) or bool(status.progress and status.progress.step)
    on_cpu = not status.plan.gpus and status.work_volume is not None
    return status.plan.recipe if attempts or ran or on_cpu else None


def _not_larger_than_what_fitted(made: Plan, status: JobStatus) -> Plan:
    """On GPUs that a training ran out of memory on, the micro-batch stays what it was brought down to."""
    old = status.plan
    ran_out = any(attempt.outcome == Outcome.OUT_OF_MEMORY for attempt in status.attempts)
    if old is None or not ran_out or made.micro_batch_size <= old.micro_batch_size:
        return made
    if (old.flavour, old.gpus) != (made.flavour, made.gpus):
        return made
    kept = ("micro_batch_size", "gradient_accumulation", "memory")
    return made.model_copy(update={name: getattr(old, name) for name in kept})


def planned_for(job: Job) -> str:
    """Fingerprint of the parts of the spec that a plan depends on and that may change."""
    parts = (job.spec.hardware, job.spec.pod_template)
    return results.fingerprint(*(part.model_dump(mode="json", exclude_defaults=True) for part in parts))


def rests_at_its_plan(job: Job, seen: Observed, now: datetime) -> Step | None:
    """`planOnly`: the plan is what was asked for."""
    if not job.spec.plan_only:
        return None
    message = "planned; set spec.planOnly to false to go on"
    return _say(job, seen, now, Situation(Phase.PLANNED, "PlanReady", message, Stance.READY))


# --- suspension ---


def is_suspended(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Stop what runs, with a checkpoint, and rest. The attempt is not over: it goes on under the same name."""
    if not job.spec.suspend:
        return None
    running = [(task, n) for task, n, _ in _in_state(job, seen, Active)]
    stopping = [task for task, _, _ in _in_state(job, seen, Stopping)]
    if running or stopping:
        names = ", ".join(sorted({task.name for task, _ in running} | {task.name for task in stopping}))
        situation = Situation(Phase.SUSPENDED, "Suspending", f"stopping {names}, with a checkpoint")
        actions = tuple(Stop(task, n) for task, n in running)
        return _say(job, seen, now, situation, actions=actions, after=SOON)
    message = "suspended; set spec.suspend to false to go on"
    return _say(job, seen, now, Situation(Phase.SUSPENDED, "Suspended", message, Stance.RESTING))


# --- running ---


def output_claim_is_missing(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Say so before anything is trained, instead of when there is a result to be published."""
    claim = output_claim(job)
    if job.status.work_volume is not None or claim is None or seen.claims.get(claim, True):
        return None
    message = f"spec.output.uri: there is no PersistentVolumeClaim {claim} in this namespace; create it"
    return _say(job, seen, now, Situation(Phase.SCHEDULING, "ClaimMissing", message), after=WHEN_CLAIMS_CHANGE)


def work_volume_is_missing(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Claim it, with its size known; a claim that the user named must be there."""
    claim = work_claim(job)
    if seen.claims.get(claim):
        if job.status.work_volume is not None:
            return None
        volume = job.status.model_copy(update={"work_volume": WorkVolume(claim_name=claim)})
        return _say(Job(job.metadata, job.spec, volume), seen, now, _underway(job, seen), after=NOW)
    if job.status.work_volume is not None and is_done(job.status, TRAIN):
        message = f"the work volume {claim} is gone, and the adapter with it; apply the job anew under another name"
        return _fail(job, seen, now, "WorkVolumeLost", message)
    if job.spec.storage.claim_name is not None:
        message = f"spec.storage.claimName: there is no PersistentVolumeClaim {claim} in this namespace; create it"
        return _say(job, seen, now, Situation(Phase.SCHEDULING, "ClaimMissing", message), after=WHEN_CLAIMS_CHANGE)
    situation = Situation(Phase.SCHEDULING, "Claiming", f"claiming the work volume {claim}")
    return _say(job, seen, now, situation, actions=(CreateWorkVolume(),), after=NOW)


def work_volume_is_not_shared(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Every node of the training writes to it: the user's claim must allow that, or our own, made for a plan on one."""
    plan, claim = job.status.plan, work_claim(job)
    if plan is None or plan.nodes == 1 or claim in seen.shared_claims or is_done(job.status, TRAIN):
        return None
    named = "spec.storage.claimName" if job.spec.storage.claim_name else "spec.hardware.nodes"
    message = (
        f"{named}: the training is planned on {plan.nodes} nodes, and the claim {claim} can be written from one alone "
        "(it lacks the access mode ReadWriteMany): suspend the job, set spec.hardware.nodes to 1 and resume"
    )
    return _say(job, seen, now, Situation(Phase.SCHEDULING, Wait.VOLUME, message), after=WHEN_CLAIMS_CHANGE)


def tasks_are_to_run(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Start what can start, and say what is under way."""
    return _start(job, seen, now)


POLICIES: tuple[Callable[[Job, Observed, datetime], Step | None], ...] = (
    job_is_over,
    attempts_have_ended,
    spec_asks_for_what_is_not_built,
    a_task_is_given_up,
    everything_is_published,
    budget_is_used_up,
    pod_template_was_edited,
    inspection_is_missing,
    plan_is_missing,
    rests_at_its_plan,
    is_suspended,
    output_claim_is_missing,
    work_volume_is_missing,
    work_volume_is_not_shared,
    tasks_are_to_run,
)


def _start(job: Job, seen: Observed, now: datetime) -> Step:
    """Start the absent tasks whose back-off is over, and look how they fare; look again when the next one's is."""
    actions: list[Action] = []
    waits: list[timedelta] = []
    retried: list[str] = []
    for task, n, _ in _in_state(job, seen, Absent):
        verdict = _answer(job, task)
        delay = verdict.delay if isinstance(verdict, Again) else NOW
        last = ended(job.status, task)[-1:]
        since = now - last[0].ended if last and last[0].ended else delay
        if since < delay:
            waits.append(delay - since)
            why = f": {last[0].message}" if last[0].message else ""
            at = f"{now + delay - since:%H:%M:%S} UTC"
            retried.append(f"{last[0].job} ended {last[0].outcome}{why}; {task.name} starts again at {at}")
        else:
            actions.append(Start(task, n))
    if actions or any(_in_state(job, seen, Stopping)):
        waits.append(SOON)
    situation = _underway(job, seen)
    if retried and not actions and not any(_in_state(job, seen, Active)):
        situation = Situation(situation.phase, "BackOff", "; ".join(retried))
    return _say(job, seen, now, situation, actions=tuple(actions), after=min(waits, default=None))


def _answer(job: Job, task: Task) -> GiveUp | Again | None:
    """What follows the task's last ended attempt; None where there is none, or it succeeded."""
    attempts = ended(job.status, task)
    if not attempts or attempts[-1].outcome == Outcome.SUCCEEDED:
        return None
    size = job.status.plan.micro_batch_size if job.status.plan and task == TRAIN else None
    return answer(attempts, job.spec.retry, micro_batch_size=size)


def _in_state(job: Job, seen: Observed, kind: type[S]) -> Iterator[tuple[Task, int, S]]:
    for task, n in current(job.spec, job.status):
        state = seen.attempts.get(task.job_name(job.metadata.name, n), Absent())
        if isinstance(state, kind):
            yield task, n, state


def _underway(job: Job, seen: Observed) -> Situation:
    """The phase is that of the earliest task under way; the message says what each does, or why it waits."""
    at_work = [(task, state) for task, _, state in _in_state(job, seen, Active)]
    todo = current(job.spec, job.status)
    if job.status.inspection is not None and job.status.plan is None:
        return Situation(Phase.PLANNING, "Inspected", "inspected; planning")
    if not at_work:
        first = todo[0][0] if todo else None
        phase = PHASE_OF[first.stage] if first else Phase.PUBLISHING
        return Situation(phase, "Starting", f"starting {', '.join(task.name for task, _ in todo)}" if todo else "done")
    phase = PHASE_OF[at_work[0][0].stage]
    message = "; ".join(f"{task.name} {_doing(job, seen, task, state)}" for task, state in at_work)
    if not all(state.waiting for _, state in at_work):
        return Situation(phase, "Running", message)
    return Situation(Phase.SCHEDULING if phase is Phase.TRAINING else phase, at_work[0][1].reason, message)


def _doing(job: Job, seen: Observed, task: Task, state: Active) -> str:
    inspection, plan = job.status.inspection, job.status.plan
    if task == TRAIN and state.waiting and state.reason in FOR_HARDWARE and inspection and plan and plan.gpus:
        cure = planner.advice(job.spec, inspection, plan, seen.inventory, seen.installation, keep=_begun(job))
        return f"waits: {state.waiting.rstrip('. ')}; {cure}"
    if state.missing_claim and (fields := fields_on(job.spec, state.missing_claim)):
        return f"waits: {', '.join(fields)}: {state.waiting}"
    return f"waits: {state.waiting}" if state.waiting else "is running"


def _fail(job: Job, seen: Observed, now: datetime, reason: str, message: str, *, at: Task | None = None) -> Step:
    situation = Situation(Phase.FAILED, reason, message, Stance.FAILED)
    return _say(job, seen, now, situation, after=NOW, failed_at=at)


def _say(
    job: Job,
    seen: Observed,
    now: datetime,
    situation: Situation,
    *,
    actions: tuple[Action, ...] = (),
    after: timedelta | None = None,
    failed_at: Task | None = None,
) -> Step:
    """The step that writes `situation` over what is recorded in `job.status`."""
    status = results.with_live_attempts(job, seen, now)
    status = with_situation(
        status.model_copy(update={"progress": progress(job, seen)}),
        situation,
        milestones(job, seen, situation, failed_at),
        generation=job.metadata.generation,
        now=now,
    )
    return Step(status, actions, after)
