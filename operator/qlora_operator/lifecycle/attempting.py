"""Policies for attempts: which to start, to stop, to count, and what follows their ends."""

from __future__ import annotations

from datetime import datetime, timedelta

from qlora_api.v1alpha1 import JobStatus, Phase
from qlora_operator.lifecycle import changes, history, results
from qlora_operator.lifecycle.answers import ANSWERS, COUNTED, Again, GiveUp, Outcome, Rest, answer
from qlora_operator.lifecycle.conditions import Situation, Stance
from qlora_operator.lifecycle.observed import Absent, Active, Ended, Job, Observed, Stopping
from qlora_operator.lifecycle.progress import furthest_step
from qlora_operator.lifecycle.standing import NOW, PHASE_OF, SOON, fail, held, in_state, say, underway
from qlora_operator.lifecycle.step import Action, Remove, Start, Step, Stop
from qlora_operator.lifecycle.tasks import TRAIN, Task, current, ended, tasks

#: What changes before the next attempt after one that found a volume full: by the user, not by the operator.
RESUMED = "room was made, and the job resumed"


def attempts_have_ended(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Record every attempt that is over, with its result, before anything builds on it. Of those that are listed no
    longer nothing is left in the cluster."""
    status = job.status
    for task, n, state in in_state(job, seen, Ended):
        step = furthest_step(job, seen, task.job_name(job.metadata.name, n)) if task == TRAIN else None
        status = results.recorded(status, job.metadata.name, task, n, state, step)
        status = _with_what_changes(Job(job.metadata, job.spec, status), task, seen)
    if status is job.status:
        return None
    status, older = history.condensed(status)
    after = Job(job.metadata, job.spec, status)
    left = tuple(Remove(task, a.number) for task in tasks(job.spec) for a in older if task.is_of(a))
    return say(after, seen, now, underway(after, seen), actions=left, after=NOW)


def _with_what_changes(job: Job, task: Task, seen: Observed) -> JobStatus:
    """The status with what the next attempt at `task` does differently, noted on the one that has just ended."""
    status = job.status
    *before, last = status.attempts
    row = ANSWERS.get(Outcome(last.outcome or Outcome.CRASHED))
    if row is None or row.change is None or (found := changes.change_for(row.change, job, task, seen)) is None:
        return status
    noted = last.model_copy(update={"change": found.said})
    return status.model_copy(update={"plan": found.plan, "attempts": (*before, noted)})


def a_task_is_given_up(job: Job, seen: Observed, now: datetime) -> Step | None:
    """No further attempt can help: the job fails, and what else runs is stopped."""
    for task, _ in current(job.spec, job.status):
        if isinstance(verdict := verdict_on(job, task), GiveUp):
            cure = changes.advice(verdict.change, job, task, seen) if verdict.change else ""
            return fail(
                job, seen, now, verdict.reason, f"{verdict.message}; {cure}" if cure else verdict.message, at=task
            )
    return None


def a_volume_is_full(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Rest, holding no GPU, until somebody has made room: suspending and resuming the job says so. Nothing is lost
    meanwhile, and nothing fills the volume further."""
    full = [
        (task, verdict)
        for task, _ in current(job.spec, job.status)
        if isinstance(verdict := verdict_on(job, task), Rest)
    ]
    if not full:
        return None
    edited = job.status.observed_generation != job.metadata.generation  # suspended and resumed between two looks
    if job.spec.suspend or edited:
        last = {ended(job.status, task)[-1].job for task, _ in full}
        noted = tuple(a.model_copy(update={"change": RESUMED}) if a.job in last else a for a in job.status.attempts)
        after = Job(job.metadata, job.spec, job.status.model_copy(update={"attempts": noted}))
        return say(after, seen, now, underway(after, seen), after=NOW)
    task, verdict = full[0]
    message = f"{'; '.join(each.message for _, each in full)}; then set spec.suspend to true and back to false"
    situation = Situation(PHASE_OF[task.stage], verdict.reason, message, Stance.FAILED)
    return say(job, seen, now, situation, failed_at=task)


def pod_template_was_edited(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Stop what was started from another `spec.podTemplate`, such as an inspection whose image cannot be pulled.

    It is not over: the attempt starts anew, from its checkpoint where it had one.
    """
    wanted = template_of(job)
    outdated = [(task, n) for task, n, a in in_state(job, seen, Active) if a.template and a.template != wanted]
    if not outdated:
        return None
    names = ", ".join(task.name for task, _ in outdated)
    message = f"stopping {names}: spec.podTemplate has changed since it was started"
    situation = Situation(underway(job, seen).phase, "Restarting", message)
    return say(job, seen, now, situation, actions=tuple(Stop(*attempt) for attempt in outdated), after=SOON)


def template_of(job: Job) -> str:
    """Fingerprint of the spec's pod template, which every stage's Job carries."""
    return results.fingerprint(job.spec.pod_template.model_dump(mode="json", exclude_defaults=True))


def inspection_is_missing(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Look at model and data, on a CPU, before anything else."""
    if job.status.inspection is not None:
        return None
    return start(job, seen, now)


def is_suspended(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Stop what runs, with a checkpoint, and rest. The attempt is not over: it goes on under the same name."""
    if not job.spec.suspend:
        return None
    running = [(task, n) for task, n, _ in in_state(job, seen, Active)]
    stopping = [task for task, _, _ in in_state(job, seen, Stopping)]
    if running or stopping:
        names = ", ".join(sorted({task.name for task, _ in running} | {task.name for task in stopping}))
        message = "; ".join(filter(None, (f"stopping {names}, with a checkpoint", held(job, seen))))
        situation = Situation(Phase.SUSPENDED, "Suspending", message)
        actions = tuple(Stop(task, n) for task, n in running)
        return say(job, seen, now, situation, actions=actions, after=SOON)
    message = "suspended; set spec.suspend to false to go on"
    return say(job, seen, now, Situation(Phase.SUSPENDED, "Suspended", message, Stance.RESTING))


def tasks_are_to_run(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Start what can start, and say what is under way."""
    return start(job, seen, now)


def start(job: Job, seen: Observed, now: datetime) -> Step:
    """Start the absent tasks whose back-off is over, and look how they fare; look again when the next one's is."""
    actions: list[Action] = []
    waits: list[timedelta] = []
    retried: list[str] = []
    for task, n, _ in in_state(job, seen, Absent):
        verdict = verdict_on(job, task)
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
    if actions or any(in_state(job, seen, Stopping)):
        waits.append(SOON)
    situation = underway(job, seen)
    if retried and not actions and not any(in_state(job, seen, Active)):
        situation = Situation(situation.phase, "BackOff", "; ".join(retried))
    return say(job, seen, now, situation, actions=tuple(actions), after=min(waits, default=None))


def verdict_on(job: Job, task: Task) -> GiveUp | Rest | Again | None:
    """What follows the task's last ended attempt; None where there is none, or it succeeded."""
    attempts = ended(job.status, task)
    if not attempts or attempts[-1].outcome == Outcome.SUCCEEDED:
        return None
    older = sum(a.count for a in job.status.older_attempts if task.is_of(a) and a.outcome in COUNTED)
    return answer(attempts, job.spec.retry, older)
