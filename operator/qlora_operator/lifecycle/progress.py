"""How far a job is: the tasks that are done, and within the training what its trainer reports. Pure."""

from __future__ import annotations

from qlora_api.exchange import ProgressName, Stage
from qlora_api.v1alpha1 import JobSpec, JobStatus, Progress
from qlora_operator.lifecycle.observed import Active, Job, Observed, Reported
from qlora_operator.lifecycle.tasks import TRAIN, current, ended, is_done, tasks

#: What each stage counts in `percent`: training takes most of a job's time.
WEIGHT = {Stage.INSPECT: 1, Stage.TRAIN: 16, Stage.MERGE: 2, Stage.PUBLISH: 1}


def percent(spec: JobSpec, status: JobStatus, trained: float = 0.0) -> int:
    """Share of the tasks that is done, weighted by `WEIGHT`. `trained` is the share of a training under way, 0 to 1."""
    todo = tasks(spec)
    done = sum(WEIGHT[task.stage] for task in todo if is_done(status, task))
    if not is_done(status, TRAIN):
        done += WEIGHT[Stage.TRAIN] * trained
    return int(100 * done / sum(WEIGHT[task.stage] for task in todo))


def progress(job: Job, seen: Observed) -> Progress:
    """The job's progress, with what the trainer of the attempt under way has reported."""
    known = job.status.progress or Progress()
    report = seen.reported
    if report is not None and _is_of_the_attempt_under_way(report, job, seen):
        known = _with_report(known, report)
    share = known.step / known.steps if known.step and known.steps else 0.0
    return known.model_copy(update={"percent": percent(job.spec, job.status, min(1.0, share))})


def furthest_step(job: Job, seen: Observed, attempt: str) -> int | None:
    """The furthest step that the training is known to have come to, when its `attempt` has ended: an attempt goes on
    from a checkpoint, which is behind the end of the one before."""
    known = [a.step for a in ended(job.status, TRAIN)]
    if job.status.progress:
        known.append(job.status.progress.step)
    if seen.reported is not None and seen.reported.attempt == attempt:
        known.append(_whole(seen.reported.numbers.get(ProgressName.STEP)))
    return max((step for step in known if step is not None), default=None)


def _is_of_the_attempt_under_way(report: Reported, job: Job, seen: Observed) -> bool:
    names = {task.job_name(job.metadata.name, n) for task, n in current(job.spec, job.status) if task == TRAIN}
    return report.attempt in names and isinstance(seen.attempts.get(report.attempt), Active)


def _with_report(known: Progress, report: Reported) -> Progress:
    """A trainer that names no steps (a foreign image) is taken by its percentage."""
    said = report.numbers
    steps = _whole(said.get(ProgressName.STEPS)) or known.steps
    step = _whole(said.get(ProgressName.STEP))
    if step is None and report.percent is not None and steps:
        step = steps * report.percent // 100
    update = {
        "step": step,
        "steps": steps,
        "epoch": _rounded(said.get(ProgressName.EPOCH), 2),
        "loss": _rounded(said.get(ProgressName.LOSS), 4),
        "eval_loss": _rounded(said.get(ProgressName.EVAL_LOSS), 4),
        "tokens_per_second": _whole(said.get(ProgressName.TOKENS_PER_SECOND)),
        "mfu": _rounded(said.get(ProgressName.MFU), 3),
        "remaining": None if report.remaining_seconds is None else in_short(report.remaining_seconds),
        "last_report_time": report.received.replace(microsecond=0),
    }
    return known.model_copy(update={name: value for name, value in update.items() if value is not None})


def _whole(number: float | None) -> int | None:
    return None if number is None else round(number)


def _rounded(number: float | None, digits: int) -> float | None:
    return None if number is None else round(number, digits)


def in_short(seconds: int) -> str:
    """A span of time in its two largest units, such as 3h05m."""
    if seconds < 60:
        return f"{seconds}s"
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if hours < 1:
        return f"{minutes}m{seconds % 60:02d}s" if minutes < 10 else f"{minutes}m"
    if days < 1:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{days}d{hours % 24:02d}h"
