"""A model's files seen from outside: the weights by their headers, without reading one, and a digest of it all."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.artifacts import file_digest
from qlora_trainer.failures import BadInput

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
#: Far above any real header; the format's own parser refuses more than 100 MB.
HEADER_MAX_BYTES = 100 << 20
#: Beside files that were downloaded from a store: which versions they are.
RECORD_NAME = ".qlora-download.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
#: Files that decide what text becomes which tokens; all that exist count in the digest and go along with a merge.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
#: Names of element types in safetensors headers, and torch's for those a base model may be stored in.
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies, and what it is."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Weights:
    """All weight files of a model directory."""

    files: tuple[str, ...]
    tensors: dict[str, TensorEntry]
    headers: dict[str, bytes]
    bytes_on_disk: int

    @property
    def dtype(self) -> str:
        """torch's name for the type that most weights are stored in. Raises BadInput for types of quantised ones."""
        sizes: Counter[str] = Counter()
        for entry in self.tensors.values():
            sizes[entry.dtype] += entry.elements
        stored = sizes.most_common(1)[0][0]
        if stored not in _TORCH_NAMES:
            raise BadInput(
                f"model.uri: the weights are stored as {stored}: give the model as it was before it was quantised "
                f"({', '.join(_TORCH_NAMES)})"
            )
        return _TORCH_NAMES[stored]


def read_weights(directory: Path, uri: str) -> Weights:
    """Headers of every safetensors file that the model in `directory` consists of.

    Raises BadInput when files are missing, cut short or damaged, or when there are only pickled weights.
    """
    files = _weight_files(directory, uri)
    tensors: dict[str, TensorEntry] = {}
    headers: dict[str, bytes] = {}
    total = 0
    for name in files:
        header, entries = _read_header(directory / name, f"{uri}/{name}")
        headers[name] = header
        tensors.update(entries)
        total += (directory / name).stat().st_size
    for tensor, name in read_index(directory, uri).items():
        if tensor not in tensors or tensors[tensor].file != name:
            raise BadInput(
                f"model.uri: {uri}/{INDEX_NAME} says that {tensor} is in {name}, and it is not: copy it anew"
            )
    return Weights(files, tensors, headers, total)


def read_index(directory: Path, uri: str) -> dict[str, str]:
    """Tensor to file, as the index says; empty where the model is a single file."""
    path = directory / INDEX_NAME
    if not path.exists():
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(tensor): str(file) for tensor, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"model.uri: {uri}/{INDEX_NAME} is damaged ({error}): copy it anew") from error


def _weight_files(directory: Path, uri: str) -> tuple[str, ...]:
    if index := read_index(directory, uri):
        named = tuple(sorted(set(index.values())))
        missing = [name for name in named if "/" in name or not (directory / name).is_file()]
        if missing:
            raise BadInput(
                f"model.uri: {uri} lacks {len(missing)} of {len(named)} weight files named in {INDEX_NAME}, "
                f"the first is {missing[0]}: copy the model anew"
            )
        return named
    if (directory / SINGLE_NAME).is_file():
        return (SINGLE_NAME,)
    pickled = sorted(path.name for pattern in _PICKLED for path in directory.glob(pattern))
    if pickled:
        raise BadInput(
            f"model.uri: {uri} has only pickled weights ({pickled[0]}), which can run code when they are opened: "
            "convert the model to safetensors (save_pretrained does)"
        )
    raise BadInput(f"model.uri: {uri} has no weights: neither {SINGLE_NAME} nor {INDEX_NAME}")


def _read_header(path: Path, where: str) -> tuple[bytes, dict[str, TensorEntry]]:
    """The raw JSON header of one file and its entries, checked against the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = header_bytes(file.read(8)) - 8
        if length > HEADER_MAX_BYTES or 8 + length > size:
            raise BadInput(f"model.uri: {where} is not a safetensors file, or cut short: copy it anew")
        header = file.read(length)
    try:
        entries: dict[str, TensorEntry] = {}
        end = 0
        for tensor, entry in json.loads(header).items():
            if tensor == "__metadata__":
                continue
            begin, stop = entry["data_offsets"]
            shape = tuple(int(length) for length in entry["shape"])
            entries[tensor] = TensorEntry(path.name, str(entry["dtype"]), shape)
            if entry["dtype"] in _ITEM_BYTES and stop - begin != entries[tensor].elements * _ITEM_BYTES[entry["dtype"]]:
                raise ValueError(f"{tensor} has {stop - begin} bytes for shape {list(shape)}")
            end = max(end, stop)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"model.uri: the header of {where} is damaged ({error}): copy it anew") from error
    if 8 + length + end != size:
        raise BadInput(f"model.uri: {where} has {size} bytes and its header promises {8 + length + end}: copy it anew")
    return header, entries


def header_bytes(start: bytes) -> int:
    """Length of a safetensors file's header, by the 8 bytes at its `start` that say it and with them."""
    return 8 + struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 8 + HEADER_MAX_BYTES + 1


def model_digest(directory: Path, weights: Weights) -> str:
    """`sha256:…` over config and tokenizer files and the weights' headers and sizes; the weights are not read.

    What came from a store counts with its version there, too: other weights of the same shapes are another model.
    """
    versions = _versions(directory)
    digest = hashlib.sha256()
    for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
        path = directory / name
        if path.is_file():
            digest.update(f"{name} {file_digest(path)}\n".encode())
    for name in weights.files:
        size = (directory / name).stat().st_size
        version = f" {versions[name]}" if name in versions else ""
        digest.update(f"{name} {size} {hashlib.sha256(weights.headers[name]).hexdigest()}{version}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _versions(directory: Path) -> dict[str, str]:
    """File to ETag, of what was downloaded."""
    path = directory / RECORD_NAME
    if not path.is_file():
        return {}
    files = json.loads(path.read_text(encoding="utf-8"))["files"]
    return {name: file["etag"] for name, file in files.items() if "etag" in file}
