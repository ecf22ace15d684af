"""The publish stage: one artifact to where the user wants it, whole or not at all, with digests and provenance."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

from qlora_api.exchange import PublishOrder, PublishResult, is_claim
from qlora_trainer.artifacts import combined_digest, copy_file, digests_of, file_digest, whole_directory
from qlora_trainer.environment import Pod, log
from qlora_trainer.failures import BadInput
from qlora_trainer.results import record
from qlora_trainer.stores import open_store

MANIFEST_NAME = "qlora-manifest.json"


def publish(order: PublishOrder, pod: Pod) -> PublishResult:
    """Put the artifact at its place, verified by digest. What is there already, and the same, is left alone.

    Raises BadInput when the artifact was changed, or when something else is where it is to go and may not be replaced.
    """
    source = Path(order.work_dir) / order.artifact
    digests = digests_of(source) if source.is_dir() else {}
    if combined_digest(digests) != order.artifact_digest:
        raise BadInput(f"the {order.artifact} in {source} is not the one that was made: it was changed or removed")
    manifest = manifest_text(order, source, digests)
    result = PublishResult(
        uri=order.output_uri,
        digest=_digest(manifest),
        bytes=sum((source / name).stat().st_size for name in digests) + len(manifest.encode()),
        files=len(digests) + 1,
    )
    put = _to_claim if is_claim(order.output_uri) else _to_store
    if put(order, pod, source, digests, manifest):
        log.info("published %d files, %.1f MiB to %s", result.files, result.bytes / 2**20, order.output_uri)
    else:
        log.info("%s is there already", order.output_uri)
    record(order, result)
    return result


def _to_claim(order: PublishOrder, pod: Pod, source: Path, digests: dict[str, str], manifest: str) -> bool:
    """Copy beside the place, verify the copy, and rename. False where it was there already."""
    target = pod.path_of(order.output_uri, "output.uri")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        if _published(target, manifest):
            return False
        _may_replace(order)
    if not target.parent.exists() and not Path(pod.claims).is_dir():
        raise BadInput(f"output.uri: the claim of {order.output_uri} is not mounted")

    try:
        with whole_directory(target, marker=f".{order.job_uid}", replace=order.overwrite) as partial:
            for name, digest in digests.items():
                copy = partial / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                if copy_file(source / name, copy) != digest or file_digest(copy) != digest:
                    raise OSError(f"{order.output_uri}/{name}: the bytes that arrived are not those that were sent")
            (partial / MANIFEST_NAME).write_text(manifest, encoding="utf-8")
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another job was faster
            raise _taken(order) from error
        raise
    return True


def _to_store(order: PublishOrder, pod: Pod, source: Path, digests: dict[str, str], manifest: str) -> bool:
    """Upload file by file, the manifest last: where it is, all is. False where it was there already.

    An attempt that was killed leaves files without a manifest; the next one keeps those that are the artifact's.
    """
    store = open_store("output", order.output_uri, order.output_secret, pod)
    there = store.all_objects()
    promised = {**digests, MANIFEST_NAME: _digest(manifest)}
    same = {name for name in there.keys() & promised.keys() if store.digest_meant(name) == promised[name]}
    if same == there.keys() == promised.keys():
        return False
    if there.keys() - same or MANIFEST_NAME in same:
        _may_replace(order)
    if MANIFEST_NAME in there:
        store.delete(MANIFEST_NAME)  # from here on the place is not complete, and says so
    for name, digest in digests.items():
        if name in same and store.digest(there[name]) == digest:
            log.info("%s/%s is there already", order.output_uri, name)
            continue
        store.put(name, source / name, digest)
        log.info("%s/%s uploaded and read back", order.output_uri, name)
    for name in there.keys() - promised.keys():
        store.delete(name)
    store.put(MANIFEST_NAME, manifest.encode(), promised[MANIFEST_NAME])
    return True


def _may_replace(order: PublishOrder) -> None:
    if not order.overwrite:
        raise _taken(order)
    log.info("%s is replaced", order.output_uri)


def _taken(order: PublishOrder) -> BadInput:
    return BadInput(
        f"output.uri: {order.output_uri} exists and holds something else: "
        "choose another output.uri, remove what is there, or set output.overwrite"
    )


def manifest_text(order: PublishOrder, source: Path, digests: dict[str, str]) -> str:
    """The manifest: every file's digest and size, and where the artifact comes from. Equal for equal orders."""
    document: dict[str, Any] = {
        "artifact": order.artifact,
        "digest": order.artifact_digest,
        "files": {
            name: {"digest": digest, "bytes": (source / name).stat().st_size}
            for name, digest in sorted(digests.items())
        },
        "provenance": order.provenance,
    }
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _published(target: Path, manifest: str) -> bool:
    """Whether `target` is what `manifest` says, every byte of it."""
    path = target / MANIFEST_NAME
    if not path.is_file() or path.read_text(encoding="utf-8") != manifest:
        return False
    promised = {name: entry["digest"] for name, entry in json.loads(manifest)["files"].items()}
    found = digests_of(target)
    del found[MANIFEST_NAME]
    return found == promised


def _digest(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
