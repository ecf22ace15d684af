"""Gates on the real cluster: what does not hold is kept back with its scores, what holds goes out; both compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from examples.quickstart.upload import MOUNT, shell
from tests.cluster.client import Manifest
from tests.e2e import invariants
from tests.e2e.conftest import Product, condition, tiny
from tests.e2e.judge import judge
from tests.e2e.troubleshooting import KEPT_BACK

pytestmark = pytest.mark.e2e

LET_OUT = "let-out"
HELD_OUT = {"train": [{"uri": "pvc://quickstart/train.jsonl"}], "maxLength": 256, "evalFraction": 0.01}


def evaluated(name: str, highest_loss: float, **spec: Any) -> Manifest:
    """A job of two steps, whose gates ask for a held-out loss and bound what may be worse than in the base."""
    gates = [{"metric": "evalLoss", "max": highest_loss}, {"metric": "evalLoss", "maxDropFromBase": 100}]
    return tiny(name, 2, **{"dataset": HELD_OUT, "evaluation": {"gates": gates}, **spec})


@pytest.fixture(scope="module")
def both(product: Product) -> tuple[Manifest, Manifest]:
    """The job that is kept back and the one that is let out, at their ends."""
    product.apply(evaluated(KEPT_BACK.name, 0.01))
    product.apply(evaluated(LET_OUT, 100, method="lora", storage={"retain": "Keep"}))
    kept = product.wait_for(KEPT_BACK.name, "Failed", timeout=300)
    return kept, product.wait_for(LET_OUT, "Succeeded", timeout=300)


def test_a_gate_that_does_not_hold_keeps_the_model_back(product: Product, both: tuple[Manifest, Manifest]) -> None:
    kept, _ = both
    status = kept["status"]
    assert condition(kept, "Failed")["reason"] == KEPT_BACK.reason
    assert KEPT_BACK.is_said_in(status["message"]), status["message"]
    assert [attempt["outcome"] for attempt in status["attempts"]] == ["Succeeded", "GateFailed"]
    assert [gate["passed"] for gate in status["evaluation"]["gates"]] == [False, True]
    (score,) = status["evaluation"]["scores"]
    assert score["metric"] == "evalLoss"
    assert score["tuned"] > 0.01
    assert [(a["name"], a["state"]) for a in status["artifacts"]] == [("adapter", "Made")]
    assert product.pods(KEPT_BACK.name, "publish") == []
    assert judge([kept])[0].status == "Failed"
    invariants.check(product.cluster, kept)


def test_gates_that_hold_let_it_out(product: Product, both: tuple[Manifest, Manifest]) -> None:
    _, out = both
    assert all(gate["passed"] for gate in out["status"]["evaluation"]["gates"])
    assert [(a["name"], a["state"]) for a in out["status"]["artifacts"]] == [("adapter", "Published")]
    with shell(product.cluster, product.namespace, product.images.trainer) as pod:
        published = product.cluster.kubectl(
            "exec", pod, "--", "ls", f"{MOUNT}/models", namespace=product.namespace
        ).split()
    assert LET_OUT in published
    assert KEPT_BACK.name not in published


def test_the_two_are_compared(product: Product, both: tuple[Manifest, Manifest]) -> None:
    command = [sys.executable, "-m", "qlora_operator.cli", "compare", KEPT_BACK.name, LET_OUT, "-o", "json"]
    said = subprocess.run(
        [*command, "-n", product.namespace], env=environment(product), check=True, capture_output=True, text=True
    )
    told = json.loads(said.stdout)
    assert told["phase"] == ["Failed", "Succeeded"]
    assert told["recipe"]["method"] == ["qlora", "lora"]
    assert set(told["recipe"]) <= {"method", "rank"}, "they differ in nothing else"
    assert told["scores"]["evalLoss"][0] == {
        "base": both[0]["status"]["evaluation"]["scores"][0]["base"],
        "tuned": both[0]["status"]["evaluation"]["scores"][0]["tuned"],
    }
    assert all(size and size > 0 for size in told["measuredBytes"])


def environment(product: Product) -> dict[str, str]:
    """Of a user's shell: kubectl on the PATH, which keeps its cache in the home directory, and the base install."""
    return {**os.environ, **product.cluster.environment(), "PYTHONPATH": ":".join(path for path in sys.path if path)}
