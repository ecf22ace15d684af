"""What of the resource this version does not do yet: a job that asks for it is refused at once, never half-obeyed.

The fields are listed by their dotted path, `[]` for the items of a list. A path stands for all that lies below it. What
a later version builds is taken out of `LIMITS`; a test asks that every field of the spec stands in one of the tables.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_api.v1alpha1 import JobSpec


@dataclass(frozen=True)
class Only:
    """A field of which only some values work yet; with none, it must be left out, or at its default."""

    values: tuple[Any, ...] = ()

    def takes(self, value: Any) -> bool:
        """Whether this version does what the value asks for."""
        return value in self.values

    def advice(self) -> str:
        """What to do instead."""
        return f"use {' or '.join(map(str, self.values))}" if self.values else "remove the field"


@dataclass(frozen=True)
class OnlySchemes:
    """An address of which only some schemes work yet: scheme to example."""

    examples: Mapping[str, str]

    def takes(self, value: Any) -> bool:
        """Whether this version can reach the address."""
        return str(value).partition("://")[0] in self.examples

    def advice(self) -> str:
        """What to do instead."""
        return f"use {' or '.join(self.examples.values())}"


NOT_YET = Only()
CLAIM_OR_S3 = OnlySchemes({"pvc": "pvc://claim/path", "s3": "s3://bucket/path"})
CLAIM_S3_OR_HUB = OnlySchemes({**CLAIM_OR_S3.examples, "hf": "hf://owner/name"})

LIMITS: dict[str, Only | OnlySchemes] = {
    "model.uri": CLAIM_S3_OR_HUB,
    "model.trustRemoteCode": NOT_YET,
    "dataset.train[].uri": CLAIM_S3_OR_HUB,
    "dataset.eval.uri": CLAIM_S3_OR_HUB,
    "evaluation.golden.uri": CLAIM_S3_OR_HUB,
    "evaluation.canary.uri": CLAIM_S3_OR_HUB,
    "output.uri": CLAIM_OR_S3,
    "output.formats[]": Only(("adapter", "merged")),
    "output.signingKeySecretRef": NOT_YET,
    "offline": NOT_YET,
}

SUPPORTED = frozenset({
    "model.revision",
    "model.credentialsSecretRef",
    "dataset.train[].revision",
    "dataset.train[].credentialsSecretRef",
    "dataset.train[].format",
    "dataset.train[].weight",
    "dataset.eval.revision",
    "dataset.eval.credentialsSecretRef",
    "dataset.eval.format",
    "dataset.evalFraction",
    "dataset.maxLength",
    "dataset.packing",
    "dataset.loss",
    "dataset.logSamples",
    "method",
    "quantization.type",
    "quantization.doubleQuant",
    "quantization.computeDtype",
    "lora.rank",
    "lora.alpha",
    "lora.dropout",
    "lora.targetModules",
    "lora.rslora",
    "lora.dora",
    "lora.init",
    "training.epochs",
    "training.maxSteps",
    "training.learningRate",
    "training.minLearningRate",
    "training.schedule",
    "training.warmupFraction",
    "training.effectiveBatchSize",
    "training.microBatchSize",
    "training.optimizer",
    "training.seed",
    "training.gradientCheckpointing",
    "training.attention",
    "training.offload",
    "training.maxGradNorm",
    "training.evalsPerEpoch",
    "training.earlyStoppingEpochs",
    "training.bestMetric",
    "evaluation.golden.revision",
    "evaluation.canary.revision",
    "evaluation.golden.credentialsSecretRef",
    "evaluation.golden.format",
    "evaluation.canary.format",
    "evaluation.canary.credentialsSecretRef",
    "evaluation.metrics",
    "evaluation.answerSchema",
    "evaluation.gates",
    "evaluation.judge",
    "hardware",
    "queue",
    "podTemplate",
    "storage",
    "checkpoint",
    "output.credentialsSecretRef",
    "output.mergeBase",
    "output.overwrite",
    "retry",
    "budget",
    "ttlSecondsAfterFinished",
    "suspend",
    "planOnly",
})  # fmt: skip


def unsupported(spec: JobSpec) -> list[str]:
    """What the spec asks for that this version does not do, a sentence each; empty if it can all be done."""
    asked = spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)
    return list(_refused(asked, path="", shown="spec"))


def _refused(node: Any, path: str, shown: str) -> Iterator[str]:
    limit = LIMITS.get(path)
    if limit is not None:
        if not limit.takes(node):
            found = "" if isinstance(node, dict | list) or limit is NOT_YET else f"{node} is "
            yield f"{shown}: {found}not supported by this version; {limit.advice()}"
    elif isinstance(node, dict):
        for name, child in node.items():
            yield from _refused(child, f"{path}.{name}".lstrip("."), f"{shown}.{name}")
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from _refused(child, f"{path}[]", f"{shown}[{index}]")


def limit_on(path: str) -> Only | OnlySchemes | None:
    """What holds for the field at `path`: its own entry in `LIMITS`, that of what it lies in, or none.

    Raises KeyError when the field stands in neither table: say there whether this version does what it promises.
    """
    steps = path.split(".")
    for depth in range(len(steps), 0, -1):
        place = ".".join(steps[:depth])
        for entry in (place, place.removesuffix("[]"), f"{place}[]"):
            if entry in LIMITS:
                return LIMITS[entry]
            if entry in SUPPORTED:
                return None
    raise KeyError(f"{path}: neither in SUPPORTED nor in LIMITS")
