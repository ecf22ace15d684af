"""What a stage reads from stores, as files: after this, everything works on paths, whether from a claim or a store.

Train downloads a model once into `<work_dir>/inputs`; the next attempt and merge find it there and prove it by its
digests. Inspect makes the same directory with weights that have a header, their size and a hole for the rest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from pydantic import Field, ValidationError

from qlora_api.exchange import (
    SCRATCH_GIB,
    DataSource,
    Document,
    InspectOrder,
    MergeOrder,
    TrainOrder,
    is_claim,
    is_hub,
)
from qlora_trainer.artifacts import file_digest, sync, write_file
from qlora_trainer.data import DATA_SUFFIXES, named_sources
from qlora_trainer.environment import Pod, log
from qlora_trainer.failures import BadInput
from qlora_trainer.stores import Object, Store, open_store, require_space
from qlora_trainer.weights import (
    RECORD_NAME,
    SINGLE_NAME,
    WEIGHT_SUFFIXES,
    header_bytes,
    model_digest,
    read_index,
    read_weights,
)

if TYPE_CHECKING:
    from qlora_trainer.hub import Hub, Kind

MODEL = "model.uri"
#: What inspect downloads of data; the rest of its scratch space is for the model's own files.
SCRATCH_DATA_BYTES = (SCRATCH_GIB << 30) * 3 // 4
#: More than the header of most weight files: one request brings it.
FIRST_BYTES = 1 << 20


class Fetched(Document):
    """One object that was downloaded, or is to be; without a digest its file is not whole."""

    etag: str | None = None
    bytes: int = Field(ge=0)
    digest: str | None = None


class Record(Document):
    """What lies beside downloaded files: where they come from, and which versions they are."""

    uri: str
    revision: str | None = Field(default=None, description="On the hub: the commit.")
    files: dict[str, Fetched] = Field(default_factory=dict)


def with_inputs(order: InspectOrder | TrainOrder | MergeOrder, pod: Pod) -> Pod:
    """`pod` with all that `order` reads from stores in files below `<work_dir>/inputs`.

    Raises BadInput, naming the field of the spec, for what cannot be had or is not what was inspected.
    """
    inputs = Path(order.work_dir) / "inputs"
    fetched: dict[str, Path] = {}
    if not is_claim(order.model_uri):
        expected = None if isinstance(order, InspectOrder) else order.model_digest
        source = DataSource(uri=order.model_uri, revision=order.model_revision, secret=order.model_secret)
        fetched[MODEL] = _model(source, inputs / "model", pod, expected)
    room_bytes = SCRATCH_DATA_BYTES if isinstance(order, InspectOrder) else None
    for field, source in [] if isinstance(order, MergeOrder) else named_sources(order.data):
        if not is_claim(source.uri):
            directory = inputs / re.sub(r"[^a-z0-9]+", "-", field).strip("-")
            fetched[field], size = _data(field, source, directory, pod, room_bytes)
            room_bytes = room_bytes and room_bytes - size
    return replace(pod, inputs=fetched)


def download_bytes(pod: Pod) -> int:
    """Size of all that `with_inputs` has brought, weights in full."""
    directories = {path if path.is_dir() else path.parent for path in pod.inputs.values()}
    records = [read_record(directory) for directory in directories]
    return sum(file.bytes for record in records if record for file in record.files.values())


def commits(pod: Pod) -> dict[str, str]:
    """At which commits what lies on the hub was read, by the field of the spec that names it."""
    records = {field: read_record(path if path.is_dir() else path.parent) for field, path in pod.inputs.items()}
    return {field: record.revision for field, record in records.items() if record and record.revision}


def read_record(directory: Path) -> Record | None:
    """What is known of the downloads in `directory`; None where nothing was downloaded."""
    try:
        return Record.model_validate_json((directory / RECORD_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError):
        return None


def _open(where: str, source: DataSource, kind: Kind, pod: Pod) -> Store | Hub:
    if not is_hub(source.uri):
        return open_store(where, source.uri, source.secret, pod)
    from qlora_trainer.hub import open_hub

    return open_hub(where, source.uri, kind, source.revision, source.secret, pod)


def _model(source: DataSource, directory: Path, pod: Pod, expected: str | None) -> Path:
    """The model; its weights only where `expected`, the digest that inspection found, says that they are to be read."""
    uri = source.uri
    if expected and _is_whole(directory, source):
        log.info("%s was downloaded before, and is unchanged since", uri)
        return directory
    store = _open("model", source, "model", pod)
    objects = {name: found for name, found in store.objects().items() if not name.startswith(".")}
    if not objects:
        raise BadInput(f"model.uri: there is no directory {uri} at {store.place}{store.neighbours()}")
    beside = {name: found for name, found in objects.items() if Path(name).suffix not in WEIGHT_SUFFIXES}
    record = _fetch(store, directory, _begin(directory, store, objects), beside)

    named = set(read_index(directory, uri).values()) or {SINGLE_NAME}
    weights = {name: found for name, found in objects.items() if name in named}
    for name in objects.keys() - beside.keys() - weights.keys():  # not wanted, but a message may speak of them
        (directory / name).touch()
    record = _noted(directory, record, {name: record.files[name] for name in (*beside, *weights)})
    for name, found in weights.items():
        if record.files[name].digest is None:
            _write_header(store, found, directory / name)
    if expected is None:
        return directory
    if model_digest(directory, read_weights(directory, uri)) != expected:
        raise BadInput(f"model.uri: {uri} has changed since inspection: put it back, or create a new job")
    _fetch(store, directory, record, weights)
    return directory


def _data(field: str, source: DataSource, directory: Path, pod: Pod, room_bytes: int | None) -> tuple[Path, int]:
    """A file of examples, or the directory of such, and its size."""
    uri = source.uri
    name = uri.rstrip("/").rpartition("/")[2]
    record = read_record(directory) if _is_whole(directory, source) else None
    if record is None:
        store = _open(field, source, "dataset", pod)
        objects = _data_objects(store, name)
        if not objects:
            told = f"{field}.uri: there is no {uri} at {store.place}, nor data files below it{store.neighbours()}"
            raise BadInput(told)
        size = sum(found.bytes for found in objects.values())
        if room_bytes is not None and size > room_bytes:
            raise BadInput(
                f"{field}.uri: {uri} is {size / 2**30:.2f} GiB, and inspect has room for {room_bytes / 2**30:.2f} GiB "
                "more of data from stores: put it on a claim"
            )
        record = _fetch(store, directory, _begin(directory, store, objects), objects)
    is_file = record.files.keys() == {name}
    return directory / name if is_file else directory, sum(file.bytes for file in record.files.values())


def _data_objects(store: Store | Hub, name: str) -> dict[str, Object]:
    """The files of examples at the path or right below it; in a repository of the hub at any depth, if there are none.

    The name of a file further below has its slashes quoted: what is downloaded lies in one directory.
    """
    if name.endswith(DATA_SUFFIXES) and (itself := store.object_itself()):
        return {name: itself}
    found = {name: at for name, at in store.objects().items() if name.endswith(DATA_SUFFIXES)}
    if not found and is_hub(store.uri):
        below = store.all_objects().items()
        found = {quote(name, safe=" "): at for name, at in below if name.endswith(DATA_SUFFIXES)}
    if not found and (itself := store.object_itself()):
        return {name: itself}
    return found


def _is_whole(directory: Path, source: DataSource) -> bool:
    """Whether everything of `source` was downloaded to here, and is as it arrived."""
    record = read_record(directory)
    if record is None or (record.uri, record.revision) != (source.uri, source.revision) or not record.files:
        return False
    return all(file.digest and _holds(directory / name, file) for name, file in record.files.items())


def _holds(path: Path, file: Fetched) -> bool:
    return path.is_file() and path.stat().st_size == file.bytes and file_digest(path) == file.digest


def _begin(directory: Path, store: Store | Hub, objects: Mapping[str, Object]) -> Record:
    """The record for `objects`; what an earlier attempt has downloaded of the same versions counts as done."""
    directory.mkdir(parents=True, exist_ok=True)
    old = read_record(directory)
    known = old.files if old and old.uri == store.uri else {}
    files: dict[str, Fetched] = {}
    for name, found in objects.items():
        wanted = Fetched(etag=found.etag, bytes=found.bytes)
        before = known.get(name)
        same = before and before.digest and (before.etag, before.bytes) == (found.etag, found.bytes)
        files[name] = before if before and same and _holds(directory / name, before) else wanted
    return _noted(directory, Record(uri=store.uri, revision=store.revision), files)


def _noted(directory: Path, record: Record, files: dict[str, Fetched]) -> Record:
    record = record.model_copy(update={"files": files})
    write_file(directory / RECORD_NAME, record.to_json())
    return record


def _fetch(store: Store | Hub, directory: Path, record: Record, objects: Mapping[str, Object]) -> Record:
    """Download those of `objects` that the record does not call done; each is noted there once it is whole."""
    todo = {name: found for name, found in objects.items() if record.files[name].digest is None}
    size = sum(found.bytes for found in todo.values())
    require_space(directory, size, f"{store.where}.uri: {store.uri}")
    for name, found in todo.items():
        digest = hashlib.sha256()
        partial = directory / f".{name}.partial"
        with partial.open("wb") as file:
            for chunk in store.chunks(found):
                digest.update(chunk)
                file.write(chunk)
        sync(partial)
        partial.replace(directory / name)
        done = record.files[name].model_copy(update={"digest": f"sha256:{digest.hexdigest()}"})
        record = _noted(directory, record, record.files | {name: done})
        if found.bytes > FIRST_BYTES:
            log.info("%s: downloaded %s, %.1f MiB", store.uri, name, found.bytes / 2**20)
    if todo:
        log.info("%s: %d files, %.1f MiB downloaded", store.uri, len(todo), size / 2**20)
    return record


def _write_header(store: Store | Hub, found: Object, path: Path) -> None:
    """A file of the object's size that has its safetensors header, and a hole where the weights would be."""
    start = bytes(store.read(found, 0, min(FIRST_BYTES, found.bytes))) if found.bytes else b""
    needed = min(header_bytes(start), found.bytes)
    if needed > len(start):
        start += bytes(store.read(found, len(start), needed))
    with path.open("wb") as file:
        file.write(start)
        file.truncate(found.bytes)
