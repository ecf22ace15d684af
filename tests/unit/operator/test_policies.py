"""The decisions, case by case: what is done, what the user reads, and what a program can wait for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest

from qlora_api.exchange import ProgressName, Verdict
from qlora_api.v1alpha1 import JobStatus, Phase, Plan, Progress, Usage, WorkVolume
from qlora_operator.lifecycle.attempting import RESUMED, template_of
from qlora_operator.lifecycle.observed import Absent, Active, Ended, Job, Observed, Reported, Seen, Stopping
from qlora_operator.lifecycle.pending import Wait
from qlora_operator.lifecycle.planning import is_to_be_planned
from qlora_operator.lifecycle.policies import POLICIES, next_step
from qlora_operator.lifecycle.standing import call_refused
from qlora_operator.lifecycle.step import Action, CreateWorkVolume, DeleteWorkVolume, Remove, Start, Step, Stop
from qlora_operator.lifecycle.tasks import tasks
from qlora_operator.planner import Installation
from tests.unit.operator import given
from tests.unit.operator.given import BOTH, INSPECT, MERGE, NOW, PUBLISH_ADAPTER, PUBLISH_MERGED, TRAIN
from tests.unit.operator.kstatus import kstatus

RUNNING = Active(node="node-1", started=NOW)
QUEUED = Active(waiting="the queue gpus has not admitted it yet", reason=Wait.QUEUE)
UNSCHEDULED = Active(waiting="not scheduled: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", reason=Wait.GPUS)
FULL_VOLUME = given.attempt(TRAIN, 1, "VolumeFull", message="the work volume has no room left")
ROOM_MADE = FULL_VOLUME.model_copy(update={"change": RESUMED})
LOST = Stopping("its node node-1 was lost")
NO_IMAGE = Active("node-1", NOW - timedelta(minutes=30), "its image trainer:2 cannot be pulled (not found); if "
                  "spec.podTemplate.image is wrong, suspend the job, correct it and resume", Wait.IMAGE)  # fmt: skip
TOO_LARGE = Active(waiting="not scheduled: 0/3 nodes are available: 3 Insufficient memory.", reason=Wait.HOST_MEMORY,
                   asked_bytes=70 * given.GIB)  # fmt: skip
NODES = [given.gpu_node("node-1", *given.L40S)]
CPU_NODE = given.cpu_node("node-2", "32Gi")
LARGE_CPU_NODE = given.cpu_node("node-3", "512Gi")
#: For GPUs alone: a stage that takes none does not tolerate it.
TAINTED = given.gpu_node("node-4", *given.H100, memory="512Gi",
                         taints=[{"key": "nvidia.com/gpu", "value": "", "effect": "NoSchedule"}])  # fmt: skip
#: With these two nodes the plan that `given` records is not the one that would be made now.
SMALL = [given.gpu_node("node-9", "NVIDIA-A2", 15356)]

FULL: dict[str, Any] = {"output.formats": BOTH}
SUSPENDED: dict[str, Any] = {"suspend": True}
NOT_BUILT: dict[str, Any] = {"output.signingKeySecretRef": {"name": "key"}}
OWN_CLAIM: dict[str, Any] = {"storage.claimName": "scratch"}
EDITED: dict[str, Any] = {"suspend": True, "hardware": {"gpuProducts": ["NVIDIA-A2"]}}


HOUR: dict[str, Any] = {"budget.maxGPUHours": 1}
KEPT: dict[str, Any] = {"storage.retain": "Keep"}


def ran(*, minutes: float) -> Active:
    """An attempt that has been at work for so long."""
    return Active(node="node-1", started=NOW - timedelta(minutes=minutes))


@dataclass(frozen=True)
class Case:
    """A job as recorded, what the cluster has of it, and what must follow."""

    name: str
    job: Job
    actions: Sequence[Action]
    phase: str
    reason: str
    kstatus: str = "InProgress"
    conditions: Mapping[str, str] = field(default_factory=dict)
    says: str = ""
    after: float | None = None
    attempts: Mapping[str, Seen] = field(default_factory=dict)
    claim: bool = True
    outputs: bool = True
    nodes: Sequence[Any] | None = None


def job(edits: Mapping[str, Any] | None = None, *done: Any, **changes: Any) -> Job:
    return given.history(given.job(edits), *done, **changes)


def over(phase: Phase, edits: Mapping[str, Any] | None = None, *done: Any, **changes: Any) -> Job:
    """A job that has succeeded or failed, as recorded at that time."""
    status = given.JobStatus(observed_generation=1, phase=phase)
    return given.history(given.job(edits, status), *done, **changes)


def on_two_nodes(of: Job) -> Job:
    """`of`, planned on two nodes of eight GPUs."""
    plan = given.plan(of, gpus=16, gpus_per_node=8, nodes=2, micro_batch_size=1, gradient_accumulation=2)
    return Job(of.metadata, of.spec, of.status.model_copy(update={"plan": plan}))


def planned_otherwise(of: Job) -> Job:
    """`of`, whose plan was made for a spec as it stood before an edit."""
    assert of.status.plan is not None
    plan = of.status.plan.model_copy(update={"planned_for": "sha256:as it was before"})
    return Job(of.metadata, of.spec, of.status.model_copy(update={"plan": plan}))


FAILED_MERGE = [
    given.attempt(INSPECT, 1, "Succeeded"),
    given.attempt(TRAIN, 1, "Succeeded"),
    given.attempt(MERGE, 1, "BadInput", message="no config.json"),
]
OFFLOADED = given.plan(given.job(), micro_batch_size=1, recipe=given.recipe(offload="activations"))
OOM_KILLED = Ended(False, exit_code=137, reason="OOMKilled", detail="OOMKilled", node="node-1", ended=NOW)
HALVED = given.attempt(TRAIN, 1, "OutOfMemory", change="micro-batch 4 → 2, accumulation 8 → 16")
CRASHED_ONCE = [given.attempt(TRAIN, 1, "Crashed", ended=NOW - timedelta(seconds=4), message="boom")]

# fmt: off
CASES = [
    # --- inspection ---
    Case("a new job is inspected", job(), [Start(INSPECT, 1)], "Inspecting", "Starting",
         conditions={"Inspected": "Unknown", "Planned": "Unknown", "Ready": "False", "Reconciling": "True"}, after=2),
    Case("and not again while that runs", job(), [], "Inspecting", "Running", attempts={"inspect-1": RUNNING},
         says="inspect is running"),
    Case("what its pod waits for is said", job(), [], "Inspecting", "Waiting", says="ErrImagePull",
         attempts={"inspect-1": Active(waiting="ErrImagePull: no such image")}),
    Case("a claim that is not there, by the fields that name it", job(), [], "Inspecting", "ClaimMissing",
         says="inspect waits: spec.dataset.train[0].uri: there is no PersistentVolumeClaim data",
         attempts={"inspect-1": Active(waiting="there is no PersistentVolumeClaim data", reason=Wait.CLAIM,
                                       missing_claim="data")}),
    Case("its image cannot be pulled: stopped once another pod template is asked for",
         job({"suspend": True, "podTemplate.image": "trainer:3"}), [Stop(INSPECT, 1)], "Inspecting", "Restarting",
         after=2, says="spec.podTemplate has changed",
         attempts={"inspect-1": Active(waiting="ImagePullBackOff", template="sha256:of the other image")}),
    Case("and started anew while still suspended", job({"suspend": True, "podTemplate.image": "trainer:3"}),
         [Start(INSPECT, 1)], "Inspecting", "Starting", after=2),
    Case("the same pod template: left alone", job(), [], "Inspecting", "Running",
         attempts={"inspect-1": Active("node-1", NOW, template=template_of(job()))}),
    Case("suspended from birth: inspected all the same", job(SUSPENDED), [Start(INSPECT, 1)], "Inspecting",
         "Starting", after=2),
    Case("what this version does not do is refused at once", job(NOT_BUILT), [], "Failed",
         "NotSupported", kstatus="Failed", conditions={"Failed": "True", "Stalled": "True"}, says="signingKeySecretRef",
         after=0),
    Case("inspection found: recorded", job(), [], "Planning", "Inspected", conditions={"Inspected": "True"},
         attempts={"inspect-1": given.succeeded(INSPECT)}, after=0),
    Case("bad data: recorded first", job(), [], "Inspecting", "Starting", after=0,
         attempts={"inspect-1": given.exited(10, INSPECT, says="line 3: no role")}),
    Case("bad data: the job fails and says where",
         job(before=[given.attempt(INSPECT, 1, "BadInput", message="line 3: no role")]), [], "Failed", "BadInput",
         kstatus="Failed", says="line 3: no role", after=0,
         conditions={"Failed": "True", "Inspected": "False", "Planned": "Unknown"}),
    Case("an inspection that crashed starts again after its back-off",
         job(before=[given.attempt(INSPECT, 1, "Crashed", ended=NOW - timedelta(seconds=10))]),
         [Start(INSPECT, 2)], "Inspecting", "Starting", after=2),

    # --- the plan ---
    Case("planned", job(None, INSPECT, planned=False), [], "Planning", "Planned", nodes=NODES, after=0,
         conditions={"Inspected": "True", "Planned": "True"}, says="1 × NVIDIA-L40S"),
    Case("no GPU fits: it waits for one", job({"hardware.gpuProducts": ["H900"]}, INSPECT, planned=False), [],
         "Planning", "NoFlavourFits", nodes=NODES, after=None, conditions={"Planned": "False"},
         says="NVIDIA-L40S: not among"),
    Case("no nodes at all", job(None, INSPECT, planned=False), [], "Planning", "NoFlavourFits", nodes=[], after=None,
         says="no node with GPUs"),
    Case("the spec is at fault: no node could help",
         job({"lora.targetModules": ["w1"]}, INSPECT, planned=False), [], "Failed", "UnknownTargetModules", nodes=NODES,
         kstatus="Failed", conditions={"Planned": "False", "Inspected": "True"}, says="no linear layer w1", after=0),
    Case("planOnly rests at the plan, for which GitOps may wait", job({"planOnly": True}, INSPECT, volume=False), [],
         "Planned", "PlanReady", kstatus="Current", conditions={"Ready": "True", "Planned": "True", "Complete": ""}),
    Case("also where suspended", job({"planOnly": True, "suspend": True}, INSPECT, volume=False), [], "Planned",
         "PlanReady", kstatus="Current"),
    Case("released: it goes on to its work volume", job(None, INSPECT, volume=False), [CreateWorkVolume()],
         "Scheduling", "Claiming", claim=False, after=0),

    # --- the work volume ---
    Case("the claim is there: recorded", job(None, INSPECT, volume=False), [], "Training", "Starting", after=0),
    Case("the user's claim is missing: never made for them", job(OWN_CLAIM, INSPECT, volume=False), [], "Scheduling",
         "ClaimMissing", claim=False, after=30, says="no PersistentVolumeClaim scratch"),
    Case("the claim for the results is missing: said before anything is trained", job(None, INSPECT, volume=False), [],
         "Scheduling", "ClaimMissing", outputs=False, after=30, says="spec.output.uri: there is no Persistent"),
    Case("and no longer asked for once it trains", job(None, INSPECT), [Start(TRAIN, 1)], "Training", "Starting",
         outputs=False, after=2),
    Case("the claim went before anything was trained: claimed again", job(None, INSPECT), [CreateWorkVolume()],
         "Scheduling", "Claiming", claim=False, after=0),
    Case("the claim went with the adapter on it", job(FULL, INSPECT, TRAIN), [], "Failed", "WorkVolumeLost",
         claim=False, kstatus="Failed", says="support-bot-work is gone", after=0),

    # --- training ---
    Case("training starts", job(None, INSPECT), [Start(TRAIN, 1)], "Training", "Starting", after=2),
    Case("it waits for a GPU", job(None, INSPECT), [], "Scheduling", "InsufficientGPUs", nodes=NODES,
         attempts={"train-1": UNSCHEDULED}, conditions={"Scheduled": "False"},
         says="3 Insufficient nvidia.com/gpu; the cluster has 1 node with 1 × NVIDIA-L40S or more, none of them"),
    Case("and is told what else would do", job(None, INSPECT), [], "Scheduling", "InsufficientGPUs",
         nodes=[*NODES, *SMALL], attempts={"train-1": UNSCHEDULED},
         says="suspend the job, set spec.hardware.gpuProducts to [NVIDIA-A2] (lora, 1 GPU), and resume"),
    Case("the nodes that it was planned for are gone", job(None, INSPECT), [], "Scheduling", "InsufficientGPUs",
         nodes=SMALL, attempts={"train-1": UNSCHEDULED}, says="has no node with 1 × NVIDIA-L40S that it may use"),
    Case("our own claim, made when the plan was for one node", on_two_nodes(job(None, INSPECT)), [], "Scheduling",
         "VolumeUnavailable", after=30, says="spec.hardware.nodes: the training is planned on 2 nodes"),
    Case("an edit of hardware that contradicts the rest ends nothing: it can be taken back",
         planned_otherwise(job({"suspend": True, "hardware": {"gpus": 3}}, INSPECT)), [], "Planning",
         "BatchNotDivisible", nodes=NODES, conditions={"Planned": "False", "Failed": ""}, says="a multiple of 3"),
    Case("Kueue has not admitted it", job({"queue": {"name": "gpus"}}, INSPECT), [], "Scheduling", "Queued",
         attempts={"train-1": QUEUED}, conditions={"Scheduled": "False"}, says="the queue gpus has not admitted it"),
    Case("a claim of the user's for several nodes, and not shared",
         on_two_nodes(job({"storage.claimName": "scratch"}, INSPECT)), [], "Scheduling", "VolumeUnavailable", after=30,
         conditions={"Scheduled": "False"}, says="it lacks the access mode ReadWriteMany"),
    Case("it runs", job(None, INSPECT), [], "Training", "Running", attempts={"train-1": RUNNING},
         conditions={"Scheduled": "True", "Trained": "Unknown"}),
    Case("its Job was deleted by someone: started again under its name", job(None, INSPECT), [Start(TRAIN, 1)],
         "Training", "Starting", attempts={"train-1": Absent()}, after=2),
    Case("while the old one is stopping nothing starts", job(None, INSPECT), [], "Training", "Starting",
         attempts={"train-1": Stopping()}, after=2),
    Case("it crashed: recorded", job(None, INSPECT), [], "Training", "Starting", attempts={"train-1": given.exited(1)},
         after=0),
    Case("it waits out its back-off", job(None, INSPECT, before=CRASHED_ONCE), [], "Training", "BackOff", after=6,
         says="support-bot-train-1 ended Crashed: boom; train starts again at 12:00:06 UTC"),
    Case("and starts again under the next name", job(None, INSPECT, before=[given.attempt(TRAIN, 1, "Crashed",
         ended=NOW - timedelta(seconds=10))]), [Start(TRAIN, 2)], "Training", "Starting", after=2),
    Case("interrupted for the twelfth time: of the second nothing is left but its count", job(None, INSPECT,
         before=[given.attempt(TRAIN, n, "Interrupted") for n in range(1, 12)]), [Remove(TRAIN, 2)], "Training",
         "Starting", attempts={"train-12": given.exited(14)}, after=0),
    Case("and it goes on under the next name", job(None, INSPECT, before=[given.attempt(TRAIN, n, "Interrupted",
         ended=NOW - timedelta(minutes=5)) for n in (1, *range(30, 40))]), [Start(TRAIN, 40)], "Training", "Starting",
         after=2),
    Case("out of memory at micro-batch 8: again with 4", job(None, INSPECT), [], "Training", "Starting", after=0,
         attempts={"train-1": given.exited(13)}),
    Case("out of memory with nothing left to take away: the job fails, and says what would do",
         job(None, INSPECT, before=[given.attempt(TRAIN, 1, "OutOfMemory")]), [], "Failed", "OutOfMemory", nodes=NODES,
         kstatus="Failed", after=0, says="ran out of GPU memory; the micro-batch was 8; apply it anew with"),
    Case("out of host memory: again with more", job(None, INSPECT), [], "Training", "Starting", after=0, nodes=NODES,
         attempts={"train-1": OOM_KILLED}),
    Case("for the second time: the job fails", job(None, INSPECT, before=[given.attempt(TRAIN, 1, "HostOutOfMemory",
         change="memory 6.0 GiB → 9.0 GiB"), given.attempt(TRAIN, 2, "HostOutOfMemory")]), [], "Failed",
         "HostOutOfMemory", kstatus="Failed", after=0, says="half as much again and that was not enough"),
    Case("and no node with such a GPU has more", job(None, INSPECT, before=[given.attempt(TRAIN, 1, "HostOutOfMemory")],
         plan=given.plan(given.job(), host_memory_bytes=50 * given.GIB)), [], "Failed", "HostOutOfMemory",
         nodes=[*NODES, LARGE_CPU_NODE], kstatus="Failed", after=0, says="with half as much again, it asks for "
         "75.0 GiB of its node's memory, and of the nodes with 1 × NVIDIA-L40S that it may run on the largest, node-1, "
         "has 62.5: add a larger one"),
    Case("a merge that ran out of memory twice", job(FULL, INSPECT, TRAIN, PUBLISH_ADAPTER, before=[given.attempt(MERGE,
         1, "HostOutOfMemory", change="memory × 1.5"), given.attempt(MERGE, 2, "HostOutOfMemory")]), [], "Failed",
         "HostOutOfMemory", kstatus="Failed", after=0, says="that was not enough: give such stages more, by the "
         "chart's cpuStages"),
    Case("a merge that asks for more memory than any node without GPUs has", job(FULL, INSPECT, TRAIN, PUBLISH_ADAPTER),
         [], "Merging", "InsufficientHostMemory", nodes=[*NODES, CPU_NODE, TAINTED], attempts={"merge-1": TOO_LARGE},
         says="merge waits: not scheduled: 0/3 nodes are available: 3 Insufficient memory; it asks for 70.0 GiB of its "
         "node's memory, and of the nodes that it may run on the largest, node-1, has 62.5: add a larger one, or lower "
         "the chart's cpuStages"),
    Case("one that is only taken by others", job(FULL, INSPECT, TRAIN, PUBLISH_ADAPTER), [], "Merging",
         "InsufficientHostMemory", nodes=[LARGE_CPU_NODE], attempts={"merge-1": TOO_LARGE},
         says="merge waits: not scheduled: 0/3 nodes are available: 3 Insufficient memory."),
    Case("a training whose nodes have the GPUs and not the memory", job(None, INSPECT), [], "Scheduling",
         "InsufficientHostMemory", nodes=[*NODES, LARGE_CPU_NODE], attempts={"train-1": TOO_LARGE},
         conditions={"Scheduled": "False"}, says="the nodes with 1 × NVIDIA-L40S that it may run on the largest, "
         "node-1, has 62.5: add a larger one, or suspend the job, change spec.hardware and resume"),
    Case("its node went down: again, from the checkpoint", job(None, INSPECT, before=[given.attempt(TRAIN, 1,
         "NodeLost", ended=NOW - timedelta(seconds=2))]), [Start(TRAIN, 2)], "Training", "Starting", after=2),
    Case("its node does not answer", job(None, INSPECT), [], "Scheduling", "NodeLost",
         attempts={"train-1": Active("node-1", NOW, "its node node-1 was lost", reason=Wait.NODE)},
         conditions={"Scheduled": "False"}, says="train waits: its node node-1 was lost"),
    Case("stopped by somebody, on a node that does not answer", job(None, INSPECT), [], "Scheduling", "NodeLost",
         attempts={"train-1": LOST}, conditions={"Scheduled": "False"}, says="train waits: its node node-1 was lost",
         after=2),
    Case("suspended there", job(SUSPENDED, INSPECT), [], "Suspended", "Suspending", attempts={"train-1": LOST}, after=2,
         says="stopping train, with a checkpoint; train waits: its node node-1 was lost"),
    Case("over its budget there", job(HOUR, INSPECT, usage=Usage(gpu_seconds=3700)), [], "Scheduling",
         "BudgetExceeded", attempts={"train-1": LOST}, after=2, says="with a checkpoint; train waits: its node node-1"),
    Case("its image cannot be pulled: it holds its GPU, and its budget is its bound", job(HOUR, INSPECT), [],
         "Scheduling", "ImageNotPulled", attempts={"train-1": NO_IMAGE}, after=1800, conditions={"Scheduled": "False"},
         says="train waits: its image"),
    Case("when that is used up, it is stopped", job(HOUR, INSPECT, usage=Usage(gpu_seconds=1800)),
         [Stop(TRAIN, 1)], "Scheduling", "BudgetExceeded", attempts={"train-1": NO_IMAGE}, after=2),
    Case("without a budget it waits until it has its image", job(None, INSPECT), [], "Scheduling", "ImageNotPulled",
         attempts={"train-1": NO_IMAGE}, says="if spec.podTemplate.image is wrong, suspend the job, correct it"),
    Case("a full volume: the job stands still and says which", job(None, INSPECT, before=[FULL_VOLUME],
         observed_generation=1), [], "Training", "VolumeFull", kstatus="Failed",
         conditions={"Stalled": "True", "Trained": "False", "Failed": ""}, says="support-bot-train-1 found a volume "
         "full: the work volume has no room left; then set spec.suspend to true"),
    Case("suspended, that there is room is noted", job(SUSPENDED, INSPECT, before=[FULL_VOLUME]), [], "Training",
         "Starting", after=0),
    Case("resumed, it goes on from its checkpoint", job(None, INSPECT, before=[ROOM_MADE]), [Start(TRAIN, 2)],
         "Training", "Starting", after=2),
    Case("full again: it stands still again", job(None, INSPECT, observed_generation=1,
         before=[ROOM_MADE, given.attempt(TRAIN, 2, "VolumeFull", message="no room")]), [], "Training",
         "VolumeFull", kstatus="Failed",
         says="support-bot-train-2 found a volume full: no room"),
    Case("a merge that found it full: a publication that runs is left to run", job(FULL, INSPECT, TRAIN,
         before=[given.attempt(MERGE, 1, "VolumeFull")], observed_generation=1), [], "Merging", "VolumeFull",
         kstatus="Failed", attempts={"publish-adapter-1": RUNNING}),
    Case("failed by an earlier version: what is on it is kept, whatever it is to be kept for", over(Phase.FAILED,
         {"storage.retain": "Delete"}, INSPECT, before=[FULL_VOLUME]), [], "Failed", "", kstatus="Current"),
    Case("out of memory, onOutOfMemory: fail", job({"retry.onOutOfMemory": "fail"}, INSPECT,
         before=[given.attempt(TRAIN, 1, "OutOfMemory")]), [], "Failed", "OutOfMemory", kstatus="Failed", after=0,
         conditions={"Trained": "False"}),
    Case("too many crashes", job({"retry.maxRestarts": 0}, INSPECT, before=CRASHED_ONCE), [], "Failed",
         "TooManyRestarts", kstatus="Failed", conditions={"Trained": "False", "Failed": "True"}, after=0),
    Case("trained: recorded", job(None, INSPECT), [], "Publishing", "Starting", after=0,
         attempts={"train-1": given.succeeded(TRAIN)}, conditions={"Trained": "True", "Scheduled": "True"}),

    # --- merge and publish, side by side ---
    Case("the adapter is published while the merge runs", job(FULL, INSPECT, TRAIN),
         [Start(MERGE, 1), Start(PUBLISH_ADAPTER, 1)], "Merging", "Starting", after=2),
    Case("one runs, the other is started", job(FULL, INSPECT, TRAIN), [Start(PUBLISH_ADAPTER, 1)], "Merging", "Running",
         attempts={"merge-1": RUNNING}, after=2),
    Case("both end in one look: both recorded", job(FULL, INSPECT, TRAIN), [], "Publishing", "Starting", after=0,
         attempts={"merge-1": given.succeeded(MERGE), "publish-adapter-1": given.succeeded(PUBLISH_ADAPTER)}),
    Case("one ended, the other still runs", job(FULL, INSPECT, TRAIN), [], "Merging", "Running", after=0,
         attempts={"merge-1": RUNNING, "publish-adapter-1": given.succeeded(PUBLISH_ADAPTER)}),
    Case("the merged model is published", job(FULL, INSPECT, TRAIN, MERGE, PUBLISH_ADAPTER), [Start(PUBLISH_MERGED, 1)],
         "Publishing", "Starting", after=2),
    Case("a merge in back-off does not hold up the adapter",
         job(FULL, INSPECT, TRAIN, before=[given.attempt(MERGE, 1, "Crashed")]), [Start(PUBLISH_ADAPTER, 1)], "Merging",
         "Starting", after=2),
    Case("one given up: the job fails", given.history(given.job(FULL), before=FAILED_MERGE,
         inspection=given.inspection(), plan=given.plan(given.job(FULL)), work_volume=WorkVolume(claim_name="w")), [],
         "Failed", "BadInput", kstatus="Failed", attempts={"publish-adapter-1": RUNNING}, after=0,
         says="no config.json", conditions={"Published": "False", "Trained": "True", "Failed": "True"}),

    Case("one given up, the other ended just now: that is recorded first", given.history(given.job(FULL),
         before=FAILED_MERGE, inspection=given.inspection(), plan=given.plan(given.job(FULL)),
         artifacts=job(None, INSPECT, TRAIN).status.artifacts), [], "Merging", "Starting", after=0,
         attempts={"publish-adapter-1": given.succeeded(PUBLISH_ADAPTER)}),

    # --- the end ---
    Case("all published", job(FULL, INSPECT, TRAIN, MERGE, PUBLISH_ADAPTER, PUBLISH_MERGED), [], "Succeeded",
         "Published", kstatus="Current", conditions={"Complete": "True", "Published": "True", "Ready": "True"},
         says="merged at pvc://results/tuned/merged", after=0),
    Case("a suspended job that is done is done", job(SUSPENDED, INSPECT, TRAIN, PUBLISH_ADAPTER), [], "Succeeded",
         "Published", kstatus="Current", after=0),

    # --- suspension ---
    Case("suspended from birth: it rests with its plan", job(SUSPENDED, INSPECT, volume=False), [], "Suspended",
         "Suspended", claim=False, conditions={"Suspended": "True", "Ready": "False", "Reconciling": "False"}),
    Case("training is stopped", job(SUSPENDED, INSPECT), [Stop(TRAIN, 1)], "Suspended", "Suspending",
         attempts={"train-1": RUNNING}, conditions={"Suspended": "", "Reconciling": "True"}, after=2),
    Case("also one that waits for a GPU", job(SUSPENDED, INSPECT), [Stop(TRAIN, 1)], "Suspended", "Suspending",
         attempts={"train-1": UNSCHEDULED}, after=2),
    Case("merge and publish are stopped too", job(FULL | SUSPENDED, INSPECT, TRAIN), [Stop(MERGE, 1),
         Stop(PUBLISH_ADAPTER, 1)], "Suspended", "Suspending", after=2,
         attempts={"merge-1": RUNNING, "publish-adapter-1": RUNNING}),
    Case("while it writes its checkpoint the job does not rest", job(SUSPENDED, INSPECT), [], "Suspended", "Suspending",
         attempts={"train-1": Stopping()}, conditions={"Suspended": "", "Reconciling": "True"}, after=2),
    Case("stopped: it rests", job(SUSPENDED, INSPECT), [], "Suspended", "Suspended",
         conditions={"Suspended": "True", "Reconciling": "False", "Stalled": "False"}),
    Case("what ended meanwhile is recorded first", job(SUSPENDED, INSPECT), [], "Publishing", "Starting", after=0,
         attempts={"train-1": given.succeeded(TRAIN)}),
    Case("a failure for good is one while suspended too",
         job(SUSPENDED, INSPECT, before=[given.attempt(TRAIN, 1, "Diverged")]), [], "Failed", "Diverged",
         kstatus="Failed", after=0),
    Case("a back-off is not waited for while suspended", job(SUSPENDED, INSPECT, before=CRASHED_ONCE), [], "Suspended",
         "Suspended"),
    Case("resumed: it goes on under the same name", job(None, INSPECT), [Start(TRAIN, 1)], "Training", "Starting",
         conditions={"Suspended": ""}, after=2),

    # --- hardware edited while suspended ---
    Case("planned anew", planned_otherwise(job(EDITED, INSPECT, volume=False)), [], "Planning", "Planned", nodes=SMALL,
         says="1 × NVIDIA-A2", after=0),
    Case("out of memory once: on the same GPUs the micro-batch stays halved", planned_otherwise(job(
         {"suspend": True, "hardware.headroomPercent": 10}, INSPECT, before=[HALVED],
         plan=given.plan(given.job(), micro_batch_size=2))), [], "Planning", "Planned", nodes=NODES, after=0,
         says="1 × NVIDIA-L40S, micro-batch 2"),
    Case("and at micro-batch 1 its activations stay offloaded", planned_otherwise(job(
         {"suspend": True, "hardware.headroomPercent": 10}, INSPECT, before=[HALVED], plan=OFFLOADED)), [], "Planning",
         "Planned", nodes=NODES, after=0, says="1 × NVIDIA-L40S, micro-batch 1"),
    Case("on others it is as they allow", planned_otherwise(job(EDITED, INSPECT, before=[HALVED],
         plan=given.plan(given.job(), micro_batch_size=2))), [], "Planning",
         "Planned", nodes=SMALL, after=0, says="1 × NVIDIA-A2, micro-batch 8"),
    Case("what runs is stopped before", planned_otherwise(job(EDITED, INSPECT)), [Stop(TRAIN, 1)], "Planning",
         "Replanning", nodes=SMALL, attempts={"train-1": RUNNING}, after=2),
    Case("nothing fits any more", planned_otherwise(job(EDITED, INSPECT)), [], "Planning", "NoFlavourFits", nodes=NODES,
         says="NVIDIA-L40S: not among spec.hardware.gpuProducts", after=None, conditions={"Planned": "False"}),
    Case("after the training the plan stays", planned_otherwise(job(EDITED, INSPECT, TRAIN)), [], "Suspended",
         "Suspended"),
    Case("an edit that this version cannot do is no end: it can be taken back",
         job({"suspend": True, **NOT_BUILT}, INSPECT), [], "Pending", "NotSupported", kstatus="Failed",
         says="signingKeySecretRef", conditions={"Stalled": "True", "Failed": ""}),
    Case("and suspending is obeyed beside it", job({"suspend": True, **NOT_BUILT}, INSPECT), [Stop(TRAIN, 1)],
         "Pending", "NotSupported", kstatus="Failed", attempts={"train-1": RUNNING}),

    # --- the budget ---
    Case("within its budget it runs, and is looked at when that ends", job(HOUR, INSPECT), [], "Training", "Running",
         attempts={"train-1": ran(minutes=50)}, after=600),
    Case("the budget of GPU-hours is used up: stopped, with a checkpoint", job(HOUR, INSPECT), [Stop(TRAIN, 1)],
         "Training", "BudgetExceeded", attempts={"train-1": ran(minutes=61)}, after=2,
         says="used 1.017 GPU-hours, spec.budget.maxGPUHours is 1; stopping"),
    Case("while it writes its checkpoint it is not over", job(HOUR, INSPECT, usage=Usage(gpu_seconds=3700)), [],
         "Training", "BudgetExceeded", attempts={"train-1": Stopping()}, after=2),
    Case("stopped: the job has failed, and says what it used and where it was", job(HOUR, INSPECT,
         usage=Usage(gpu_seconds=3700), progress=Progress(step=7, steps=12)), [], "Failed", "BudgetExceeded",
         kstatus="Failed", after=0, conditions={"Failed": "True"},
         says="training was at step 7 of 12, its checkpoint is kept on the claim support-bot-work"),
    Case("earlier runs count", job(HOUR, INSPECT, usage=Usage(gpu_seconds=1800)), [Stop(TRAIN, 1)], "Training",
         "BudgetExceeded", attempts={"train-1": ran(minutes=31)}, after=2),
    Case("what was trained in time may be published", job(HOUR, INSPECT, TRAIN, usage=Usage(gpu_seconds=3700)),
         [Start(PUBLISH_ADAPTER, 1)], "Publishing", "Starting", after=2),
    Case("the time that pods ran is used up", job({"budget.maxRuntime": "30m"}, INSPECT, TRAIN,
         usage=Usage(run_seconds=1795)), [Stop(PUBLISH_ADAPTER, 1)], "Publishing", "BudgetExceeded", after=2,
         attempts={"publish-adapter-1": ran(minutes=1)}, says="ran for 0:30:55, spec.budget.maxRuntime is 30m"),
    Case("while suspended a budget can still be raised", job(HOUR | SUSPENDED, INSPECT,
         usage=Usage(gpu_seconds=3700)), [], "Suspended", "Suspended"),

    # --- afterwards ---
    Case("its time to live is not over", over(Phase.SUCCEEDED, KEPT | {"ttlSecondsAfterFinished": 60}, INSPECT, TRAIN,
         completion_time=NOW - timedelta(seconds=20)), [], "Succeeded", "", kstatus="Current", after=40),
    Case("it is: pods and orders go", over(Phase.SUCCEEDED, KEPT | {"ttlSecondsAfterFinished": 60}, INSPECT, TRAIN,
         completion_time=NOW - timedelta(seconds=60)), [Remove(INSPECT, 1), Remove(TRAIN, 1),
         Remove(PUBLISH_ADAPTER, 1)], "Succeeded", "",
         kstatus="Current"),
    Case("and the work volume that a failed job has kept", over(Phase.FAILED, {"ttlSecondsAfterFinished": 0}, INSPECT,
         completion_time=NOW), [Remove(INSPECT, 1), Remove(TRAIN, 1), DeleteWorkVolume()], "Failed", "",
         kstatus="Current"),
    Case("once", over(Phase.SUCCEEDED, KEPT | {"ttlSecondsAfterFinished": 0}, INSPECT, completion_time=NOW,
         cleanup_time=NOW), [], "Succeeded", "", kstatus="Current"),
    *[Case(f"{phase.lower()}, retain {retain}: {'kept' if kept else 'given back'}", over(phase,
           {"storage.retain": retain}, INSPECT, TRAIN, PUBLISH_ADAPTER), [] if kept else
           [Stop(TRAIN, 1), Stop(PUBLISH_ADAPTER, 1), DeleteWorkVolume()], phase, "", kstatus="Current")
      for phase, retain, kept in (
          (Phase.SUCCEEDED, "Delete", False), (Phase.SUCCEEDED, "OnFailure", False), (Phase.SUCCEEDED, "Keep", True),
          (Phase.FAILED, "Delete", False), (Phase.FAILED, "OnFailure", True), (Phase.FAILED, "Keep", True))],
    *[Case(f"{phase.lower()}, the user's claim, retain {retain}: never deleted",
           over(phase, OWN_CLAIM | {"storage.retain": retain}, INSPECT, TRAIN, PUBLISH_ADAPTER), [], phase, "",
           kstatus="Current")
      for phase in (Phase.SUCCEEDED, Phase.FAILED) for retain in ("Delete", "OnFailure", "Keep")],
    Case("given back once, not twice", over(Phase.SUCCEEDED, None, INSPECT, TRAIN, PUBLISH_ADAPTER,
         work_volume=WorkVolume(claim_name="support-bot-work", retained=False)), [], "Succeeded", "",
         kstatus="Current"),
    Case("a failed job stops what else runs", over(Phase.FAILED, FULL, before=FAILED_MERGE), [Stop(PUBLISH_ADAPTER, 1)],
         "Failed", "", attempts={"publish-adapter-1": RUNNING}, kstatus="Current"),
    Case("and starts nothing", over(Phase.FAILED, FULL, before=FAILED_MERGE), [], "Failed", "", kstatus="Current"),
]
# fmt: on


def seen_in(case: Case) -> Observed:
    return given.seen(case.job, case.attempts, claim=case.claim, outputs=case.outputs, nodes=case.nodes)


def decide(case: Case) -> Step:
    return next_step(case.job, seen_in(case), NOW)


def api_object(case: Case, status: JobStatus) -> dict[str, Any]:
    return {"metadata": {"generation": case.job.metadata.generation}, "status": status.to_api()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_decision(case: Case) -> None:
    step = decide(case)

    said = {condition.type: condition for condition in step.status.conditions}
    assert list(step.actions) == list(case.actions)
    assert step.status.phase == case.phase
    assert (said["Ready"].reason if "Ready" in said else "") == case.reason
    assert {kind: said[kind].status if kind in said else "" for kind in case.conditions} == case.conditions
    assert case.says in (step.status.message or "")
    assert (None if step.after is None else step.after.total_seconds()) == case.after
    assert kstatus(api_object(case, step.status)) == case.kstatus


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_decision_is_the_same_when_the_operator_dies_before_writing_it(case: Case) -> None:
    assert decide(case) == decide(case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_decision_survives_the_status_as_the_api_server_stores_it(case: Case) -> None:
    status = decide(case).status
    assert JobStatus.model_validate(status.to_api(), by_alias=True, by_name=False).to_api() == status.to_api()


def test_every_policy_is_told_in_the_table() -> None:
    """A policy without a case would be behaviour that nobody has looked at."""
    answered = set()
    for case in CASES:
        seen = seen_in(case)
        answered.add(next(policy.__name__ for policy in POLICIES if policy(case.job, seen, NOW)))
    assert answered == {policy.__name__ for policy in POLICIES}


# --- what is recorded ---


def test_a_failed_attempt_is_recorded_with_what_it_said() -> None:
    of = job(None, INSPECT)
    step = next_step(of, given.seen(of, {"train-1": given.exited(15, says="no CUDA device on node-1")}), NOW)
    [_, train] = step.status.attempts
    assert (train.job, train.outcome, train.exit_code, train.node) == (
        "support-bot-train-1", "EnvironmentUnfit", 15, "node-1",
    )  # fmt: skip
    assert train.message == "no CUDA device on node-1"
    assert train.ended == NOW


def test_an_ended_attempt_has_the_furthest_step_that_is_known() -> None:
    reported = Reported("support-bot-train-2", NOW, None, None, {ProgressName.STEP: 9.0})
    before = [given.attempt(TRAIN, 1, "Crashed", step=7)]
    for progress, report, step in ((None, None, 7), (8, None, 8), (8, reported, 9), (3, None, 7)):
        of = job(None, INSPECT, before=before, progress=Progress(step=progress))
        seen = replace(given.seen(of, {"train-2": given.exited(14)}), reported=report)
        assert next_step(of, seen, NOW).status.attempts[-1].step == step


def test_out_of_memory_keeps_the_effective_batch_and_says_the_change() -> None:
    of = job(None, INSPECT)
    step = next_step(of, given.seen(of, {"train-1": given.exited(13)}), NOW)
    plan, last = step.status.plan, step.status.attempts[-1]
    assert plan is not None
    assert (plan.micro_batch_size, plan.gradient_accumulation) == (4, 8)
    assert last.change == "micro-batch 8 → 4, accumulation 4 → 8"

    again = Job(of.metadata, of.spec, step.status)
    assert next_step(again, given.seen(again), NOW).actions == (Start(TRAIN, 2),)


@pytest.mark.parametrize(("edits", "nodes", "offload"), [
    ({"suspend": True, "hardware.headroomPercent": 10}, NODES, "activations"), (EDITED, SMALL, "none"),
])  # fmt: skip
def test_where_it_did_not_run_out_it_offloads_nothing(edits: dict[str, Any], nodes: list[Any], offload: str) -> None:
    of = planned_otherwise(job(edits, INSPECT, before=[HALVED], plan=OFFLOADED))
    plan = next_step(of, given.seen(of, nodes=nodes), NOW).status.plan
    assert plan is not None
    assert plan.recipe.offload == offload


def test_out_of_host_memory_is_answered_once_with_more_of_it() -> None:
    of = job(None, INSPECT)
    step = next_step(of, given.seen(of, {"train-1": OOM_KILLED}, nodes=NODES), NOW)
    last = step.status.attempts[-1]
    assert (last.outcome, last.change) == ("HostOutOfMemory", "memory 6.0 GiB → 9.0 GiB")
    assert step.status.plan == of.status.plan, "what is planned is as it was: the pod asks for more"

    again = Job(of.metadata, of.spec, step.status)
    assert next_step(again, given.seen(again), NOW).actions == (Start(TRAIN, 2),)
    second = next_step(again, given.seen(again, {"train-2": OOM_KILLED}, nodes=NODES), NOW).status
    assert second.attempts[-1].change is None


LACKS_MEMORY = {"key": "node.kubernetes.io/memory-pressure", "effect": "NoSchedule"}
LARGE_NODE = given.gpu_node("node-5", *given.L40S, memory="512Gi")
FOR_MORE_MEMORY: list[Any] = [
    # the nodes, edits, the change; 50 GiB are planned
    pytest.param(NODES, {}, None, id="too small"),
    pytest.param([*NODES, LARGE_CPU_NODE], {}, None, id="a larger one has no GPU"),
    pytest.param([*NODES, given.gpu_node("node-5", *given.H100, memory="512Gi")], {}, None, id="nor the planned GPU"),
    pytest.param([*NODES, LARGE_NODE], {}, "memory 50.0 GiB → 75.0 GiB", id="one with the planned GPU"),
    pytest.param([*NODES, LARGE_NODE], {"podTemplate.nodeSelector": {"team": "ml"}}, None, id="that is not selected"),
    pytest.param([*NODES, given.gpu_node("node-5", *given.L40S, memory="512Gi", taints=[LACKS_MEMORY], ready=False)],
                 {}, "memory 50.0 GiB → 75.0 GiB", id="that is away for a moment, as after running out of memory"),
    pytest.param([given.cpu_node("node-2", "512Gi")], {}, "memory 50.0 GiB → 75.0 GiB",
                 id="none is there: its pod waits for one"),
]  # fmt: skip


@pytest.mark.parametrize(("nodes", "edits", "change"), FOR_MORE_MEMORY)
def test_more_host_memory_than_its_nodes_have_is_not_asked_for(
    nodes: list[Any], edits: dict[str, Any], change: str | None
) -> None:
    """The pod would wait for ever for a node that can take it."""
    of = given.job({"podTemplate": {}} | edits)
    of = given.history(of, INSPECT, plan=given.plan(of, host_memory_bytes=50 * given.GIB))
    selected = [given.gpu_node("node-0", *given.L40S, labels={"team": "ml"}), *nodes]
    step = next_step(of, given.seen(of, {"train-1": OOM_KILLED}, nodes=selected if edits else nodes), NOW)
    assert step.status.attempts[-1].change == change


def test_once_there_is_room_the_job_goes_on_by_suspending_and_resuming() -> None:
    full, resumed = job(SUSPENDED, INSPECT, before=[FULL_VOLUME]), job(None, INSPECT)
    noted = next_step(full, given.seen(full), NOW).status
    suspended = next_step(Job(full.metadata, full.spec, noted), given.seen(full), NOW)
    assert (suspended.status.phase, suspended.actions) == (Phase.SUSPENDED, ())
    step = next_step(Job(resumed.metadata, resumed.spec, suspended.status), given.seen(resumed), NOW)
    assert step.actions == (Start(TRAIN, 2),)
    assert step.status.work_volume == full.status.work_volume, "the same, with the checkpoints on it"


def test_a_job_that_was_suspended_and_resumed_between_two_looks_goes_on() -> None:
    """Two patches, one after the other: the operator may see the second alone."""
    full = job(None, INSPECT, before=[FULL_VOLUME], observed_generation=1)
    resting = next_step(full, given.seen(full), NOW).status
    later = Job(full.metadata.model_copy(update={"generation": 3}), full.spec, resting)
    assert next_step(Job(full.metadata, full.spec, resting), given.seen(full), NOW).status == resting
    noted = next_step(later, given.seen(later), NOW).status
    assert next_step(Job(later.metadata, later.spec, noted), given.seen(later), NOW).actions == (Start(TRAIN, 2),)


def test_each_node_of_a_plan_on_several_needs_the_memory() -> None:
    plan = given.plan(given.job(), gpus=2, nodes=2, micro_batch_size=1, host_memory_bytes=50 * given.GIB)
    of = job(None, INSPECT, plan=plan)
    ends = {"train-1": OOM_KILLED}
    one = next_step(of, given.seen(of, ends, nodes=[*NODES, LARGE_NODE]), NOW)
    assert one.status.attempts[-1].change is None
    two = [*NODES, LARGE_NODE, given.gpu_node("node-6", *given.L40S, memory="100Gi")]
    assert next_step(of, given.seen(of, ends, nodes=two), NOW).status.attempts[-1].change is not None


def test_a_stage_without_gpus_asks_for_more_as_far_as_any_node_has_it() -> None:
    of = job(FULL, INSPECT, TRAIN, PUBLISH_ADAPTER)
    ends, installation = {"merge-1": OOM_KILLED}, Installation(stage_memory_bytes=30 * given.GIB)
    for nodes, change in (([CPU_NODE, TAINTED], None), ([CPU_NODE, *NODES], "memory 30.0 GiB → 45.0 GiB")):
        seen = replace(given.seen(of, ends, nodes=nodes), installation=installation)
        assert next_step(of, seen, NOW).status.attempts[-1].change == change


def test_training_brings_scores_loss_measured_memory_and_the_adapter() -> None:
    of = job(None, INSPECT)
    status = next_step(of, given.seen(of, {"train-1": given.succeeded(TRAIN)}), NOW).status
    assert status.progress is not None
    assert (status.progress.loss, status.progress.step, status.progress.percent) == (0.5124, 12, 94)
    assert (status.progress.tokens_per_second, status.progress.mfu) == (1234, 0.412)
    assert status.evaluation is not None
    assert [(s.metric, s.base, s.tuned) for s in status.evaluation.scores] == [("exactMatch", 0.1, 0.7)]
    assert status.plan is not None
    assert status.plan.memory.measured_bytes == 3 * given.GIB
    assert [(a.name, a.state, a.digest) for a in status.artifacts] == [("adapter", "Made", "sha256:adapter")]


def test_a_gate_that_does_not_hold_fails_the_job_with_the_scores_and_publishes_nothing() -> None:
    of = job(FULL, INSPECT)
    verdict = Verdict(metric="exactMatch", bound="min", limit=0.8, base=0.1, tuned=0.7, passed=False)
    result = given.RESULTS[TRAIN.stage].model_copy(update={"gates": [verdict], "selected_step": 8})
    report = given.report(TRAIN, failure="evaluation.gates: exactMatch is to be at least 0.8 and is 0.7")
    report = report.model_copy(update={"result": result.model_dump(mode="json", by_alias=True, exclude_none=True)})
    ended = replace(given.exited(11), report=report)
    recorded = next_step(of, given.seen(of, {"train-1": ended}), NOW)
    after = Job(of.metadata, of.spec, recorded.status)
    step = next_step(after, given.seen(after), NOW)
    assert (recorded.actions, step.actions) == ((), ())
    status = step.status
    assert status.phase is Phase.FAILED
    assert status.attempts[-1].outcome == "GateFailed"
    assert "train-1 did not pass a gate: evaluation.gates: exactMatch is to be" in (status.message or "")
    assert status.evaluation is not None
    assert (status.evaluation.gates, status.evaluation.selected_step) == ((verdict,), 8)
    assert [(s.metric, s.tuned) for s in status.evaluation.scores] == [("exactMatch", 0.7)]
    assert [(a.name, a.state) for a in status.artifacts] == [("adapter", "Made")]
    assert status.work_volume is not None
    assert status.work_volume.retained


def test_both_artifacts_end_up_published_in_whichever_order() -> None:
    of = job(FULL, INSPECT, TRAIN)
    ended: dict[str, Seen] = {"publish-adapter-1": given.succeeded(PUBLISH_ADAPTER), "merge-1": given.succeeded(MERGE)}
    status = next_step(of, given.seen(of, ended), NOW).status
    assert {(a.name, a.state) for a in status.artifacts} == {("adapter", "Published"), ("merged", "Made")}
    assert {a.digest for a in status.artifacts} == {"sha256:adapter", "sha256:merged"}


def test_a_deleted_work_volume_leaves_no_artifact_that_lay_on_it() -> None:
    of = over(Phase.FAILED, FULL | {"storage.retain": "Delete"}, INSPECT, TRAIN, MERGE, PUBLISH_ADAPTER)
    status = next_step(of, given.seen(of), NOW).status
    assert [(a.name, a.state) for a in status.artifacts] == [("adapter", "Published")]
    assert status.work_volume is not None
    assert status.work_volume.retained is False


def test_a_failed_job_shows_no_attempt_as_still_running() -> None:
    of = given.history(given.job(FULL), before=FAILED_MERGE)
    step = next_step(of, given.seen(of, {"publish-adapter-1": RUNNING}), NOW)
    failed = Job(of.metadata, of.spec, step.status)
    status = next_step(failed, given.seen(failed, {"publish-adapter-1": RUNNING}), NOW).status
    assert all(attempt.outcome for attempt in status.attempts)


def test_a_live_attempt_is_listed_with_its_node_and_replaced_by_its_end() -> None:
    of = job(None, INSPECT)
    live = next_step(of, given.seen(of, {"train-1": RUNNING}), NOW).status
    assert [(a.job, a.node, a.outcome) for a in live.attempts[1:]] == [("support-bot-train-1", "node-1", None)]

    then = Job(of.metadata, of.spec, live)
    done = next_step(then, given.seen(then, {"train-1": given.succeeded(TRAIN)}), NOW).status
    assert [(a.job, a.outcome) for a in done.attempts[1:]] == [("support-bot-train-1", "Succeeded")]


# --- planned anew ---


@pytest.mark.parametrize(
    ("of", "kept"),
    [
        pytest.param(job(EDITED, INSPECT, volume=False), False, id="nothing begun: the best method for the new GPUs"),
        pytest.param(job(EDITED, INSPECT), False, id="on its volume, and not at work yet"),
        pytest.param(job(EDITED, INSPECT, usage=Usage(gpu_seconds=7)), True, id="a run that was stopped"),
        pytest.param(job(EDITED, INSPECT, progress=Progress(step=3)), True, id="steps were reported"),
        pytest.param(job(EDITED, INSPECT, before=CRASHED_ONCE, volume=False), True, id="an attempt has run"),
    ],
)
def test_a_new_plan_keeps_the_recipe_once_training_has_begun(of: Job, kept: bool) -> None:
    """Checkpoints are bound to the recipe: with another one they would be thrown away."""
    old = of.status.plan
    assert old is not None
    other = old.model_copy(update={"planned_for": "sha256:before", "recipe": given.recipe(method="qlora", rank=8)})
    of = Job(of.metadata, of.spec, of.status.model_copy(update={"plan": other}))

    new = next_step(of, given.seen(of, nodes=SMALL), NOW).status.plan

    assert new is not None
    assert new.flavour == "NVIDIA-A2"
    assert (new.recipe == other.recipe) == kept
    assert (new.recipe.method == "lora") != kept


def test_a_plan_that_an_earlier_version_stored_still_finds_its_gpus() -> None:
    """It said neither what a pod asks for nor by which labels: no node would match an empty term."""
    stored = given.plan(job()).to_api()
    for name in ("resource", "labels", "memoryLabel"):
        del stored[name]
    read = Plan.model_validate(stored, by_alias=True, by_name=False)
    assert (read.resource, read.memory_label) == ("nvidia.com/gpu", "nvidia.com/gpu.memory")
    assert read.labels == {"nvidia.com/gpu.product": "NVIDIA-L40S"}
    assert (
        Plan.model_validate(given.plan(job({"hardware.accelerator": "cpu"})).to_api(), by_alias=True).resource is None
    )


def test_a_plan_once_made_is_not_made_again_in_the_next_pass() -> None:
    of = job(None, INSPECT, planned=False)
    planned = Job(of.metadata, of.spec, next_step(of, given.seen(of, nodes=NODES), NOW).status)
    assert is_to_be_planned(of)
    assert not is_to_be_planned(planned)
    assert next_step(planned, given.seen(planned, claim=False, nodes=SMALL), NOW).actions == (CreateWorkVolume(),)


def test_the_installations_tolerations_count_in_the_plan() -> None:
    taint = {"key": "team", "value": "ml", "effect": "NoSchedule"}
    of = job(None, INSPECT, planned=False)
    seen = given.seen(of, nodes=[given.gpu_node("node-1", *given.L40S, taints=[taint])])
    assert next_step(of, seen, NOW).status.plan is None
    installation = Installation(tolerations=[{"key": "team", "operator": "Exists"}])
    tolerant = type(seen)(seen.attempts, seen.claims, seen.inventory, installation)
    assert next_step(of, tolerant, NOW).status.plan is not None


# --- edits and refusals ---


def test_an_edit_of_a_finished_job_is_acknowledged_and_changes_nothing() -> None:
    done = over(Phase.SUCCEEDED, {"storage.retain": "Keep"}, INSPECT, TRAIN, PUBLISH_ADAPTER)
    edited = given.history(given.job({"suspend": True, "storage.retain": "Keep"}, generation=2))
    step = next_step(Job(edited.metadata, edited.spec, done.status), given.seen(edited), NOW)
    assert step.actions == ()
    assert step.status == done.status.model_copy(update={"observed_generation": 2})


def test_a_refused_call_is_said_and_loses_nothing() -> None:
    of = job(None, INSPECT, before=CRASHED_ONCE)
    status = call_refused(of, "ApiError", "create Job support-bot-train-2: 403 exceeded quota", NOW)
    assert "exceeded quota" in (status.message or "")
    assert (status.attempts, status.plan, status.inspection) == (
        of.status.attempts, of.status.plan, of.status.inspection,
    )  # fmt: skip
    assert kstatus({"metadata": {"generation": 1}, "status": status.to_api()}) == "InProgress"


@pytest.mark.parametrize("formats", [["adapter"], ["merged"], BOTH])
def test_the_tasks_of_a_job_are_what_its_formats_need(formats: list[str]) -> None:
    named = [task.name for task in tasks(given.job({"output.formats": formats}).spec)]
    assert named == [
        "inspect", "train", *["merge" for f in formats if f == "merged"], *[f"publish-{f}" for f in formats],
    ]  # fmt: skip


def test_an_attempts_long_message_does_not_blow_up_the_status() -> None:
    of = job(None, INSPECT)
    ended = Ended(False, exit_code=1, detail="é" * 20_000, ended=NOW)
    status = next_step(of, given.seen(of, {"train-1": ended}), NOW).status
    assert len(status.attempts[-1].message or "") <= 1000
