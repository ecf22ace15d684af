"""What a decision is: actions on the cluster, the status to write, and when to look again."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from qlora_api.v1alpha1 import JobStatus
from qlora_operator.lifecycle.tasks import Task


@dataclass(frozen=True)
class Start:
    """Create the attempt's order and Job."""

    task: Task
    attempt: int

    def describe(self) -> str:
        return f"start {self.task.name}, attempt {self.attempt}"


@dataclass(frozen=True)
class Stop:
    """Delete the attempt's Job; its pod gets SIGTERM and its grace period."""

    task: Task
    attempt: int

    def describe(self) -> str:
        return f"stop {self.task.name}, attempt {self.attempt}"


@dataclass(frozen=True)
class Remove:
    """Delete the attempt's Job and its order."""

    task: Task
    attempt: int

    def describe(self) -> str:
        return f"remove {self.task.name}, attempt {self.attempt}"


@dataclass(frozen=True)
class CreateWorkVolume:
    """Claim the work volume, as large as the plan says."""

    def describe(self) -> str:
        return "claim the work volume"


@dataclass(frozen=True)
class DeleteWorkVolume:
    """Give the work volume back."""

    def describe(self) -> str:
        return "delete the work volume"


Action = Start | Stop | Remove | CreateWorkVolume | DeleteWorkVolume


@dataclass(frozen=True)
class Step:
    """Do the `actions` in order, then write `status`, then look again after `after` (None: when something changes)."""

    status: JobStatus
    actions: tuple[Action, ...] = ()
    after: timedelta | None = None
