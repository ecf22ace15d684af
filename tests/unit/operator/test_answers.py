"""What follows an ended attempt: nobody's GPU hours are spent on what cannot succeed, nothing curable is given up."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given as for_all
from hypothesis import strategies as st

from qlora_api.exchange import ExitCode, Inspection, Recipe
from qlora_api.v1alpha1 import Attempt, JobSpec, JobStatus, Plan, Retry
from qlora_operator.lifecycle.answers import (
    ANSWERS,
    COUNTED,
    FOR_GOOD,
    Again,
    GiveUp,
    Outcome,
    Rest,
    answer,
    outcome,
)
from qlora_operator.lifecycle.history import condensed
from qlora_operator.lifecycle.observed import Ended
from qlora_operator.lifecycle.tasks import Task, ended, next_number, tasks
from qlora_operator.placement.inventory import Inventory
from qlora_operator.planner import (
    Installation,
    Smaller,
    Unfit,
    after_out_of_memory,
    recipes,
    resized,
    with_less_memory,
)
from tests.unit.operator import given
from tests.unit.operator.given import MERGE, TRAIN

OUTCOMES = [
    pytest.param(given.exited(10), "BadInput", id="bad input"),
    pytest.param(given.exited(11), "GateFailed", id="a gate failed"),
    pytest.param(given.exited(12), "Diverged", id="diverged"),
    pytest.param(given.exited(13), "OutOfMemory", id="GPU out of memory"),
    pytest.param(given.exited(14), "Interrupted", id="interrupted"),
    pytest.param(given.exited(15), "EnvironmentUnfit", id="environment unfit"),
    pytest.param(given.exited(1), "Crashed", id="a Python traceback"),
    pytest.param(given.exited(2), "Crashed", id="a usage error"),
    pytest.param(given.exited(16), "Stalled", id="no step for too long"),
    pytest.param(given.exited(17), "VolumeFull", id="no room on a volume"),
    pytest.param(Ended(False, exit_code=137, reason="OOMKilled"), "HostOutOfMemory", id="killed by the kernel"),
    pytest.param(Ended(False, exit_code=1, reason="OOMKilled"), "HostOutOfMemory", id="one of its processes was"),
    pytest.param(replace(given.exited(13), reason="OOMKilled"), "OutOfMemory", id="what it says itself goes before"),
    pytest.param(Ended(False, exit_code=137, reason="Error"), "Crashed", id="killed by somebody"),
    pytest.param(Ended(False, exit_code=137, reason="ContainerStatusUnknown"), "NodeLost", id="the node restarted"),
    pytest.param(Ended(False, exit_code=255, reason="Unknown"), "NodeLost", id="as containerd has it"),
    pytest.param(Ended(False, reason="NodeLost"), "NodeLost", id="the node is gone"),
    pytest.param(Ended(False, exit_code=128, reason="StartError"), "EnvironmentUnfit", id="could not be started"),
    pytest.param(Ended(False, reason="UnexpectedAdmissionError"), "EnvironmentUnfit", id="the kubelet refused it"),
    pytest.param(Ended(False, exit_code=143), "Crashed", id="SIGTERM not handled"),
    pytest.param(Ended(False, exit_code=0), "Crashed", id="exit 0 of a Job that failed all the same"),
    pytest.param(Ended(False, detail="Evicted"), "Crashed", id="a pod without a container's end"),
    pytest.param(Ended(False, pod_gone=True), "Interrupted", id="its pod was deleted: nobody's fault"),
    pytest.param(given.succeeded(TRAIN), "Succeeded", id="done"),
    pytest.param(Ended(True, exit_code=0, detail="no report"), "ResultLost", id="done without a report"),
    pytest.param(Ended(True, pod_gone=True), "ResultLost", id="done, and the pod is gone"),
    pytest.param(
        Ended(True, exit_code=0, report=given.report(TRAIN, failure="odd")), "ResultLost", id="done with a failure"
    ),
]


@pytest.mark.parametrize(("state", "expected"), OUTCOMES)
def test_every_way_to_end_has_an_outcome(state: Ended, expected: str) -> None:
    assert outcome(state) == expected


def test_every_exit_code_has_an_outcome_and_a_retry_iff_the_contract_says_so() -> None:
    for code in ExitCode:
        if code is ExitCode.SUCCEEDED:
            continue
        how = outcome(given.exited(code))
        assert how is not Outcome.CRASHED, code
        assert (how not in FOR_GOOD and not ANSWERS[how].rests) == code.retried, code


def failed(*outcomes: str, change: str | None = None, message: str | None = None) -> list[Attempt]:
    attempts = [given.attempt(TRAIN, n, how) for n, how in enumerate(outcomes, start=1)]
    attempts[-1] = attempts[-1].model_copy(update={"change": change, "message": message})
    return attempts


def seconds(n: float) -> Again:
    return Again(timedelta(seconds=n))


RETRY = Retry(max_restarts=3)
NEVER = Retry(max_restarts=0)
ANSWER: list[Any] = [
    # what happened, retry, what follows
    pytest.param(failed("BadInput"), RETRY, "BadInput", id="bad input never again"),
    pytest.param(failed("GateFailed"), RETRY, "GateFailed", id="a failed gate never again"),
    pytest.param(failed("Diverged"), RETRY, "Diverged", id="a divergence would repeat itself"),
    pytest.param(failed("VolumeFull"), RETRY, Rest("VolumeFull", "support-bot-train-1 found a volume full"),
                 id="a full volume stays full"),
    pytest.param(failed("VolumeFull", change="room"), NEVER, seconds(0), id="until somebody has made room"),
    pytest.param(failed("Interrupted"), NEVER, seconds(2), id="an interruption is nobody's fault"),
    pytest.param(failed(*["Interrupted"] * 3), RETRY, seconds(8), id="three in a row: not a busy loop"),
    pytest.param(failed(*["Interrupted"] * 50), NEVER, seconds(300), id="however often"),
    pytest.param(failed("Interrupted", "Crashed", "Interrupted"), RETRY, seconds(8), id="whatever lies between"),
    pytest.param(failed(*["Interrupted", "NodeLost"] * 20), NEVER, seconds(300), id="in turns, for ever"),
    pytest.param(failed("NodeLost"), NEVER, seconds(2), id="nor is a node's end"),
    pytest.param(failed("NodeLost", "NodeLost"), NEVER, seconds(4), id="twice"),
    pytest.param(failed("Crashed"), RETRY, seconds(10), id="first crash"),
    pytest.param(failed("Crashed", "Crashed"), RETRY, seconds(20), id="second crash"),
    pytest.param(failed("Crashed", "ResultLost", "EnvironmentUnfit"), RETRY, seconds(40), id="third failure"),
    pytest.param(failed("Stalled"), RETRY, seconds(10), id="a standstill is tried again"),
    pytest.param(failed("Stalled"), NEVER, "TooManyRestarts", id="and counts"),
    pytest.param(failed(*["Crashed"] * 4), RETRY, "TooManyRestarts", id="fourth: given up"),
    pytest.param(failed("Crashed", "Stalled", "EnvironmentUnfit", "ResultLost"), RETRY, "TooManyRestarts", id="mixed"),
    pytest.param(failed(*["Crashed"] * 6), Retry(max_restarts=100), seconds(300), id="the back-off has an end"),
    pytest.param(failed(*["Crashed"] * 100), Retry(max_restarts=100), seconds(300), id="after a hundred too"),
    pytest.param(failed("Crashed"), NEVER, "TooManyRestarts", id="no restarts allowed"),
    pytest.param(
        failed("Interrupted", "Crashed", "Interrupted", "Crashed"), RETRY, seconds(80), id="nor is a crash anything new"
    ),
    pytest.param(failed("OutOfMemory", "Crashed"), RETRY, seconds(10), id="nor does out of memory"),
    pytest.param(failed("OutOfMemory", change="8 → 4"), NEVER, seconds(0), id="with a change: at once"),
    pytest.param(failed("OutOfMemory"), RETRY, "OutOfMemory", id="nothing left to change"),
    pytest.param(failed("HostOutOfMemory", change="6 → 9 GiB"), NEVER, seconds(0), id="more host memory: at once"),
    pytest.param(failed("HostOutOfMemory"), RETRY, "HostOutOfMemory", id="no more to be had"),
]  # fmt: skip


BACK_OFF: list[Any] = [
    # how attempts ended and at which step, what follows
    pytest.param([("Interrupted", 40)], seconds(2), id="the first"),
    pytest.param([("Interrupted", 40), ("Interrupted", 41)], seconds(2), id="each a step further: as if the first"),
    pytest.param([("Interrupted", 40), ("Interrupted", 40)], seconds(4), id="no further"),
    pytest.param([("Crashed", None), ("NodeLost", None), ("Crashed", 7)], seconds(10), id="further than nothing"),
    pytest.param([("Crashed", 7), ("NodeLost", 7), ("Stalled", 7)], seconds(40), id="counted on from the furthest"),
    pytest.param([("Crashed", 7), ("Interrupted", 9), ("Crashed", 9)], seconds(20), id="from an interruption too"),
    pytest.param([("Crashed", 7), ("OutOfMemory", 9), ("Crashed", 9)], seconds(10), id="or from out of memory"),
]  # fmt: skip


@pytest.mark.parametrize(("ends", "expected"), BACK_OFF)
def test_the_back_off_grows_until_the_training_gets_further(
    ends: list[tuple[str, int | None]], expected: Again
) -> None:
    attempts = [given.attempt(TRAIN, n, how, step=step) for n, (how, step) in enumerate(ends, start=1)]
    assert answer(attempts, RETRY) == expected


@pytest.mark.parametrize(("attempts", "retry", "expected"), ANSWER)
def test_what_follows(attempts: list[Attempt], retry: Retry, expected: Again | Rest | str) -> None:
    verdict = answer(attempts, retry)
    if isinstance(expected, str):
        assert isinstance(verdict, GiveUp)
        assert verdict.reason == expected
    else:
        assert verdict == expected


def test_each_row_of_the_table_is_tested() -> None:
    ends = {param.values[0][-1].outcome for param in ANSWER}
    assert ends == set(ANSWERS) == set(Outcome) - {Outcome.SUCCEEDED}


MESSAGES = [
    (failed("BadInput", message="line 812: role"), ["support-bot-train-1 refused its input", "line 812: role"]),
    (failed("VolumeFull", message="20 GiB"), ["support-bot-train-1 found a volume full: 20 GiB"]),
    (
        failed(*["Crashed"] * 4, message="boom"),
        ["support-bot-train-4 crashed: boom", "restarted 3 times", "spec.retry.maxRestarts"],
    ),
]


@pytest.mark.parametrize(("attempts", "parts"), MESSAGES)
def test_a_user_reads_which_attempt_failed_why_and_what_to_do(attempts: list[Attempt], parts: list[str]) -> None:
    verdict = answer(attempts, RETRY)
    assert isinstance(verdict, GiveUp | Rest)
    assert [part for part in parts if part not in verdict.message] == []


@for_all(
    st.lists(
        st.sampled_from(sorted(Outcome)).filter(lambda how: how is not Outcome.SUCCEEDED), min_size=1, max_size=130
    ),
    st.integers(0, 100),
    st.sampled_from([None, "something"]),
)
def test_there_is_always_an_answer_and_restarts_are_bounded(how: list[Outcome], most: int, change: str | None) -> None:
    verdict = answer(failed(*how, change=change), Retry(max_restarts=most))
    if isinstance(verdict, Again):
        assert how[-1] not in COUNTED or sum(one in COUNTED for one in how) <= most
        assert how[-1] not in FOR_GOOD
        assert timedelta() <= verdict.delay <= timedelta(minutes=5)


# --- what is not listed any more ---

ENDS = st.tuples(
    st.sampled_from([TRAIN, MERGE]),
    st.sampled_from(["Interrupted", "Interrupted", "NodeLost", "Crashed", "OutOfMemory", "HostOutOfMemory"]),
    st.integers(0, 1),
)


@for_all(st.lists(ENDS, max_size=90), st.integers(0, 100))
def test_what_is_listed_no_longer_changes_no_answer(ends: list[tuple[Task, str, int]], most: int) -> None:
    """Recorded one by one, as they come, and held against a history in which nothing is left out."""
    retry, listed = Retry(max_restarts=most), JobStatus()
    all_of: dict[Task, list[Attempt]] = {TRAIN: [], MERGE: []}
    gone: list[str] = []
    for task, how, further in ends:
        before = all_of[task]
        step = (before[-1].step or 0) + further if before else further
        change = "less" if "Memory" in how else None
        attempt = given.attempt(task, next_number(listed, task), how, step=step, change=change)
        before.append(attempt)
        listed, older = condensed(listed.model_copy(update={"attempts": (*listed.attempts, attempt)}))
        gone += [one.job for one in older]
        counted = sum(a.count for a in listed.older_attempts if task.is_of(a) and a.outcome in COUNTED)
        assert answer(ended(listed, task), retry, counted) == answer(before, retry)
    assert Counter(gone).keys() | {a.job for a in listed.attempts} == {a.job for of in all_of.values() for a in of}
    assert len(gone) == len(set(gone)), "its children are deleted once"
    for task, everything in all_of.items():
        assert [a.number for a in everything] == list(range(1, len(everything) + 1))
        assert sum(a.change is None for a in ended(listed, task)) <= 11
        assert [a for a in ended(listed, task) if a.change] == [a for a in everything if a.change]
        totals = Counter(a.outcome for a in ended(listed, task))
        totals.update({a.outcome: a.count for a in listed.older_attempts if task.is_of(a)})
        assert totals == Counter(a.outcome for a in everything)


def test_a_history_without_end_stays_small() -> None:
    """etcd takes 1.5 MiB: long messages, in characters of three bytes."""
    status = JobStatus()
    for task in tasks(given.job({"output.formats": given.BOTH}).spec):
        for n in range(1, 500):
            ran = {"started": given.NOW - timedelta(seconds=3), "message": "…" * 1000, "step": n}
            attempt = given.attempt(task, n, ("Interrupted", "NodeLost")[n % 2], **ran)
            status, _ = condensed(status.model_copy(update={"attempts": (*status.attempts, attempt)}))
    assert len(json.dumps(status.to_api(), ensure_ascii=False).encode()) < 256 * 1024
    assert sum(older.count for older in status.older_attempts) + len(status.attempts) == 5 * 499
    assert {older.seconds for older in status.older_attempts} == {3 * 244}


# --- less GPU memory ---

HALVES = [
    # effective batch, micro-batch, the next
    (32, 8, 4),
    (32, 2, 1),
    (12, 6, 3),
    (12, 3, 1),
    (9, 9, 3),
    (15, 15, 5),
    (100, 25, 10),
    (7, 7, 1),
    (6, 4, 2),
]


@pytest.mark.parametrize(("effective", "size", "expected"), HALVES)
def test_half_the_micro_batch_keeps_the_effective_batch(effective: int, size: int, expected: int) -> None:
    plan = given.plan(given.job(), micro_batch_size=size, effective_batch_size=effective)

    after = lessened(given.job().spec, plan).plan

    assert after.micro_batch_size == expected
    assert after.micro_batch_size * after.gradient_accumulation == effective
    assert after.recipe == plan.recipe
    assert after.planned_for == plan.planned_for, "or the next pass would plan anew and undo it"
    assert after.memory.total_bytes == sum(item.bytes for item in after.memory.items)


def lessened(spec: JobSpec, plan: Plan) -> Smaller:
    smaller = with_less_memory(spec, plan, given.inspection())
    assert smaller is not None
    return smaller


HALVED = ["micro-batch 4 → 2, accumulation 8 → 16", "micro-batch 2 → 1, accumulation 16 → 32"]
LADDERS: list[Any] = [
    # what the spec says, whether activations are recomputed at first, what is changed from attempt to attempt
    pytest.param({}, True, [*HALVED, "offload none → activations"], id="left open"),
    pytest.param(
        {}, False, ["gradient checkpointing off → on", *HALVED, "offload none → activations"], id="kept by the plan"
    ),
    pytest.param(
        {"training.gradientCheckpointing": True}, True, [*HALVED, "offload none → activations"], id="asked for"
    ),
    pytest.param({"training.offload": "none"}, True, HALVED, id="no offload allowed"),
    pytest.param(
        {"training.gradientCheckpointing": False}, False, HALVED, id="to be kept: there is nothing to offload"
    ),
    pytest.param({"hardware.accelerator": "cpu"}, True, HALVED, id="on the CPU there is nowhere to offload to"),
]


@pytest.mark.parametrize(("edits", "recomputed", "expected"), LADDERS)
def test_the_way_down(edits: dict[str, Any], recomputed: bool, expected: list[str]) -> None:
    job, found = given.job(edits), given.inspection()
    [recipe, *_] = planned_recipes(job.spec, found)
    recipe = recipe.model_copy(update={"gradient_checkpointing": recomputed})
    plan = resized(given.plan(job, micro_batch_size=4), found, recipe, 4)
    changes: list[str] = []
    where = {"offload", "gradient_checkpointing"}
    while smaller := with_less_memory(job.spec, plan, found):
        changes.append(smaller.change)
        assert smaller.plan.memory.total_bytes < plan.memory.total_bytes, smaller.change
        assert smaller.plan.recipe.model_dump(exclude=where) == plan.recipe.model_dump(exclude=where)
        plan = smaller.plan
    assert changes == expected


def planned_recipes(spec: JobSpec, found: Inspection) -> list[Recipe]:
    allowed = recipes(spec, found.shape, max_length=found.max_length, loss=found.loss)
    assert not isinstance(allowed, Unfit)
    return allowed


def test_what_is_offloaded_needs_host_memory() -> None:
    job = given.job()
    plan = resized(given.plan(job), given.inspection(), given.recipe(), 1)
    smaller = lessened(job.spec, plan)
    assert smaller.plan.recipe.offload == "activations"
    assert smaller.plan.host_memory_bytes > plan.host_memory_bytes


def test_several_gpus_share_the_effective_batch() -> None:
    job = given.job()
    plan = given.plan(job, gpus=4, gpus_per_node=4, micro_batch_size=4, gradient_accumulation=2)
    after = lessened(job.spec, plan).plan
    assert (after.micro_batch_size, after.gradient_accumulation) == (2, 4)
    assert after.micro_batch_size * after.gradient_accumulation * 4 == plan.recipe.effective_batch_size


@for_all(st.integers(2, 5000), st.data())
def test_halving_ends_at_one_and_never_drifts(effective: int, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([n for n in range(1, effective + 1) if effective % n == 0]))
    plan = given.plan(given.job(), micro_batch_size=size, effective_batch_size=effective)
    while plan.micro_batch_size > 1:
        before = plan
        plan = lessened(given.job().spec, plan).plan
        assert plan.micro_batch_size <= max(1, before.micro_batch_size // 2)
        assert plan.micro_batch_size * plan.gradient_accumulation == effective
        assert before.micro_batch_size == size or plan.memory.total_bytes < before.memory.total_bytes


# --- what a user can do at the end ---

CURES: list[Any] = [
    # what the spec says, the nodes there are, what is advised, and what is not
    pytest.param({}, [given.L40S, given.H100], [
        "the micro-batch was 1", "dataset.maxLength below 512", "hardware.gpuProducts [NVIDIA-H100-80GB-HBM3] (lora",
    ], ["L40S", "offload", "gradientCheckpointing", "hardware.gpus"], id="a larger GPU is there"),
    pytest.param({}, [given.L40S, given.A10], ["dataset.maxLength below 512"], ["gpuProducts", "hardware.gpus"],
                 id="there is none"),
    pytest.param({"hardware.gpuProducts": ["NVIDIA-L40S"]}, [given.L40S, given.H100], [
        "hardware.gpuProducts [NVIDIA-H100-80GB-HBM3]",
    ], [], id="one that the job does not ask for"),
    pytest.param({"training.gradientCheckpointing": False}, [given.L40S], [
        "training.gradientCheckpointing left out",
    ], ["offload"], id="what the spec has ruled out is for its user to allow"),
    pytest.param({"training.gradientCheckpointing": False, "training.offload": "none"}, [given.L40S], [
        "training.gradientCheckpointing left out",
    ], ["offload"], id="and first what the other needs"),
    pytest.param({"training.offload": "none"}, [given.L40S], ["training.offload left out"], ["gradientCheckpointing"],
                 id="or this alone"),
    pytest.param({"hardware.accelerator": "cpu"}, [given.L40S], ["nodes with more memory"], ["hardware.gpus"],
                 id="on the CPU"),
]  # fmt: skip


@pytest.mark.parametrize(("edits", "nodes", "advised", "not_advised"), CURES)
def test_what_would_do_instead(
    edits: dict[str, Any], nodes: list[tuple[str, int]], advised: list[str], not_advised: list[str]
) -> None:
    job = given.job(edits)
    inventory = Inventory.of([given.gpu_node(f"node-{n}", *one) for n, one in enumerate(nodes)])
    plan = given.plan(job, micro_batch_size=1)
    text = after_out_of_memory(job.spec, given.inspection(), plan, inventory, Installation())
    assert [part for part in advised if part not in text] == [], text
    assert [part for part in not_advised if part in text] == [], text


def test_a_job_that_does_not_allow_a_smaller_micro_batch_is_told_so() -> None:
    job = given.job({"retry.onOutOfMemory": "fail"})
    text = after_out_of_memory(job.spec, given.inspection(), given.plan(job), Inventory(), Installation())
    assert "the micro-batch was 8; apply it anew with retry.onOutOfMemory left out" in text
