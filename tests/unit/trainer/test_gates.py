from __future__ import annotations

from typing import Any

import pytest

from qlora_api.exchange import GateOrder, Score, TrainResult, Verdict, failed, parse_report
from qlora_trainer.early_stopping import has_stopped_gaining, is_gain
from qlora_trainer.failures import BadInput, Unavailable
from qlora_trainer.gates import failures, verdicts

from .conftest import Place

SCORES = [
    Score(metric="exactMatch", base=0.7, tuned=0.6, examples=10),
    Score(metric="canary.perplexity", base=8.0, tuned=9.5, examples=10),
]


@pytest.mark.parametrize(
    ("gate", "passed"),
    [
        ({"metric": "exactMatch", "min": 0.6}, True),
        ({"metric": "exactMatch", "min": 0.61}, False),
        ({"metric": "exactMatch", "min": 0}, True),
        ({"metric": "exactMatch", "max": 0.6}, True),
        ({"metric": "exactMatch", "max": 0.59}, False),
        ({"metric": "exactMatch", "max_drop_from_base": 0.1}, True),
        ({"metric": "exactMatch", "max_drop_from_base": 0.09}, False),
        ({"metric": "exactMatch", "max_drop_from_base": 0}, False),
        ({"metric": "canary.perplexity", "max_drop_from_base": 1.5}, True),
        ({"metric": "canary.perplexity", "max_drop_from_base": 1.4}, False),
        ({"metric": "canary.perplexity", "max": 9}, False),
    ],
)
def test_a_gate_holds_or_does_not(gate: dict[str, Any], passed: bool) -> None:
    (verdict,) = verdicts([GateOrder(**gate)], SCORES)
    assert verdict.passed == passed
    assert bool(failures([verdict])) != passed


def test_what_does_not_hold_is_said_gate_by_gate() -> None:
    gates = [
        GateOrder(metric="exactMatch", min=0.8),
        GateOrder(metric="exactMatch", min=0.5),
        GateOrder(metric="canary.perplexity", max_drop_from_base=1),
    ]
    assert failures(verdicts(gates, SCORES)) == (
        "evaluation.gates: exactMatch is to be at least 0.8 and is 0.6; evaluation.gates: canary.perplexity may be "
        "worse than the base's 8 by 1 at most and is 9.5"
    )


def test_what_was_not_measured_passes_no_gate() -> None:
    with pytest.raises(Unavailable, match="it gave none"):
        verdicts([GateOrder(metric="judge", min=3)], SCORES)
    with pytest.raises(BadInput, match="evalLoss was not measured"):
        verdicts([GateOrder(metric="evalLoss", max=3)], SCORES)


def test_the_largest_result_fits_a_termination_message(place: Place) -> None:
    """With every metric on both sets and as many gates as a job can have, and something is left for the failure."""
    metrics = ["exactMatch", "tokenF1", "rougeL", "jsonSchema", "perplexity", "judge", "evalLoss"]
    metrics += ["canary.exactMatch", "canary.tokenF1", "canary.rougeL", "canary.perplexity"]
    scores = [Score(metric=name, base=123.456789, tuned=123.456789, examples=1_000_000) for name in metrics]
    gates = [
        Verdict(metric="canary.exactMatch", bound="maxDropFromBase", limit=0.123456, base=0.123456, tuned=0.123456,
                passed=False)
    ] * 16  # fmt: skip
    result = TrainResult(
        adapter_digest="sha256:" + "0" * 64, adapter_bytes=10**10, steps=10**6, epochs=3.0001, train_loss=1.23456789012,
        eval_loss=1.23456789012, tokens=10**11, tokens_per_second=12345.6, mfu=0.4567, seconds=123456.7,
        device="NVIDIA H100 80GB HBM3", peak_memory_bytes=10**11, resumed_from_step=10**6, scores=scores, gates=gates,
        selected_step=10**6, stopped_early=True,
    )  # fmt: skip
    report = parse_report(failed(place.train_order(), failures(gates), result).fitted())
    assert TrainResult.model_validate(report.result) == result
    assert (report.failure or "").startswith("evaluation.gates: canary.exactMatch may be worse")


@pytest.mark.parametrize(
    ("value", "best", "higher", "gain"),
    [
        (0.5, None, True, True),
        (0.5, 0.4, True, True),
        (0.5, 0.5, True, False),
        (0.5, 0.6, True, False),
        (0.5, 0.6, False, True),
        (0.5, 0.5, False, False),
        (float("nan"), None, False, False),
        (float("inf"), 0.5, True, False),
    ],
)
def test_what_is_a_gain(value: float, best: float | None, higher: bool, gain: bool) -> None:
    assert is_gain(value, best, higher_is_better=higher) == gain


@pytest.mark.parametrize(
    ("step", "best_step", "patience", "stops"),
    [
        (29, 10, 2, False),
        (30, 10, 2, True),
        (30, 11, 2, False),
        (19, None, 2, False),
        (20, None, 2, True),
        (1000, 10, None, False),
        (12, 20, 1, False),  # the best was found by an attempt that came further than the checkpoint
    ],
)
def test_when_it_has_stopped_gaining(step: int, best_step: int | None, patience: int | None, stops: bool) -> None:
    assert has_stopped_gaining(step, best_step, patience_epochs=patience, steps_per_epoch=10) == stops
