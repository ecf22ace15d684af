"""What can go wrong, what a user then sees, and what helps: one table for docs/troubleshooting.md and for the tests.

`python -m tests.e2e.troubleshooting` writes the page; tests/e2e/test_faults.py holds the cluster against it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_operator.lifecycle.answers import ANSWERS
from qlora_operator.lifecycle.pending import WAITS
from tests.cluster.settings import REGISTRY

PAGE = Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md"

#: Stands for any text.
ANY = "…"
#: A GPU that is too small for anything.
TINY = "Tiny-GPU"
#: Of the bad files that `write_bad_files` makes, the line that is bad.
BAD_LINE = 3
BAD_LINES = {
    "broken.jsonl": '{"messages": [{"role": "user", "content": "q"}, {"role": "assist',
    "role.jsonl": '{"messages": [{"role": "user", "content": "q"}, {"role": "asistant", "content": "a"}]}',
}


@dataclass(frozen=True)
class Trouble:
    """One thing that goes wrong.

    `says` is part of `status.message` (of the client's error where there is no `phase`), `ANY` standing for any text.
    `spec` replaces whole parts of the quickstart's spec so that it goes wrong; without it a test makes it happen.
    """

    name: str
    phase: str
    reason: str
    says: str
    means: str
    cure: str
    spec: Mapping[str, Any] = field(default_factory=dict)

    def is_said_in(self, message: str) -> bool:
        """Whether `message` is the one that the page promises."""
        return is_said(self.says, message)


def is_said(text: str, message: str) -> bool:
    """Whether `text` is part of `message`, where `ANY` stands for any text."""
    parts = (re.escape(part) for part in text.split(ANY))
    return re.search(".*?".join(parts), message, re.DOTALL) is not None


def train_on(uri: str, *, max_length: int = 256) -> dict[str, Any]:
    """The part of a spec that names the training data."""
    return {"dataset": {"train": [{"uri": uri}], "maxLength": max_length}}


#: Jobs that fail for good: as they are, no attempt could end otherwise.
REFUSED = (
    Trouble(
        "data-missing", "Failed", "BadInput",
        "dataset.train[0]: pvc://quickstart/trian.jsonl does not exist; there is …train.jsonl",
        "The claim is there, the file is not; what lies in its place is listed.",
        "Correct the path and apply the job under another name.",
        train_on("pvc://quickstart/trian.jsonl"),
    ),
    Trouble(
        "broken-line", "Failed", "BadInput",
        f"dataset.train[0] line {BAD_LINE}: not JSON: Unterminated string starting at column …; "
        "each line is one whole example",
        "The line was cut, or an example was spread over several lines. The first five such lines are named.",
        "Mend the data; apply the job under another name.",
        train_on("pvc://quickstart/bad/broken.jsonl"),
    ),
    Trouble(
        "unknown-role", "Failed", "BadInput",
        f'dataset.train[0] line {BAD_LINE}: messages[1]: role "asistant"; roles are system, user, assistant, tool',
        "A message is of nobody that the chat template knows.",
        "Mend the data; apply the job under another name.",
        train_on("pvc://quickstart/bad/role.jsonl"),
    ),
    Trouble(
        "empty-data", "Failed", "BadInput",
        "dataset.train[0]: pvc://quickstart/bad/empty.jsonl has no examples; each line of a JSONL file is one",
        "The file is empty, or has blank lines only.",
        "Look whether the export that wrote it has ended.",
        train_on("pvc://quickstart/bad/empty.jsonl"),
    ),
    Trouble(
        "data-too-long", "Failed", "BadInput",
        "dataset.maxLength: 1024 is more than the 512 tokens the model was built for",
        "The model has no positions for so many tokens.",
        "Lower or leave out `dataset.maxLength`, or take another model.",
        train_on("pvc://quickstart/train.jsonl", max_length=1024),
    ),
    Trouble(
        "model-missing", "Failed", "BadInput",
        "model.uri: pvc://quickstart/bsae is no directory; beside it: …base",
        "The claim is there, the directory is not; what lies beside it is listed.",
        "Correct the path and apply the job under another name.",
        {"model": {"uri": "pvc://quickstart/bsae"}},
    ),
    Trouble(
        "not-causal", "Failed", "BadInput",
        "model.uri: pvc://quickstart/bad/t5 is a 't5' model, not a causal language model: use a decoder-only one",
        "Encoders, encoder-decoders and vision models do not continue texts.",
        "Take a decoder-only model, such as Llama, Qwen or Mistral.",
        {"model": {"uri": "pvc://quickstart/bad/t5"}},
    ),
    Trouble(
        "no-schema", "Failed", "BadInput",
        "evaluation.answerSchema: not a JSON Schema: 'objekt' is not valid under any of the given schemas",
        "Answers are to be checked against something that is no JSON Schema.",
        "Mend `evaluation.answerSchema`; apply the job under another name.",
        {"evaluation": {"golden": {"uri": "pvc://quickstart/golden.jsonl"}, "answerSchema": '{"type": "objekt"}'}},
    ),
    Trouble(
        "no-such-layer", "Failed", "UnknownTargetModules",
        "spec.lora.targetModules: the model has no linear layer w1; it has …q_proj",
        "LoRA is to be attached to layers that the model does not have.",
        "Take names from the list, or leave the field out: then it is all of them.",
        {"lora": {"targetModules": ["w1"]}},
    ),
    Trouble(
        "not-built", "Failed", "NotSupported",
        "spec.output.signingKeySecretRef: not supported by this version; remove the field",
        "The field is part of the resource; this version would ignore it, and refuses the job instead.",
        "Remove the field.",
        {"output": {"uri": "pvc://quickstart/models/not-built", "signingKeySecretRef": {"name": "key"}}},
    ),
)  # fmt: skip

#: Jobs that wait, and go on by themselves when their cause is gone.
WAITING = (
    Trouble(
        "no-data-claim", "Inspecting", "ClaimMissing",
        "inspect waits: spec.dataset.train[0].uri: there is no PersistentVolumeClaim tickets in this namespace; "
        "create it",
        "The job's pods cannot start: claims are looked up in the job's own namespace.",
        "Create the claim, and the job goes on; or delete the job and correct the address.",
        train_on("pvc://tickets/train.jsonl"),
    ),
    Trouble(
        "no-model-claim", "Inspecting", "ClaimMissing",
        "inspect waits: spec.model.uri: there is no PersistentVolumeClaim models in this namespace; create it",
        "As before, for the model.",
        "As before.",
        {"model": {"uri": "pvc://models/base"}},
    ),
    Trouble(
        "no-work-claim", "Scheduling", "ClaimMissing",
        "spec.storage.claimName: there is no PersistentVolumeClaim scratch in this namespace; create it",
        "The work volume is to be a claim of yours: the operator makes none in its place.",
        "Create the claim, and the job goes on within a minute.",
        {"storage": {"claimName": "scratch"}, "planOnly": False},
    ),
    Trouble(
        "no-output-claim", "Scheduling", "ClaimMissing",
        "spec.output.uri: there is no PersistentVolumeClaim results in this namespace; create it",
        "The results would have no place. Nothing is trained before there is one.",
        "As before.",
        {"output": {"uri": "pvc://results/tuned"}, "planOnly": False},
    ),
    Trouble(
        "no-image", "Inspecting", "ImageNotPulled",
        "inspect waits: its image …/no-such-trainer:v9 cannot be pulled (…); if spec.podTemplate.image is wrong, "
        "suspend the job, correct it and resume",
        "A typing error, a registry that is away, or one that asks for a Secret (`podTemplate.imagePullSecrets`).",
        "The kubelet tries again by itself. Another image: set `suspend: true`, edit `podTemplate`, then "
        "`suspend: false`.",
        {"podTemplate": {"image": f"{REGISTRY}/no-such-trainer:v9"}},
    ),
    Trouble(
        "gpu-too-small", "Planning", "NoFlavourFits",
        f"no GPU can take this training: …{TINY}: 0.5 GiB ×…: qlora at micro-batch 1 × 256 tokens needs … GiB, short "
        "by … GiB… Add such a node, or suspend the job, change spec.hardware and resume",
        "Every kind of GPU in the cluster is listed with what it lacks; GPUs that are taken at the moment count as "
        "there.",
        "Add a node: the job is planned within a minute. Or allow more products, or give the job up and apply one "
        "with a smaller model, `maxLength` or `microBatchSize`.",
        {"hardware": {"accelerator": "nvidia"}},
    ),
    Trouble(
        "node-too-small", "Planning", "NoNodeFits",
        "no node that the job may run on has the memory: … GiB needed, the largest has …. Add such a node",
        "The same for a training on the CPU: nodes are judged by their allocatable memory.",
        "As before.",
        {"training": {"effectiveBatchSize": 65536, "microBatchSize": 65536}},
    ),
)  # fmt: skip

#: What the API server refuses; nothing is stored, so there is no status.
EDITED = Trouble(
    "edited", "", "",
    "training is immutable: a job is one run; create another job for another run",
    "A job that has begun with one recipe cannot end with another.",
    "Apply it under another name. `suspend` and `ttlSecondsAfterFinished` may change at any time; `hardware`, "
    "`podTemplate`, `queue`, `retry` and `budget` while `suspend` is true.",
)  # fmt: skip
INVALID = Trouble(
    "invalid", "", "",
    "epochs and maxSteps exclude each other: set one of them or none",
    "The manifest contradicts itself; the message names the field.",
    "Correct it and apply again: nothing was stored.",
    {"training": {"epochs": 1, "maxSteps": 10}},
)  # fmt: skip
REFUSED_BY_THE_SERVER = (INVALID, EDITED)

#: What happens to a job on its way.
KILLED = Trouble(
    "killed", "Training", "BackOff",
    "ended Crashed: killed from outside (SIGKILL); train starts again at … UTC",
    "Somebody or something on the node has ended the process.",
    "Nothing: the next attempt goes on from the checkpoint, at most `retry.maxRestarts` times.",
)  # fmt: skip
DRAINED = Trouble(
    "drained", "Scheduling", "NoMatchingNode",
    "train waits: not scheduled: …unschedulable",
    "The node is cordoned or full. A pod that was evicted is replaced within the same attempt.",
    "Nothing, if the node comes back or another one fits; the scheduler's message says what each node lacks.",
)  # fmt: skip
TAKEN = Trouble(
    "taken", "Failed", "BadInput",
    "output.uri: pvc://quickstart/models/… exists and holds something else: choose another output.uri, remove what "
    "is there, or set output.overwrite",
    "Another job has published there. What it published is untouched.",
    "The adapter is on the work volume (`status.workVolume`), unless `storage.retain` is `Delete`. Apply the job under "
    "another name with another `output.uri`.",
)  # fmt: skip
OUTGROWN = Trouble(
    "outgrown", "Training", "Starting",
    "starting train",
    "`status.attempts` has an attempt that ended `OutOfMemory`, with the `change` that is made for the next one; the "
    "effective batch stays.",
    "Nothing. Where the last resort was of no use either, the job fails with `OutOfMemory` and says what would do.",
)  # fmt: skip
DIVERGED = Trouble(
    "diverged", "Failed", "Diverged",
    "diverged: loss or gradients were not finite in 3 steps in a row, up to step …: lower training.learningRate (1), "
    "compute in bfloat16, or look at the data",
    "The training has run away: the rate is too high, float16 overflows, or an example is odd.",
    "As it says; apply the job under another name.",
    {
        "training": {"maxSteps": 30, "effectiveBatchSize": 1, "gradientCheckpointing": False, "learningRate": 1.0,
                     "warmupFraction": 0},
        "lora": {"rank": 1, "alpha": 4096},
        "quantization": {"computeDtype": "float16"},
    },
)  # fmt: skip
FULL = Trouble(
    "full", "Training", "VolumeFull",
    "found a volume full: the work volume of … has no room left: what is on it is kept; enlarge its claim, or make "
    "room on it; then set spec.suspend to true and back to false",
    "A checkpoint, the adapter or the merged model did not fit. What was there before is whole. The job is `Stalled`, "
    "which Flux, Argo CD and `helm --wait` take for failed; it holds no GPU.",
    "As it says (`kubectl patch pvc` where the storage class has `allowVolumeExpansion`), and it goes on from the last "
    "checkpoint. The same for the claim of `output.uri`: what is trained is not trained again. Another job cannot go "
    "on from there: to give up, delete this one, and its volume goes with it.",
    {"storage": {"retain": "Delete", "size": "1Gi"}, "checkpoint": {"every": "1s"}},
)  # fmt: skip
KEPT_BACK = Trouble(
    "kept-back", "Failed", "GateFailed",
    "kept-back-train-1 did not pass a gate: evaluation.gates: evalLoss is to be at most 0.01 and is …; nothing is "
    "published, the adapter is on the work volume",
    "The tuned model is not as good as `evaluation.gates` asks. Its scores stand in `status.evaluation`.",
    "Look at the answers in the report on the work volume ([evaluation](evaluation.md)). Apply the job with other "
    "data, another recipe or another gate, under another name.",
)  # fmt: skip
ON_ITS_WAY = (KILLED, DRAINED, TAKEN, OUTGROWN, DIVERGED, FULL, KEPT_BACK)


def write_bad_files(directory: Path, good: Path) -> Path:
    """The directory `bad` with the data and the model that `REFUSED` names, the data made from the lines of `good`."""
    bad = directory / "bad"
    (bad / "t5").mkdir(parents=True)
    lines = good.read_text().splitlines()[:5]
    for name, line in BAD_LINES.items():
        (bad / name).write_text("\n".join([*lines[: BAD_LINE - 1], line, *lines[BAD_LINE:]]))
    (bad / "empty.jsonl").write_text("\n")
    (bad / "t5" / "config.json").write_text(json.dumps({"model_type": "t5"}))
    return bad


def page() -> str:
    """docs/troubleshooting.md."""
    parts = [
        "# Troubleshooting\n",
        "`kubectl get qj NAME -o jsonpath='{.status.message}'` says where a job stands or why it does not move;\n"
        "`kubectl describe qj NAME` shows what happened before. The tests make each of these happen on a real cluster "
        "and read\nthe message there; `…` stands for what varies.\n",
        "## It has failed\n",
        "`Failed`: another attempt would end the same way, so there is none. Flux, Argo CD and `helm --wait` see it at "
        "once.\nA job is one run: the corrected one needs another name, or the failed one deleted first.\n",
        _table((*REFUSED, TAKEN, DIVERGED, KEPT_BACK)),
        "A failed job is not taken up again, and another one does not go on from its checkpoints, for each works in a "
        "directory of its own.\nWhat is on the volume that `storage.retain` keeps can be copied.\n",
        "## It stands still\n",
        "`Stalled=True`, and not failed: it goes on when somebody has done what the message says.\n",
        _table((FULL,)),
        "## It waits\n",
        "`Ready=False`, `Reconciling=True`: it goes on by itself when the cause is gone.\n",
        _table((*WAITING, KILLED, DRAINED)),
        "## The API server refuses it\n",
        _table(REFUSED_BY_THE_SERVER),
        "## How an attempt ends, and what follows\n",
        "`status.attempts` has the outcome of each, its exit code, what it said, and the `change` made for the next "
        "one. What an\nattempt says by its exit code goes before what the kubelet says of it.\n",
        _answers(),
        "The back-off is doubled by each such end, whatever its reason, and begins anew once the training has come a "
        "step further than\nbefore (`attempts[].step`). What does not count may happen without end, for it is not the "
        "job's fault: `budget` bounds what\nit may cost (`maxRuntime` and `maxGPUHours` count what ran in vain, too). "
        "Of the ends of each stage the first, the newest ten\nand those with a `change` are listed; "
        "`status.olderAttempts` counts the others by outcome, and their pods and logs are deleted.\n",
        "Some ends are none: a pod that is evicted or preempted is replaced within its attempt.\n",
        "## What a stage waits for\n",
        "A pod that does not run yet, or cannot end, is no attempt that has failed: the job waits, says why, and goes "
        "on by itself when\nthe cause is gone. These are the reasons of `Ready=False` and, for the training, of "
        "`Scheduled=False`.\n",
        _waits(),
        "No wait fails a job by itself, however long it lasts: the cause is mostly outside of it. Waiting for a node "
        "costs nothing.\nA pod that has its node holds its GPUs, even while it waits for its image or its node is "
        "silent: that counts as running, and\n`budget` bounds it. A job to be given up is deleted or suspended.\n",
    ]
    return "\n".join(parts)


def _table(rows: Iterable[Trouble]) -> str:
    head = "| you see | it means | what to do |\n|---|---|---|\n"
    return head + "".join(f"| {_seen(row)} | {row.means} | {row.cure} |\n" for row in rows)


def _answers() -> str:
    rows = (f"| {how} | {row.seen} | {row.follows} |\n" for how, row in ANSWERS.items())
    return "| outcome | recognised by | what follows |\n|---|---|---|\n" + "".join(rows)


def _waits() -> str:
    rows = (f"| {wait} | {row.seen} | {row.ends} |\n" for wait, row in WAITS.items())
    return "| reason | recognised by | it goes on when |\n|---|---|---|\n" + "".join(rows)


def _seen(row: Trouble) -> str:
    what = f"{row.phase}, {row.reason}:<br>" if row.phase else ""
    return f"{what}`{row.says}`"


if __name__ == "__main__":
    PAGE.write_text(page())
