"""Which field of a spec names a claim: what a user has to look at when the claim is not there."""

from __future__ import annotations

from collections.abc import Iterator

from qlora_api.v1alpha1 import JobSpec


def fields_on(spec: JobSpec, claim: str) -> list[str]:
    """The fields of `spec` that name `claim`, by their paths."""
    return [path for path, uri in _addresses(spec) if uri.startswith(f"pvc://{claim}/")] + (
        ["spec.storage.claimName"] if spec.storage.claim_name == claim else []
    )


def _addresses(spec: JobSpec) -> Iterator[tuple[str, str]]:
    yield "spec.model.uri", spec.model.uri
    for number, source in enumerate(spec.dataset.train):
        yield f"spec.dataset.train[{number}].uri", source.uri
    if spec.dataset.eval:
        yield "spec.dataset.eval.uri", spec.dataset.eval.uri
    if spec.evaluation.golden:
        yield "spec.evaluation.golden.uri", spec.evaluation.golden.uri
    if spec.evaluation.canary:
        yield "spec.evaluation.canary.uri", spec.evaluation.canary.uri
    yield "spec.output.uri", spec.output.uri
