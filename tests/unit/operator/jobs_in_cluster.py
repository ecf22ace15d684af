"""Jobs as a cluster has them: planned by the planner, told of in the operator's own words."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from qlora_api.exchange import Score, Verdict
from qlora_api.v1alpha1 import Attempt, ConditionType, EvaluationResult, JobStatus, Phase, Plan, Progress, Usage
from qlora_operator.commands.manifests import manifests, premises
from qlora_operator.commands.nodes import nodes_of_file
from qlora_operator.lifecycle.conditions import Situation, with_situation
from qlora_operator.lifecycle.tasks import INSPECT, TRAIN
from qlora_operator.placement.inventory import Inventory
from qlora_operator.planner import plan
from tests.unit.operator import given

FILES = Path(__file__).parent / "cli"
#: The shape of the model that lies on the claim.
MODEL = "llama-3.1-8b"
NO_ROOM = "not scheduled: 0/4 nodes are available: 3 Insufficient nvidia.com/gpu, 1 node(s) had untolerated taint"


def planned() -> tuple[Plan, dict[str, Any]]:
    """The plan of `cli/job.yaml` on `cli/nodes.yaml`, and the manifest as the API server holds it."""
    (manifest,) = manifests(str(FILES / "job.yaml"))
    premise = premises(manifest, model=MODEL, seq_len=None, sequences=12_800)
    made = plan(manifest.job.spec, premise.inspection, Inventory.of(nodes_of_file(str(FILES / "nodes.yaml"))))
    assert isinstance(made, Plan)
    document = manifest.job.to_api()
    document["metadata"]["generation"] = 1
    return made, document


def in_phase(
    phase: Phase,
    message: str,
    *,
    reason: str = "",
    attempts: tuple[Attempt, ...] = (),
    without: tuple[ConditionType, ...] = (),
    spec: dict[str, Any] | None = None,
    measured_bytes: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The job in `phase`; `without` are the milestones that are refused, with the same message."""
    made, document = planned()
    memory = made.memory.model_copy(update={"measured_bytes": measured_bytes})
    status = JobStatus(
        plan=made.model_copy(update={"memory": memory}), attempts=attempts, progress=Progress(percent=33)
    )
    status = with_situation(
        status.model_copy(update=more),
        Situation(phase, reason, message),
        dict.fromkeys(without, ("False", reason, message)),
        generation=1,
        now=given.NOW,
    )
    return document | {"spec": document["spec"] | (spec or {}), "status": status.to_api()}


def ran_out_of_memory_and_waits() -> dict[str, Any]:
    """A training that ran out of memory once, and waits for a GPU with a smaller micro-batch."""
    started, ended = given.NOW - timedelta(minutes=9), given.NOW
    attempts = (
        given.attempt(INSPECT, 1, "Succeeded", node="cpu-1"),
        given.attempt(
            TRAIN,
            1,
            "OutOfMemory",
            started=started,
            ended=ended,
            node="gpu-3",
            exit_code=13,
            message="CUDA out of memory: tried to allocate 2.00 GiB",
            change="micro-batch 2 → 1, accumulation 16 → 32",
        ),
    )
    return in_phase(
        Phase.SCHEDULING,
        f"train waits: {NO_ROOM}",
        reason="Unschedulable",
        attempts=attempts,
        without=(ConditionType.SCHEDULED,),
        measured_bytes=26_900_000_000,
    )


def qlora_and_lora() -> dict[str, Any]:
    """The same training in 4 bits, which a gate has kept back, and in 16: the list that kubectl gets of two names."""
    jobs = [_tuned("support-bot", "qlora", 0.71, 9_700_000_000, hours=2), _tuned("support-bot-lora", "lora", 0.78,
            26_900_000_000, hours=1)]  # fmt: skip
    return {"apiVersion": "v1", "kind": "List", "items": jobs}


def _tuned(name: str, method: str, tuned: float, measured_bytes: int, *, hours: float) -> dict[str, Any]:
    passed = tuned >= 0.75
    started = given.NOW - timedelta(hours=hours)
    document = in_phase(
        Phase.SUCCEEDED if passed else Phase.FAILED,
        "",
        attempts=(
            given.attempt(TRAIN, 1, "Succeeded" if passed else "GateFailed", started=started, of=name, node="gpu-3"),
        ),
        measured_bytes=measured_bytes,
        usage=Usage(run_seconds=round(3600 * hours) + 60, gpu_seconds=round(3600 * hours)),
        evaluation=EvaluationResult(
            scores=(
                Score(metric="exactMatch", base=0.12, tuned=tuned, examples=200),
                Score(metric="canary.perplexity", base=8.4, tuned=8.6, examples=100),
            ),
            gates=(Verdict(metric="exactMatch", bound="min", limit=0.75, base=0.12, tuned=tuned, passed=passed),),
            selected_step=None if passed else 400,
        ),
        progress=Progress(percent=100, step=471, steps=471, loss=0.5124, eval_loss=0.61, tokens_per_second=4200),
    )
    document["metadata"] = document["metadata"] | {"name": name}
    document["status"]["plan"]["recipe"]["method"] = method
    return document
