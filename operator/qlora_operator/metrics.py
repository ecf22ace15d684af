"""Prometheus: what the operator tells of its jobs and of itself.

Series of one job come from a small book that each pass keeps up, so that they end with the job; what is counted is
counted once, when a status that records it has been written. docs/metrics.md is made from `SERIES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import prometheus_client as prometheus
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qlora_api.exchange import Stage
from qlora_api.v1alpha1 import Attempt, JobStatus, Phase
from qlora_operator.cluster import ApiError
from qlora_operator.events import ended_between
from qlora_operator.lifecycle.answers import Outcome
from qlora_operator.lifecycle.standing import FINISHED
from qlora_operator.sizing.memory import CONTEXT
from qlora_operator.workqueue import Key

# No series beside each counter that says when it began: the process' start time is among the series.
prometheus.disable_created_metrics()

MINUTE, HOUR, DAY = 60, 3600, 86400

#: From one API call to a server that hardly answers.
PASS_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
#: From an inspection's seconds to a training's days.
STAGE_BUCKETS = (
    *(10, 30, MINUTE, 2 * MINUTE, 5 * MINUTE, 10 * MINUTE, 30 * MINUTE),
    *(HOUR, 2 * HOUR, 4 * HOUR, 8 * HOUR, DAY, 2 * DAY, 4 * DAY, 7 * DAY),
)


@dataclass(frozen=True)
class Series:
    """A metric as documented: name, type, labels, and what it says."""

    name: str
    kind: type[prometheus.Gauge | prometheus.Counter | prometheus.Histogram]
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = field(default=())

    def register(self, registry: prometheus.CollectorRegistry) -> Any:
        """The metric itself, in `registry`."""
        more: dict[str, Any] = {"buckets": self.buckets} if self.buckets else {}
        return self.kind(self.name, self.help, self.labels, registry=registry, **more)


OF_A_JOB = ("namespace", "qlorajob")

JOBS = Series("qlora_jobs", prometheus.Gauge, ("phase",), "Jobs, by the phase they are in.")
JOB_PHASE = Series(
    "qlora_job_phase",
    prometheus.Gauge,
    (*OF_A_JOB, "phase"),
    "1 for the phase that the job is in, until it is deleted.",
)
PROGRESS = Series(
    "qlora_job_progress_ratio",
    prometheus.Gauge,
    OF_A_JOB,
    "How far the job is, 0 to 1, as in status.progress.percent. Ends when the job has finished.",
)
VRAM = Series(
    "qlora_vram_bytes",
    prometheus.Gauge,
    (*OF_A_JOB, "kind"),
    "Memory of one GPU at the peak: predicted by the plan, and measured once trained. Ends when the job is deleted.",
)
VRAM_RATIO = Series(
    "qlora_vram_measured_ratio",
    prometheus.Gauge,
    OF_A_JOB,
    "Memory that PyTorch had reserved on a GPU at the training's peak, over what was planned for it (the CUDA context "
    "left out on both sides): above 1 the plan was too low. Ends when the job is deleted.",
)
STAGE_DURATION = Series(
    "qlora_stage_duration_seconds",
    prometheus.Histogram,
    ("stage",),
    "How long the attempts of a stage ran, from their container's start to its end.",
    STAGE_BUCKETS,
)
ATTEMPTS = Series(
    "qlora_attempts_total",
    prometheus.Counter,
    ("stage", "outcome"),
    "Attempts of a stage that ended, by their outcome in status.attempts.",
)
GPU_SECONDS = Series(
    "qlora_gpu_seconds_total",
    prometheus.Counter,
    ("product",),
    "GPUs × seconds that trainings have held, added as they end, by the GPUs' product; as in status.usage.",
)
PASSES = Series(
    "qlora_reconcile_duration_seconds",
    prometheus.Histogram,
    (),
    "How long one pass over one job took.",
    PASS_BUCKETS,
)
ERRORS = Series(
    "qlora_reconcile_errors_total",
    prometheus.Counter,
    ("reason",),
    "Passes that failed: the API server's status code, NoAnswer, or the exception.",
)
QUEUE_DEPTH = Series("qlora_workqueue_depth", prometheus.Gauge, (), "Jobs that wait for a free worker of the operator.")
BACKING_OFF = Series(
    "qlora_workqueue_backing_off",
    prometheus.Gauge,
    (),
    "Jobs whose last pass failed: they are tried again, ever later.",
)
RETRIES = Series(
    "qlora_workqueue_retries_total", prometheus.Counter, (), "Passes put off because the one before failed."
)
LEADER = Series("qlora_leader", prometheus.Gauge, (), "1 in the replica of the operator that acts, 0 in the others.")

#: Every series of the operator, in the order of the docs.
SERIES = (
    *(JOBS, JOB_PHASE, PROGRESS, VRAM, VRAM_RATIO, STAGE_DURATION, ATTEMPTS, GPU_SECONDS),
    *(PASSES, ERRORS, QUEUE_DEPTH, BACKING_OFF, RETRIES, LEADER),
)


@dataclass(frozen=True)
class Entry:
    """What the metrics say of one job."""

    phase: str
    progress_ratio: float | None = None
    vram_bytes: Mapping[str, int] = field(default_factory=dict)
    vram_ratio: float | None = None


def entry(status: Mapping[str, Any]) -> Entry:
    """From a status as the API server has it, of whatever version: what is not there is not said. Pure."""
    phase = status.get("phase") or Phase.PENDING
    percent = status.get("progress", {}).get("percent")
    plan = status.get("plan", {})
    memory = plan.get("memory", {}) if plan.get("gpus") else {}
    vram = {"predicted": memory.get("totalBytes"), "measured": memory.get("measuredBytes")}
    return Entry(
        phase=str(phase),
        progress_ratio=None if percent is None or phase in FINISHED else percent / 100,
        vram_bytes={kind: value for kind, value in vram.items() if value is not None},
        vram_ratio=_ratio(memory),
    )


def _ratio(memory: Mapping[str, Any]) -> float | None:
    """What was measured over what was predicted of the same: the allocator knows nothing of the context."""
    context = sum(item["bytes"] for item in memory.get("items", ()) if item["name"] == CONTEXT)
    predicted, measured = memory.get("totalBytes", 0) - context, memory.get("measuredBytes")
    return measured / predicted if measured is not None and predicted > 0 else None


class Book(Collector):
    """The jobs there are, and what is said of each; read anew at each scrape."""

    def __init__(self) -> None:
        self.jobs: dict[Key, Entry] = {}

    def collect(self) -> Iterator[Metric]:
        families = (_family(series) for series in (JOBS, JOB_PHASE, PROGRESS, VRAM, VRAM_RATIO))
        jobs, phases, progress, vram, ratio = families
        count = dict.fromkeys(map(str, Phase), 0)
        for key, said in self.jobs.items():
            count[said.phase] = count.get(said.phase, 0) + 1
            phases.add_metric([*key, said.phase], 1)
            if said.progress_ratio is not None:
                progress.add_metric(key, said.progress_ratio)
            for kind, size in said.vram_bytes.items():
                vram.add_metric([*key, kind], size)
            if said.vram_ratio is not None:
                ratio.add_metric(key, said.vram_ratio)
        for phase, n in count.items():
            jobs.add_metric([phase], n)
        yield from (jobs, phases, progress, vram, ratio)


def _family(series: Series) -> GaugeMetricFamily:
    return GaugeMetricFamily(series.name, series.help, labels=series.labels)


class Metrics:
    """All of the operator's series, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self.registry)
        self._book = Book()
        self.registry.register(self._book)
        self._stage_duration = STAGE_DURATION.register(self.registry)
        self._attempts = ATTEMPTS.register(self.registry)
        self._gpu_seconds = GPU_SECONDS.register(self.registry)
        self._passes = PASSES.register(self.registry)
        self._errors = ERRORS.register(self.registry)
        self._depth = QUEUE_DEPTH.register(self.registry)
        self._backing_off = BACKING_OFF.register(self.registry)
        self._retries = RETRIES.register(self.registry)
        self._leader = LEADER.register(self.registry)
        # From 0 on: the first end of its kind is an increase, too.
        for stage in Stage:
            self._stage_duration.labels(stage)
            for outcome in Outcome:
                self._attempts.labels(stage, outcome)

    # --- the jobs ---

    def observe(self, key: Key, status: Mapping[str, Any]) -> None:
        """The job's status, as just read or written."""
        self._book.jobs[key] = entry(status)
        if (plan := status.get("plan", {})).get("gpus"):
            self._gpu_seconds.labels(plan["flavour"])  # from 0 on

    def forget(self, key: Key) -> None:
        """The job is gone."""
        self._book.jobs.pop(key, None)

    def listed(self, jobs: Iterable[Mapping[str, Any]]) -> None:
        """All jobs there are, as listed. Those that are known stay as they are: a pass has seen them later."""
        there = {
            (job["metadata"]["namespace"], job["metadata"]["name"]): job
            for job in jobs
            if not job["metadata"].get("deletionTimestamp")
        }
        for key in self._book.jobs.keys() - there.keys():
            self.forget(key)
        for key in there.keys() - self._book.jobs.keys():
            self.observe(key, there[key].get("status", {}))

    def recorded(self, before: JobStatus, after: JobStatus) -> None:
        """`after` was written in the place of `before`: the attempts whose end it records are counted, once, and what
        the job has used since."""
        for attempt in ended_between(before, after):
            self._attempts.labels(attempt.stage, attempt.outcome).inc()
            if (seconds := ran_seconds(attempt)) is not None:
                self._stage_duration.labels(attempt.stage).observe(seconds)
        if before.plan is not None and (held := gpu_seconds(after) - gpu_seconds(before)) > 0:
            self._gpu_seconds.labels(before.plan.flavour).inc(held)

    # --- the operator itself ---

    def passed(self, seconds: float, error: Exception | None) -> None:
        """A pass over a job took `seconds`, and failed with `error` if there is one."""
        self._passes.observe(seconds)
        if error is not None:
            self._errors.labels(reason(error)).inc()
            self._retries.inc()

    def queue(self, waiting: int, backing_off: int) -> None:
        """How many jobs wait for a worker, and how many for another try after a failure."""
        self._depth.set(waiting)
        self._backing_off.set(backing_off)

    def set_leader(self, leads: bool) -> None:
        """Whether this replica is the one that acts."""
        self._leader.set(int(leads))

    def exposition(self) -> bytes:
        """All series, in Prometheus' text format (`CONTENT_TYPE`)."""
        return prometheus.generate_latest(self.registry)


CONTENT_TYPE = prometheus.CONTENT_TYPE_PLAIN_0_0_4


def reason(error: Exception) -> str:
    """The label of a failed pass: few values, whatever goes wrong. Pure."""
    if isinstance(error, ApiError):
        return str(error.code) if error.code else "NoAnswer"
    return type(error).__name__


def ran_seconds(attempt: Attempt) -> float | None:
    """How long an ended attempt ran; None where its start is not known. Pure."""
    if attempt.started is None or attempt.ended is None:
        return None
    return max(0.0, (attempt.ended - attempt.started).total_seconds())


def gpu_seconds(status: JobStatus) -> int:
    """What the job has used of GPUs. Pure."""
    return status.usage.gpu_seconds if status.usage else 0
