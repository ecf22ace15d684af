"""`kubectl qlora compare`: what two jobs differ in is there, and what they have in common is not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_operator.cli import main
from tests.unit.operator.jobs_in_cluster import qlora_and_lora
from tests.unit.operator.test_watch import NOT_FOUND, Kubectl

NAMES = ["support-bot", "support-bot-lora"]


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kubectl:
    stand_in = Kubectl(tmp_path / "bin")
    monkeypatch.setenv("PATH", stand_in.environment()["PATH"])
    return stand_in


def told(
    kubectl: Kubectl, capsys: pytest.CaptureFixture[str], found: dict[str, Any], *arguments: str
) -> dict[str, list[str]]:
    """The lines by their first column, each as the columns that follow."""
    kubectl.play(json.dumps(found, indent=4))
    assert main(["compare", *NAMES, *arguments]) == 0
    lines = (re.split(r" {3,}", line.strip()) for line in capsys.readouterr().out.splitlines() if line.strip())
    return {first: rest for first, *rest in lines}


def test_two_jobs_are_set_side_by_side(kubectl: Kubectl, capsys: pytest.CaptureFixture[str]):
    lines = told(kubectl, capsys, qlora_and_lora(), "-n", "team-a")
    assert kubectl.runs == ["--namespace=team-a get qlorajobs.qlora.dev support-bot support-bot-lora --output=json"]
    assert lines["team-a/support-bot"] == ["team-a/support-bot-lora"]
    assert lines["phase"] == ["Failed", "Succeeded"]
    assert lines["method"] == ["qlora", "lora"]
    assert lines["rank"] == ["16", "16"]
    assert "learningRate" not in lines, "the same in both"
    assert lines["runs on"] == ["1 × NVIDIA-L40S in 1 node"] * 2
    assert lines["memory, measured"] == ["9.0 GiB", "25.1 GiB"]
    assert lines["steps"] == ["471", "471"]
    assert lines["adapter of step"] == ["400", "–"]
    assert "stopped early" not in lines
    assert lines["time"] == ["2h", "1h"]
    assert lines["GPU-hours"] == ["2.0", "1.0"]
    assert lines["exactMatch"] == ["0.12 → 0.71", "0.12 → 0.78"]
    assert lines["canary.perplexity"] == ["8.4 → 8.6", "8.4 → 8.6"]
    assert lines["gates"] == ["not held: exactMatch min 0.75", "held"]


def test_attempts_that_are_listed_no_longer_took_time(kubectl: Kubectl, capsys: pytest.CaptureFixture[str]):
    found = qlora_and_lora()
    older = [{"stage": stage, "outcome": "Interrupted", "count": 4, "seconds": 3600} for stage in ("train", "merge")]
    found["items"][0]["status"]["olderAttempts"] = older
    assert told(kubectl, capsys, found)["time"] == ["3h", "1h"]


def test_the_first_that_is_named_stands_first(kubectl: Kubectl, capsys: pytest.CaptureFixture[str]):
    found = qlora_and_lora()
    found["items"].reverse()
    assert told(kubectl, capsys, found)["phase"] == ["Failed", "Succeeded"]


def test_a_job_that_has_not_come_so_far_shows_dashes(kubectl: Kubectl, capsys: pytest.CaptureFixture[str]):
    found = qlora_and_lora()
    fresh = {"metadata": found["items"][1]["metadata"], "spec": found["items"][1]["spec"]}
    lines = told(kubectl, capsys, found | {"items": [found["items"][0], fresh]})
    assert lines["phase"] == ["Failed", "Pending"]
    assert "method" not in lines, "there is nothing yet to compare it with"
    assert lines["exactMatch"] == ["0.12 → 0.71", "–"]
    assert lines["time"] == ["2h", "–"]


def test_for_machines(kubectl: Kubectl, capsys: pytest.CaptureFixture[str]):
    kubectl.play(json.dumps(qlora_and_lora()))
    assert main(["compare", *NAMES, "-o", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["names"] == NAMES
    assert document["recipe"] == {"method": ["qlora", "lora"], "rank": [16, 16]}
    assert document["scores"]["exactMatch"] == [{"base": 0.12, "tuned": 0.71}, {"base": 0.12, "tuned": 0.78}]
    assert document["gpuHours"] == [2.0, 1.0]
    assert document["trainingSeconds"] == [7200, 3600]
    assert [gate["passed"] for gates in document["gates"] for gate in gates] == [False, True]


UNREADABLE = qlora_and_lora()
UNREADABLE["items"][0]["status"]["usage"]["gpuSeconds"] = "much"


@pytest.mark.parametrize(
    ("play", "names", "says"),
    [
        (lambda kubectl: kubectl.play(complaint=NOT_FOUND, code=1), NAMES, "(NotFound)"),
        (lambda kubectl: kubectl.play(json.dumps(UNREADABLE)), NAMES, "cannot read the job"),
        (lambda kubectl: None, ["support-bot"] * 2, "support-bot is named twice"),
    ],
)
def test_what_cannot_be_compared_is_told(
    kubectl: Kubectl,
    capsys: pytest.CaptureFixture[str],
    play: Callable[[Kubectl], None],
    names: list[str],
    says: str,
):
    play(kubectl)
    assert main(["compare", *names]) == 2
    assert says in capsys.readouterr().err
