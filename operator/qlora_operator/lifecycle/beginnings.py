"""Whether a training has begun: then its recipe is bound."""

from __future__ import annotations

from qlora_api.exchange import Recipe, Stage
from qlora_operator.lifecycle.observed import Job


def begun(job: Job) -> Recipe | None:
    """The recipe of a training that may have left checkpoints: it was at work once. (On a CPU nothing counts that.)"""
    status = job.status
    if status.plan is None:
        return None
    attempts = any(attempt.stage == Stage.TRAIN for attempt in status.attempts)
    ran = bool(status.usage and status.usage.gpu_seconds) or bool(status.progress and status.progress.step)
    on_cpu = not status.plan.gpus and status.work_volume is not None
    return status.plan.recipe if attempts or ran or on_cpu else None
