"""Directories that hold results: their digests, and writing them whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHUNK_BYTES = 8 << 20


def file_digest(path: Path) -> str:
    """`sha256:…` of a file's bytes."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def files_of(directory: Path) -> list[Path]:
    """Every file below `directory`, as relative paths in a fixed order."""
    return sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())


def digests_of(directory: Path) -> dict[str, str]:
    """Relative path to digest, of every file below `directory`."""
    return {path.as_posix(): file_digest(directory / path) for path in files_of(directory)}


def combined_digest(digests: dict[str, str]) -> str:
    """One digest for a set of files: over their names and digests, in the order of the names."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def directory_digest(directory: Path) -> str:
    """`sha256:…` over names and bytes of every file below `directory`."""
    return combined_digest(digests_of(directory))


def directory_bytes(directory: Path) -> int:
    """Size of all files below `directory`."""
    return sum((directory / path).stat().st_size for path in files_of(directory))


def sync(path: Path) -> None:
    """Have the disk keep a file or a directory's entries: a rename must not overtake the bytes it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_file(source: Path, target: Path) -> str:
    """Copy bytes (not modes: the target may be another user's file system), return the digest of what was read."""
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(CHUNK_BYTES):
            digest.update(chunk)
            writer.write(chunk)
    return f"sha256:{digest.hexdigest()}"


def write_file(path: Path, text: str) -> None:
    """Write `text` so that `path` holds either all of it or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


@contextmanager
def whole_directory(target: Path, *, marker: str = "", replace: bool = True) -> Iterator[Path]:
    """A fresh directory beside `target` that becomes `target` when the block ends, and vanishes when it fails.

    Left-overs of an attempt that was killed are removed first; `marker` tells apart writers of one target. Without
    `replace`, a target that somebody has filled meanwhile is kept, and OSError (ENOTEMPTY) raised: that is how rename
    works, so of two writers at once exactly one wins.
    """
    partial = target.with_name(f".{target.name}{marker}.partial")
    replaced = target.with_name(f".{target.name}{marker}.replaced")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in files_of(partial):
            sync(partial / path)
        shutil.rmtree(replaced, ignore_errors=True)
        if replace and target.exists():
            target.rename(replaced)
        partial.rename(target)
        sync(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
