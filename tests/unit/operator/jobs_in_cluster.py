"""Jobs as a cluster has them: planned by the planner, told of in the operator's own words."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from qlora_api.v1alpha1 import Attempt, ConditionType, JobStatus, Phase, Plan, Progress
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
