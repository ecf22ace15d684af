"""What follows an ended attempt: nobody's GPU hours are spent on what cannot succeed, nothing curable is given up."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given as for_all
from hypothesis import strategies as st

from qlora_api.exchange import ExitCode
from qlora_api.v1alpha1 import Attempt, Retry
from qlora_operator.lifecycle.answers import (
    COUNTED,
    FOR_GOOD,
    Again,
    AgainWithHalfTheMicroBatch,
    GiveUp,
    Outcome,
    answer,
    outcome,
)
from qlora_operator.lifecycle.observed import Ended
from qlora_operator.planner import with_half_the_micro_batch
from tests.unit.operator import given
from tests.unit.operator.given import TRAIN

OUTCOMES = [
    pytest.param(given.exited(10), "BadInput", id="bad input"),
    pytest.param(given.exited(11), "GateFailed", id="a gate failed"),
    pytest.param(given.exited(12), "Diverged", id="diverged"),
    pytest.param(given.exited(13), "OutOfMemory", id="GPU out of memory"),
    pytest.param(given.exited(14), "Interrupted", id="interrupted"),
    pytest.param(given.exited(15), "EnvironmentUnfit", id="environment unfit"),
    pytest.param(given.exited(1), "Crashed", id="a Python traceback"),
    pytest.param(given.exited(2), "Crashed", id="a usage error"),
    pytest.param(Ended(False, exit_code=137, detail="OOMKilled"), "Crashed", id="killed by the kernel"),
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
        assert (how not in FOR_GOOD) == code.retried, code


def failed(*outcomes: str, change: str | None = None, message: str | None = None) -> list[Attempt]:
    attempts = [given.attempt(TRAIN, n, how) for n, how in enumerate(outcomes, start=1)]
    attempts[-1] = attempts[-1].model_copy(update={"change": change, "message": message})
    return attempts


def seconds(n: float) -> Again:
    return Again(timedelta(seconds=n))


RETRY = Retry(max_restarts=3)
ANSWERS: list[Any] = [
    # what happened, retry, micro-batch, what follows
    pytest.param(failed("BadInput"), RETRY, 8, "BadInput", id="bad input never again"),
    pytest.param(failed("GateFailed"), RETRY, 8, "GateFailed", id="a failed gate never again"),
    pytest.param(failed("Diverged"), RETRY, 8, "Diverged", id="a divergence would repeat itself"),
    pytest.param(failed("Interrupted"), Retry(max_restarts=0), 8, seconds(2), id="an interruption is nobody's fault"),
    pytest.param(failed(*["Interrupted"] * 3), RETRY, 8, seconds(8), id="three in a row: not a busy loop"),
    pytest.param(failed(*["Interrupted"] * 50), Retry(max_restarts=0), 8, seconds(300), id="however often"),
    pytest.param(failed("Interrupted", "Crashed", "Interrupted"), RETRY, 8, seconds(2), id="only those in a row count"),
    pytest.param(failed("Crashed"), RETRY, 8, seconds(10), id="first crash"),
    pytest.param(failed("Crashed", "Crashed"), RETRY, 8, seconds(20), id="second crash"),
    pytest.param(failed("Crashed", "ResultLost", "EnvironmentUnfit"), RETRY, 8, seconds(40), id="third failure"),
    pytest.param(failed(*["Crashed"] * 4), RETRY, 8, "TooManyRestarts", id="fourth: given up"),
    pytest.param(failed(*["Crashed"] * 6), Retry(max_restarts=100), 8, seconds(300), id="the back-off has an end"),
    pytest.param(failed(*["Crashed"] * 100), Retry(max_restarts=100), 8, seconds(300), id="after a hundred too"),
    pytest.param(failed("Crashed"), Retry(max_restarts=0), 8, "TooManyRestarts", id="no restarts allowed"),
    pytest.param(
        failed("Interrupted", "Crashed", "Interrupted", "Crashed"), RETRY, 8, seconds(20), id="interruptions do not add"
    ),
    pytest.param(failed("OutOfMemory", "Crashed"), RETRY, 8, seconds(10), id="nor does out of memory"),
    pytest.param(
        failed("OutOfMemory"), RETRY, 8, AgainWithHalfTheMicroBatch(timedelta()), id="out of memory: half"
    ),
    pytest.param(failed("OutOfMemory"), RETRY, 2, AgainWithHalfTheMicroBatch(timedelta()), id="down to 1"),
    pytest.param(failed("OutOfMemory"), RETRY, 1, "OutOfMemory", id="at 1 there is no half"),
    pytest.param(failed("OutOfMemory", change="8 → 4"), RETRY, 1, seconds(0), id="halved already: just again"),
    pytest.param(
        failed("OutOfMemory"), Retry(on_out_of_memory="fail"), 8, "OutOfMemory", id="onOutOfMemory: fail is obeyed"
    ),
    pytest.param(failed("OutOfMemory"), RETRY, None, "OutOfMemory", id="a stage without a micro-batch"),
]  # fmt: skip


@pytest.mark.parametrize(("attempts", "retry", "micro_batch_size", "expected"), ANSWERS)
def test_what_follows(
    attempts: list[Attempt], retry: Retry, micro_batch_size: int | None, expected: Again | str
) -> None:
    verdict = answer(attempts, retry, micro_batch_size=micro_batch_size)
    if isinstance(expected, str):
        assert isinstance(verdict, GiveUp)
        assert verdict.reason == expected
    else:
        assert verdict == expected


MESSAGES = [
    (failed("BadInput", message="line 812: role"), 8, ["support-bot-train-1 refused its input", "line 812: role"]),
    (failed("OutOfMemory"), 1, ["ran out of GPU memory", "use a larger GPU or a shorter maxLength"]),
    (
        failed(*["Crashed"] * 4, message="boom"),
        8,
        ["support-bot-train-4 crashed: boom", "restarted 3 times", "spec.retry.maxRestarts"],
    ),
]


@pytest.mark.parametrize(("attempts", "micro_batch_size", "parts"), MESSAGES)
def test_a_user_reads_which_attempt_failed_why_and_what_to_do(
    attempts: list[Attempt], micro_batch_size: int, parts: list[str]
) -> None:
    verdict = answer(attempts, RETRY, micro_batch_size=micro_batch_size)
    assert isinstance(verdict, GiveUp)
    assert [part for part in parts if part not in verdict.message] == []


@for_all(
    st.lists(
        st.sampled_from(sorted(Outcome)).filter(lambda how: how is not Outcome.SUCCEEDED), min_size=1, max_size=130
    ),
    st.integers(0, 100),
    st.sampled_from([1, 2, 8]),
)
def test_there_is_always_an_answer_and_restarts_are_bounded(how: list[Outcome], most: int, size: int) -> None:
    verdict = answer(failed(*how), Retry(max_restarts=most), micro_batch_size=size)
    if isinstance(verdict, Again):
        assert how[-1] not in COUNTED or sum(one in COUNTED for one in how) <= most
        assert timedelta() <= verdict.delay <= timedelta(minutes=5)


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

    after = with_half_the_micro_batch(plan, given.inspection())

    assert after.micro_batch_size == expected
    assert after.micro_batch_size * after.gradient_accumulation == effective
    assert after.recipe == plan.recipe
    assert after.planned_for == plan.planned_for, "or the next pass would plan anew and undo it"
    assert after.memory.total_bytes == sum(item.bytes for item in after.memory.items)


@for_all(st.integers(2, 5000), st.data())
def test_halving_ends_at_one_and_never_drifts(effective: int, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([n for n in range(1, effective + 1) if effective % n == 0]))
    plan = given.plan(given.job(), micro_batch_size=size, effective_batch_size=effective)
    while plan.micro_batch_size > 1:
        before = plan
        plan = with_half_the_micro_batch(plan, given.inspection())
        assert plan.micro_batch_size <= max(1, before.micro_batch_size // 2)
        assert plan.micro_batch_size * plan.gradient_accumulation == effective
        assert before.micro_batch_size == size or plan.memory.total_bytes < before.memory.total_bytes
