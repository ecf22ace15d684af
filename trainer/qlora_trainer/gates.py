"""Whether the tuned model may leave: the spec's conditions on its scores. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_api.exchange import GateOrder, Score, Verdict
from qlora_trainer.failures import BadInput, Unavailable
from qlora_trainer.scores import higher_is_better


def verdicts(gates: Sequence[GateOrder], scores: Sequence[Score]) -> list[Verdict]:
    """One per gate, in their order.

    Raises Unavailable where the judge gave no marks (it may, later), BadInput where nothing could be measured.
    """
    measured = {score.metric: score for score in scores}
    found: list[Verdict] = []
    for gate in gates:
        if (score := measured.get(gate.metric)) is None:
            if gate.metric == "judge":
                raise Unavailable("evaluation.gates: a gate asks for the judge's marks, and it gave none (see the log)")
            raise BadInput(f"evaluation.gates: {gate.metric} was not measured: no example was left to measure it on")
        found.append(_verdict(gate, score))
    return found


def _verdict(gate: GateOrder, score: Score) -> Verdict:
    if gate.min is not None:
        bound, limit, passed = "min", gate.min, score.tuned >= gate.min
    elif gate.max is not None:
        bound, limit, passed = "max", gate.max, score.tuned <= gate.max
    else:
        bound, limit = "maxDropFromBase", gate.max_drop_from_base or 0.0
        worse = score.base - score.tuned if higher_is_better(gate.metric) else score.tuned - score.base
        passed = round(worse, 9) <= limit  # 0.7 - 0.6 is a little more than 0.1
    return Verdict(metric=gate.metric, bound=bound, limit=limit, base=score.base, tuned=score.tuned, passed=passed)


def failures(judged: Sequence[Verdict]) -> str:
    """The gates that do not hold, a sentence each; empty where all do."""
    return "; ".join(f"evaluation.gates: {verdict.sentence()}" for verdict in judged if not verdict.passed)
