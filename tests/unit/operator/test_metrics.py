"""Metrics: what a dashboard shows is what the statuses say, nothing is counted twice, and series end with their job."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from qlora_api.exchange import Stage
from qlora_api.v1alpha1 import JobStatus, Phase, Usage
from qlora_operator.cluster import ApiError
from qlora_operator.lifecycle.answers import Outcome
from qlora_operator.lifecycle.observed import Job
from qlora_operator.lifecycle.policies import next_step
from qlora_operator.lifecycle.tasks import INSPECT, TRAIN
from qlora_operator.metrics import OF_A_JOB, SERIES, Metrics
from qlora_operator.probes import Probes
from qlora_operator.settings import Settings
from qlora_operator.sizing.memory import CONTEXT
from qlora_operator.workqueue import Key, WorkQueue
from tests.unit.operator import given
from tests.unit.operator.given import GIB, NOW

A: Key = ("team-a", "one")
B: Key = ("team-b", "two")


def samples(metrics: Metrics) -> dict[str, dict[tuple[str, ...], float]]:
    """What a scrape would see: by the name of the sample, then by its labels' values in the order of their names."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def raw(key: Key, status: Mapping[str, Any] | None = None, **metadata: Any) -> dict[str, Any]:
    """A job as the API server lists it."""
    return {"metadata": {"namespace": key[0], "name": key[1], **metadata}} | ({"status": status} if status else {})


TRAINED = given.history(given.job(), INSPECT, TRAIN).status
PLAN = {
    "gpus": 2,
    "flavour": "NVIDIA-L40S",
    "memory": {
        "items": [{"name": "base weights", "bytes": 3 * GIB}, {"name": CONTEXT, "bytes": GIB}],
        "totalBytes": 4 * GIB,
        "measuredBytes": 3 * GIB,
    },
}


def test_every_series_is_there_from_the_first_scrape_on_and_as_documented() -> None:
    metrics = Metrics()
    metrics.observe(A, {"phase": "Training", "progress": {"percent": 20}, "plan": PLAN})
    metrics.passed(0.1, ApiError("get", 500, "oops"))
    families = {family.name: family for family in text_string_to_metric_families(metrics.exposition().decode())}
    for series in SERIES:
        family = families.pop(series.name.removesuffix("_total"))
        assert (family.documentation, family.type) == (series.help, series.kind.__name__.lower())
        assert family.samples, series.name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(series.labels), series.name
    assert all(name.startswith(("process_", "python_")) for name in families), "a series that is not documented"


def test_jobs_are_counted_by_phase_and_no_phase_is_missing() -> None:
    metrics = Metrics()
    assert samples(metrics)["qlora_jobs"] == {(phase,): 0 for phase in Phase}
    metrics.observe(A, {"phase": "Training"})
    metrics.observe(B, {"observedGeneration": -1})  # not taken up yet
    jobs = samples(metrics)["qlora_jobs"]
    assert {phase for phase, count in jobs.items() if count} == {("Training",), ("Pending",)}
    metrics.observe(A, {"phase": "Merging"})
    found = samples(metrics)
    assert (found["qlora_jobs"]["Training",], found["qlora_jobs"]["Merging",]) == (0, 1)
    assert found["qlora_job_phase"] == {("team-a", "Merging", "one"): 1, ("team-b", "Pending", "two"): 1}


def test_a_status_of_the_policies_is_read_as_they_meant_it() -> None:
    """The metrics read what the server stores, not the models: this is where the two meet."""
    job = given.history(given.job(), INSPECT)
    status = next_step(job, given.seen(job, {"train-1": given.succeeded(TRAIN)}), NOW).status
    metrics = Metrics()
    metrics.observe(A, status.to_api())
    found = samples(metrics)
    assert status.phase is not None and status.progress is not None and status.plan is not None
    assert found["qlora_jobs"][status.phase,] == 1
    assert found["qlora_job_progress_ratio"] == {A: status.progress.percent / 100}
    assert 0 < status.progress.percent < 100
    assert found["qlora_vram_bytes"] == {
        ("predicted", *A): status.plan.memory.total_bytes,
        ("measured", *A): status.plan.memory.measured_bytes,
    }


def test_on_the_cpu_there_is_no_gpu_memory() -> None:
    metrics = Metrics()
    metrics.observe(A, {"phase": "Training", "plan": PLAN | {"gpus": 0, "flavour": "cpu"}})
    assert "qlora_vram_bytes" not in samples(metrics)
    assert "qlora_gpu_seconds_total" not in samples(metrics)


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_progress_ends_when_the_job_has_finished_and_all_else_when_it_is_deleted(phase: str) -> None:
    metrics = Metrics()
    for key in (A, B):
        metrics.observe(key, {"phase": "Training", "progress": {"percent": 40}, "plan": PLAN})
    metrics.observe(A, {"phase": phase, "progress": {"percent": 100}, "plan": PLAN})
    found = samples(metrics)
    assert set(found["qlora_job_progress_ratio"]) == {B}
    assert set(found["qlora_vram_bytes"]) == {(kind, *key) for kind in ("predicted", "measured") for key in (A, B)}
    metrics.forget(A)
    metrics.forget(A)  # a second pass finds it gone, too
    found = samples(metrics)
    for series in SERIES:
        if set(OF_A_JOB) <= set(series.labels):
            assert found[series.name], series.name
            assert not [labels for labels in found[series.name] if A[1] in labels], series.name


def test_a_listing_adds_the_unknown_drops_those_that_are_gone_and_overrules_no_pass() -> None:
    metrics = Metrics()
    metrics.observe(A, {"phase": "Training"})
    old, new = raw(A, {"phase": "Planning"}), raw(B, {"phase": "Succeeded"})
    going = raw(("team-a", "going"), {"phase": "Training"}, deletionTimestamp="2026-09-01T12:00:00Z")
    metrics.listed([old, new, going, raw(("team-a", "fresh"))])
    assert samples(metrics)["qlora_job_phase"] == {
        ("team-a", "Training", "one"): 1,
        ("team-b", "Succeeded", "two"): 1,
        ("team-a", "Pending", "fresh"): 1,
    }
    metrics.listed([new])
    assert samples(metrics)["qlora_job_phase"] == {("team-b", "Succeeded", "two"): 1}


# --- what is counted ---


def ended(stage: str = "train", outcome: str = "Succeeded", minutes: float | None = 5, n: int = 1) -> Any:
    task = {"train": TRAIN, "inspect": INSPECT}[stage]
    started = None if minutes is None else NOW - timedelta(minutes=minutes)
    return given.attempt(task, n, outcome, started=started)


def after_one(*attempts: Any, status: JobStatus = TRAINED) -> Metrics:
    metrics = Metrics()
    before = status.model_copy(update={"attempts": ()})
    metrics.recorded(before, before.model_copy(update={"attempts": attempts}))
    return metrics


def test_an_attempt_is_counted_once_when_its_end_is_recorded() -> None:
    running = given.attempt(TRAIN, 1, "", started=NOW - timedelta(minutes=5)).model_copy(update={"outcome": None})
    crashed = ended(n=2, outcome="Crashed", minutes=1)
    statuses = [
        TRAINED.model_copy(update={"attempts": attempts, "usage": usage})
        for attempts, usage in (
            ((), None),
            ((running,), None),
            ((ended(),), Usage(gpu_seconds=300)),
            ((ended(), crashed), Usage(gpu_seconds=360)),
        )
    ]
    metrics = Metrics()
    for before, after in zip(statuses, [*statuses[1:], statuses[-1]], strict=True):
        metrics.recorded(before, JobStatus.model_validate(after.to_api()))  # as read back from the server, too
    found = samples(metrics)
    counted = {labels: n for labels, n in found["qlora_attempts_total"].items() if n}
    assert counted == {("Succeeded", "train"): 1, ("Crashed", "train"): 1}
    assert found["qlora_stage_duration_seconds_count"]["train",] == 2
    assert found["qlora_stage_duration_seconds_sum"]["train",] == 360
    assert found["qlora_gpu_seconds_total"] == {("NVIDIA-L40S",): 360}


def test_gpu_seconds_are_those_of_the_status_under_the_plan_that_the_training_ran_by() -> None:
    """Also those of a run without an end of its own: it was suspended, and is to be planned anew."""
    of_four = given.plan(given.job(), gpus=4, flavour="NVIDIA-A10")
    running = given.attempt(TRAIN, 1, "", started=NOW - timedelta(minutes=5)).model_copy(update={"outcome": None})
    job = given.history(given.job({"suspend": True}), INSPECT, plan=of_four)
    before = job.status.model_copy(update={"attempts": (*job.status.attempts, running)})
    suspended = Job(job.metadata, job.spec, before)
    metrics = Metrics()
    metrics.recorded(before, next_step(suspended, given.seen(suspended), NOW).status)
    assert samples(metrics)["qlora_gpu_seconds_total"] == {("NVIDIA-A10",): 4 * 300}


def test_an_attempt_that_never_started_has_an_outcome_and_no_duration() -> None:
    found = samples(after_one(ended(outcome="Interrupted", minutes=None)))
    assert found["qlora_attempts_total"]["Interrupted", "train"] == 1
    assert found["qlora_stage_duration_seconds_count"]["train",] == 0


def test_the_first_of_its_kind_is_an_increase_too() -> None:
    """A counter that appears with 1 has not increased, to Prometheus: every one is there with 0 before."""
    metrics = Metrics()
    found = samples(metrics)
    assert found["qlora_attempts_total"] == {(outcome, stage): 0 for outcome in Outcome for stage in Stage}
    assert found["qlora_stage_duration_seconds_count"] == {(stage,): 0 for stage in Stage}
    metrics.observe(A, {"phase": "Scheduling", "plan": PLAN})
    assert samples(metrics)["qlora_gpu_seconds_total"] == {("NVIDIA-L40S",): 0}


# --- the operator itself ---


def test_failed_passes_are_counted_by_reason_and_seen_to_back_off() -> None:
    metrics = Metrics()
    queue = WorkQueue(metrics)
    failures: dict[Key, list[Exception]] = {
        A: [ApiError("apply", 409, "older"), ApiError("get", 0, "no answer"), ApiError("get", 0, "no answer")],
        B: [RuntimeError("boom")],
    }
    passes: list[Key] = []

    async def reconcile(key: Key) -> timedelta | None:
        passes.append(key)
        if failures[key]:
            raise failures[key].pop(0)
        return None

    def numbers() -> tuple[float, ...]:
        found = samples(metrics)
        names = ("workqueue_depth", "workqueue_backing_off", "workqueue_retries_total")
        return tuple(found[f"qlora_{name}"][()] for name in names)

    async def story() -> None:
        queue.add(A)
        queue.add(B)
        assert numbers() == (2, 0, 0)
        worker = asyncio.create_task(queue.work(reconcile))
        for n, expected in ((2, (0, 2, 2)), (3, (0, 2, 3)), (4, (0, 2, 4)), (5, (0, 1, 4)), (6, (0, 0, 4))):
            while len(passes) < n:
                await asyncio.sleep(0)
            assert numbers() == expected, n
            queue.add(A if n < 5 else B)  # sooner than its back-off says
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)

    asyncio.run(asyncio.wait_for(story(), timeout=10))
    found = samples(metrics)
    assert found["qlora_reconcile_errors_total"] == {("409",): 1, ("NoAnswer",): 2, ("RuntimeError",): 1}
    assert found["qlora_reconcile_duration_seconds_count"][()] == 6


def test_a_replica_says_whether_it_leads() -> None:
    metrics = Metrics()
    said = [samples(metrics)["qlora_leader"][()]]
    for leads in (True, False):
        metrics.set_leader(leads)
        said.append(samples(metrics)["qlora_leader"][()])
    assert said == [0, 1, 0]


def test_two_operators_in_one_process_count_apart() -> None:
    one, two = Metrics(), Metrics()
    one.observe(A, {"phase": "Training"})
    one.passed(1, None)
    assert "qlora_job_phase" not in samples(two)
    assert samples(two)["qlora_reconcile_duration_seconds_count"][()] == 0


def test_they_are_served_beside_the_probes() -> None:
    metrics = Metrics()
    metrics.observe(A, {"phase": "Training"})
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    async def story() -> tuple[str, str]:
        serving = asyncio.create_task(Probes(Settings(trainer_image="t", probe_port=port), metrics).serve())
        async with aiohttp.ClientSession() as session:
            while True:
                try:
                    async with session.get(f"http://127.0.0.1:{port}/metrics") as answer:
                        found = answer.headers["Content-Type"], await answer.text()
                    break
                except aiohttp.ClientConnectorError:
                    await asyncio.sleep(0)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        return found

    kind, text = asyncio.run(asyncio.wait_for(story(), timeout=10))
    assert kind == "text/plain; version=0.0.4; charset=utf-8"
    assert 'qlora_job_phase{namespace="team-a",phase="Training",qlorajob="one"} 1.0' in text
