"""QLoRAJob manifests as users write them, and what planning needs to know beside them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from qlora_api.exchange import Inspection, ModelShape, TokenCounts
from qlora_api.support import unsupported
from qlora_api.v1alpha1 import API_VERSION, GROUP, KIND, QLoRAJob, problems
from qlora_operator.commands.documents import Found, objects
from qlora_operator.commands.refusals import BadInput
from qlora_operator.sizing.catalogue import catalogue, shape_of_model

HUB, CLAIM = "hf://", "pvc://"
#: Tokens per sequence where nobody has said any, if the model takes so many.
MAX_LENGTH = 4096
#: Where something lies changes nothing about a plan: that this version does not reach it yet is said, and planned past.
_PLACES = (".uri", ".revision")


@dataclass(frozen=True)
class Manifest:
    """A job that can be planned."""

    where: str
    job: QLoRAJob
    #: What a cluster has found out, where the manifest comes from one.
    inspection: Inspection | None = None
    #: What the operator of this version would say to it, though it does not change the plan.
    remarks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.job.metadata.namespace}/{self.job.metadata.name}"


@dataclass(frozen=True)
class Premises:
    """What is planned from: facts, and what was assumed where there are none."""

    inspection: Inspection
    assumed: list[str] = field(default_factory=list)
    steps_known: bool = False


def manifests(path: str) -> list[Manifest]:
    """The QLoRAJobs in a file. Objects of other groups are passed over, with a word on stderr.

    Raises BadInput with a sentence for each field of each job that is wrong.
    """
    found = objects(path)
    ours = [each for each in found if _is_meant(each.content)]
    if not ours:
        kinds = ", ".join(sorted({each.kind or "an object without kind" for each in found}))
        name = found[0].where.split(",")[0]
        raise BadInput(
            f"{name}: has no {KIND}, but {kinds}: give a manifest with apiVersion {API_VERSION}, kind {KIND}"
        )
    for each in found:
        if each not in ours:
            sys.stderr.write(f"{each.where}: {each.kind or 'an object without kind'} is passed over\n")
    read = [_read(each) for each in ours]
    if bad := [sentence for each in read if isinstance(each, list) for sentence in each]:
        raise BadInput(*bad)
    return [each for each in read if isinstance(each, Manifest)]


def _is_meant(content: dict[str, Any]) -> bool:
    group = str(content.get("apiVersion", "")).partition("/")[0]
    return group == GROUP or str(content.get("kind", "")).lower() == KIND.lower()


def _read(found: Found) -> Manifest | list[str]:
    """The job, or what is wrong with it."""
    content = {key: value for key, value in found.content.items() if key != "status"}
    missing = [key for key in ("apiVersion", "kind") if key not in content]
    if missing:  # the models have defaults for them, a cluster has none
        return [f"{found.where}: {key}: required, and not there" for key in missing]
    try:
        job = QLoRAJob.read(content)
    except ValidationError as error:
        return [f"{found.where}: {sentence}" for sentence in problems(error)]
    said = unsupported(job.spec)
    remarks = [sentence for sentence in said if sentence.split(":")[0].endswith(_PLACES)]
    if refused := [f"{found.where}: {sentence}" for sentence in said if sentence not in remarks]:
        return refused
    status = found.content.get("status") or {}
    try:
        inspection = Inspection.model_validate(status["inspection"]) if status.get("inspection") else None
    except ValidationError:
        inspection = None  # of another version of the operator: planned as if the job had never been applied
    return Manifest(found.where, job, inspection, tuple(remarks))


def premises(manifest: Manifest, *, model: str | None, seq_len: int | None, sequences: int | None = None) -> Premises:
    """What to plan from: the cluster's inspection where there is one, else the model's shape and a sequence length.

    `model` is a name of the catalogue or the path of a config.json. Raises BadInput when no shape can be had.
    """
    spec = manifest.job.spec
    if manifest.inspection and not model:
        return Premises(manifest.inspection, steps_known=True)
    shape = _shape(manifest, model)
    assumed = []
    if spec.dataset.max_length:
        max_length = spec.dataset.max_length
        if seq_len and seq_len != max_length:
            assumed.append(f"{max_length:,} tokens per sequence: spec.dataset.maxLength goes before --seq-len")
    elif seq_len:
        max_length = seq_len
    else:
        max_length = min(MAX_LENGTH, shape.max_position)
        assumed.append(
            f"{max_length:,} tokens per sequence: the cluster takes what covers 99.5 % of the examples; "
            "give --seq-len, or set spec.dataset.maxLength"
        )
    if any(not source.uri.startswith(CLAIM) for source in spec.dataset.train):
        assumed.append("no bytes of data on the work volume: how many are downloaded to it is seen in the cluster")
    downloaded = 0 if spec.model.uri.startswith(CLAIM) else shape.bytes_on_disk
    inspection = Inspection(
        architecture="",
        model_digest="",
        data_digest="",
        shape=shape,
        examples=1,
        tokens=TokenCounts(p50=max_length, p95=max_length, max=max_length, total=max_length),
        max_length=max_length,
        sequences=sequences or 1,
        loss=spec.dataset.loss or "assistant",
        truncated_percent=0,
        loss_token_percent=100,
        duplicates=0,
        leakage=0,
        download_bytes=downloaded,
    )
    return Premises(inspection, assumed, steps_known=sequences is not None)


def _shape(manifest: Manifest, model: str | None) -> ModelShape:
    uri = manifest.job.spec.model.uri
    try:
        if model:
            return shape_of_model(model)
    except ValueError as error:
        raise BadInput(f"--model: {error}") from error
    give = "give its shape with --model: the path of its config.json, or the name of a model of the catalogue"
    if uri.startswith(HUB):
        known = {repository.lower(): entry for repository, entry in catalogue().items()}
        if found := known.get(uri.removeprefix(HUB).lower()):
            return found.shape
        reason = f"{uri} is not in the catalogue"
    else:
        reason = f"{uri} cannot be looked into from here"
    near = _near(uri)
    raise BadInput(f"{manifest.where}: spec.model.uri: {reason}; {give}{f' (near: {near})' if near else ''}")


def _near(uri: str) -> str | None:
    """The model of the catalogue whose name is most like the last part of an address."""
    by_name = {repository.rsplit("/", 1)[1].lower(): repository for repository in catalogue()}
    name = uri.rsplit("/", 1)[1].lower()
    near = sorted(known for known in by_name if known.startswith(name))
    near = near or get_close_matches(name, by_name, n=1, cutoff=0.6)
    return by_name[near[0]] if near else None
