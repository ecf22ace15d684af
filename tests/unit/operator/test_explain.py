"""`kubectl qlora explain`: every question that people ask of a job has its answer in the text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_api.v1alpha1 import Artifact, ConditionType, Phase
from qlora_operator.cli import main
from qlora_operator.lifecycle.policies import next_step
from qlora_operator.lifecycle.tasks import INSPECT, TRAIN
from qlora_operator.sizing.memory import CONTEXT
from tests.unit.operator import given
from tests.unit.operator.jobs_in_cluster import NO_ROOM, in_phase, planned, ran_out_of_memory_and_waits
from tests.unit.operator.test_watch import NOT_FOUND, Kubectl

GIB = 1024**3


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kubectl:
    stand_in = Kubectl(tmp_path / "bin")
    monkeypatch.setenv("PATH", stand_in.environment()["PATH"])
    return stand_in


def told(kubectl: Kubectl, capsys: pytest.CaptureFixture[str], document: dict[str, Any], *arguments: str) -> str:
    kubectl.play(json.dumps(document, indent=4))
    assert main(["explain", "support-bot", *arguments]) == 0
    return capsys.readouterr().out


def below(heading: str, text: str) -> list[str]:
    """The lines under a heading, up to the next empty one."""
    lines = text.splitlines()
    start = lines.index(heading) + 1
    end = next((n for n in range(start, len(lines)) if not lines[n]), len(lines))
    return lines[start:end]


def test_a_job_that_waits_is_explained_from_top_to_bottom(kubectl: Kubectl, capsys: pytest.CaptureFixture[str]):
    text = told(kubectl, capsys, ran_out_of_memory_and_waits(), "-n", "team-a", "--context", "prod")
    assert kubectl.runs == ["--namespace=team-a --context=prod get qlorajobs.qlora.dev support-bot --output=json"]
    assert text.splitlines()[:2] == ["team-a/support-bot  Scheduling   33 %", f"train waits: {NO_ROOM}"]
    assert below("why it does not go on", text) == ["  Scheduled is False (Unschedulable)"]

    made, _ = planned()
    needed, there = made.memory.total_bytes * 1.15 / GIB, (made.memory.gpu_bytes or 0) / GIB
    assert (
        f"why NVIDIA-L40S: {made.recipe.method} at micro-batch {made.micro_batch_size} × 4,096 tokens needs "
        f"{needed:.1f} GiB with 15 % headroom, it has {there:.1f}"
    ) in text.splitlines()
    assert below("not chosen", text) == [f"  {each.flavour}: {each.reason}" for each in made.rejected]

    context = next(item.bytes for item in made.memory.items if item.name == CONTEXT)
    off = 100 * (26_900_000_000 / (made.memory.total_bytes - context) - 1)
    assert f"measured: 25.1 GiB, {abs(off):.1f} % {'more' if off > 0 else 'less'} than predicted" in text.splitlines()
    predicted_bar, measured_bar = [line for line in text.splitlines() if "····" in line]
    assert set(measured_bar) == {"▒", "·"}
    assert len(predicted_bar) == len(measured_bar)

    assert below("attempts", text) == [
        "  inspect, attempt 1 on cpu-1: Succeeded",
        "  train, attempt 1 on gpu-3: OutOfMemory, exit code 13: CUDA out of memory: tried to allocate 2.00 GiB; "
        "next: micro-batch 2 → 1, accumulation 16 → 32",
    ]
    assert below("what to do", text) == [
        "  it goes on by itself when the cause above is gone",
        "  follow it with kubectl qlora watch support-bot -n team-a",
        "  what the scheduler and the kubelet say of its pods: "
        "kubectl describe pods -n team-a -l qlora.dev/job=support-bot",
    ]


def test_what_inspection_warned_of_is_told_with_its_cure(kubectl: Kubectl, capsys: pytest.CaptureFixture[str]):
    document = ran_out_of_memory_and_waits()
    of_a_later_version = {"severity": "warns", "code": "haunted", "count": 2}
    truncated = {"severity": "warns", "code": "truncated", "count": 1234, "example": "train[0] line 7: 900 tokens"}
    shares = [{"examplesPercent": 90, "tokensPercent": 84.25}, {"examplesPercent": 10, "tokensPercent": 15.75}]
    document["status"]["inspection"] = {"findings": [truncated, of_a_later_version], "sources": shares}
    text = " ".join(below("to look at in the data", told(kubectl, capsys, document)))
    assert "truncated 1,234 (first: train[0] line 7: 900 tokens): examples longer than `maxLength` lose" in text
    assert "raise `dataset.maxLength`" in text
    assert "haunted 2" in text
    assert below("what is learned from", told(kubectl, capsys, document)) == [
        "  dataset.train[0]: 90 % of the examples, 84.25 % of the tokens",
        "  dataset.train[1]: 10 % of the examples, 15.75 % of the tokens",
    ]


FAILED_TRAINING = given.attempt(TRAIN, 2, "Diverged", exit_code=12, message="lower the rate")
RUNNING = given.attempt(TRAIN, 2, "").model_copy(update={"outcome": None})
PUBLISHED = (Artifact(name="adapter", state="Published", uri="pvc://models/support-bot/adapter"),)


@pytest.mark.parametrize(
    ("made", "what_to_do"),
    [
        pytest.param(
            lambda: in_phase(Phase.PLANNING, "no GPU", reason="NoFlavourFits", without=(ConditionType.PLANNED,)),
            [
                "add what is missing, and the job is planned within a minute; or change what it asks for: "
                """kubectl patch qj support-bot -n team-a --type=merge -p '{"spec":{"suspend":true}}', """
                "edit spec.hardware, and set suspend to false"
            ],
            id="nothing fits",
        ),
        pytest.param(
            lambda: in_phase(Phase.PLANNED, "rests at its plan", spec={"planOnly": True}),
            [
                "look at the plan; to train by it: kubectl patch qj support-bot -n team-a --type=merge "
                """-p '{"spec":{"planOnly":false}}'"""
            ],
            id="rests at its plan",
        ),
        pytest.param(
            lambda: in_phase(Phase.PLANNED, "goes on"),
            ["follow it with kubectl qlora watch support-bot -n team-a"],
            id="goes on",
        ),
        pytest.param(
            lambda: in_phase(Phase.TRAINING, "training on gpu-3"),
            ["follow it with kubectl qlora watch support-bot -n team-a"],
            id="trains",
        ),
        pytest.param(
            lambda: in_phase(Phase.SCHEDULING, "waits", attempts=(RUNNING,)),
            [
                "follow it with kubectl qlora watch support-bot -n team-a",
                "what the scheduler and the kubelet say of its pods: "
                "kubectl describe pods -n team-a -l batch.kubernetes.io/job-name=support-bot-train-2",
            ],
            id="its pod waits",
        ),
        pytest.param(
            lambda: in_phase(Phase.SUSPENDED, "suspended", spec={"suspend": True}),
            [
                "to go on from the last checkpoint: kubectl patch qj support-bot -n team-a --type=merge "
                """-p '{"spec":{"suspend":false}}'"""
            ],
            id="suspended",
        ),
        pytest.param(
            lambda: in_phase(Phase.SUCCEEDED, "published", artifacts=PUBLISHED),
            ["take the adapter from pvc://models/support-bot/adapter"],
            id="succeeded",
        ),
        pytest.param(
            lambda: in_phase(Phase.FAILED, "diverged", reason="Diverged", attempts=(FAILED_TRAINING,)),
            [
                "a job is one run: correct what the message names, and apply it under another name",
                "the log of what failed: kubectl logs -n team-a job/support-bot-train-2",
            ],
            id="failed",
        ),
        pytest.param(
            lambda: given.document(generation=3),
            [
                "follow it with kubectl qlora watch support-bot -n team-a",
                "the operator has not answered the last change of the spec yet: if it stays so, see that it runs, "
                "with kubectl get pods -A -l app.kubernetes.io/name=qlora-operator",
            ],
            id="nobody has looked at it",
        ),
    ],
)  # fmt: skip
def test_what_to_do(
    kubectl: Kubectl, capsys: pytest.CaptureFixture[str], made: Callable[[], dict[str, Any]], what_to_do: list[str]
):
    document = made()
    text = told(kubectl, capsys, document)
    assert below("what to do", text) == [f"  {each}" for each in what_to_do]
    assert json.loads(told(kubectl, capsys, document, "-o", "json"))["advice"] == what_to_do


def test_a_refusal_that_the_message_does_not_tell_is_told(kubectl: Kubectl, capsys: pytest.CaptureFixture[str]):
    document = in_phase(Phase.TRAINING, "train ended Crashed; starts again")
    scheduled = next(c for c in document["status"]["conditions"] if c["type"] == "Scheduled")
    scheduled |= {"status": "False", "reason": "Unschedulable", "message": NO_ROOM}
    text = told(kubectl, capsys, document)
    assert below("why it does not go on", text) == [f"  Scheduled is False (Unschedulable): {NO_ROOM}"]


def test_a_job_that_nobody_has_looked_at_has_no_plan_to_tell(kubectl: Kubectl, capsys: pytest.CaptureFixture[str]):
    text = told(kubectl, capsys, given.document())
    assert text.splitlines()[0] == "team-a/support-bot  Pending   0 %"
    assert "the plan" not in text


def test_a_newer_operators_job_is_explained_too(kubectl: Kubectl, capsys: pytest.CaptureFixture[str]):
    document = in_phase(Phase.TRAINING, "training")
    document["spec"]["novelty"] = {"a": 1}
    document["status"] |= {"phase": "Quantizing", "novelty": 1}
    document["status"]["plan"]["recipe"]["novelty"] = "x"
    document["status"]["plan"]["memory"]["novelty"] = "x"
    assert told(kubectl, capsys, document).startswith("team-a/support-bot  Quantizing")


def test_a_full_volume_is_explained_with_what_resumes_the_job(kubectl: Kubectl, capsys: pytest.CaptureFixture[str]):
    before = [given.attempt(TRAIN, 1, "VolumeFull", message="no room left")]
    full = given.history(given.job(), INSPECT, before=before, observed_generation=1)
    status = next_step(full, given.seen(full), given.NOW).status
    text = told(kubectl, capsys, given.document() | {"status": status.to_api()})
    assert below("what to do", text) == [
        "  make room as it says, then kubectl patch qj support-bot -n team-a --type=merge "
        """-p '{"spec":{"suspend":true}}'""",
        """  and kubectl patch qj support-bot -n team-a --type=merge -p '{"spec":{"suspend":false}}'""",
    ]


def test_attempts_that_are_listed_no_longer_are_counted(kubectl: Kubectl, capsys: pytest.CaptureFixture[str]):
    document = ran_out_of_memory_and_waits()
    document["status"]["olderAttempts"] = [{"stage": "train", "outcome": "Interrupted", "count": 31, "seconds": 9}]
    assert below("attempts", told(kubectl, capsys, document))[2:] == ["  train, 31 older attempts: Interrupted"]
    machines = yaml.safe_load(told(kubectl, capsys, document, "-o", "json"))
    assert machines["olderAttempts"] == document["status"]["olderAttempts"]


@pytest.mark.parametrize("output", ["json", "yaml"])
def test_machines_get_the_same(kubectl: Kubectl, capsys: pytest.CaptureFixture[str], output: str):
    document = yaml.safe_load(told(kubectl, capsys, ran_out_of_memory_and_waits(), "-o", output))
    assert (document["namespace"], document["name"], document["phase"]) == ("team-a", "support-bot", "Scheduling")
    assert [each["condition"] for each in document["unmet"]] == ["Scheduled"]
    assert document["plan"]["where"] == "1 × NVIDIA-L40S in 1 node"
    assert document["plan"]["memory"]["measuredBytes"] == 26_900_000_000
    assert [attempt["outcome"] for attempt in document["attempts"]] == ["Succeeded", "OutOfMemory"]


@pytest.mark.parametrize(
    ("complaint", "code"),
    [
        (NOT_FOUND, 2),
        ("The connection to the server 127.0.0.1:6443 was refused - did you specify the right host or port?", 3),
        ('error: context "prod" does not exist', 3),
        ('Error from server (Forbidden): qlorajobs.qlora.dev "support-bot" is forbidden', 3),
    ],
)
def test_what_cannot_be_read_is_told_in_kubectls_words(
    kubectl: Kubectl, capsys: pytest.CaptureFixture[str], complaint: str, code: int
):
    kubectl.play(complaint=f"E1123 08:20:03.786060 memcache.go:381] logged\n{complaint}\n", code=1)
    assert main(["explain", "support-bot"]) == code
    assert capsys.readouterr() == ("", f"{complaint}\n")


def test_a_job_that_cannot_be_read_names_the_field(kubectl: Kubectl, capsys: pytest.CaptureFixture[str]):
    document = in_phase(Phase.TRAINING, "training")
    document["status"]["plan"]["gpus"] = "many"
    kubectl.play(json.dumps(document))
    assert main(["explain", "support-bot"]) == 2
    assert capsys.readouterr().err.startswith(
        "this version of kubectl-qlora cannot read the job (status.plan.gpus: must be a valid integer"
    )


def test_what_is_not_json_is_told(kubectl: Kubectl, capsys: pytest.CaptureFixture[str]):
    kubectl.play("NAME          PHASE\n")
    assert main(["explain", "support-bot"]) == 3
    assert capsys.readouterr().err == "kubectl has written something that is not JSON: NAME          PHASE\n"
