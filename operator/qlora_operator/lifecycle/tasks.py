"""What a job has to run, in which order: the stages its spec asks for, as a table."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_api.exchange import ArtifactName, Stage
from qlora_api.v1alpha1 import Attempt, JobSpec, JobStatus, OlderAttempts


@dataclass(frozen=True)
class Task:
    """One thing to run: a stage, for `publish` with the artifact. Started when all of `needs` have succeeded."""

    stage: Stage
    artifact: ArtifactName | None = None
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.stage if self.artifact is None else f"{self.stage}-{self.artifact}"

    def is_of(self, ends: Attempt | OlderAttempts) -> bool:
        """Whether `ends` speaks of this task."""
        return (ends.stage, ends.artifact) == (self.stage, self.artifact)

    def job_name(self, job: str, attempt: int) -> str:
        """Name of the batch/v1 Job, which is also its order's: at most 63 characters for jobs of at most 40."""
        return f"{job}-{self.name}-{attempt}"


INSPECT = Task(Stage.INSPECT)
TRAIN = Task(Stage.TRAIN, needs=("inspect",))
MERGE = Task(Stage.MERGE, needs=("train",))
#: Which task makes an artifact.
MADE_BY: dict[ArtifactName, Task] = {"adapter": TRAIN, "merged": MERGE}


def tasks(spec: JobSpec) -> tuple[Task, ...]:
    """The tasks of a job: what makes each artifact, and its publication as soon as it is made."""
    made = [MADE_BY[artifact] for artifact in MADE_BY if artifact in spec.output.formats]
    makers = (INSPECT, TRAIN, *(task for task in made if task is not TRAIN))
    publications = (
        Task(Stage.PUBLISH, artifact, needs=(MADE_BY[artifact].name,))
        for artifact in MADE_BY
        if artifact in spec.output.formats
    )
    return (*makers, *publications)


def ended(status: JobStatus, task: Task) -> list[Attempt]:
    """The task's attempts that are over, in order, as far as they are listed."""
    return [a for a in status.attempts if task.is_of(a) and a.outcome]


def is_done(status: JobStatus, task: Task) -> bool:
    """Whether an attempt of the task has succeeded and its result is recorded."""
    return any(attempt.outcome == "Succeeded" for attempt in ended(status, task))


def next_number(status: JobStatus, task: Task) -> int:
    """The number of the task's attempt that runs, or is to: not all that have ended are listed."""
    return 1 + max((attempt.number for attempt in ended(status, task)), default=0)


def current(spec: JobSpec, status: JobStatus) -> list[tuple[Task, int]]:
    """The tasks that may run now, each with the number of its attempt (from 1)."""
    todo = tasks(spec)
    done = {task.name for task in todo if is_done(status, task)}
    return [
        (task, next_number(status, task))
        for task in todo
        if task.name not in done and all(need in done for need in task.needs)
    ]
