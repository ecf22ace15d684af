"""What the running cluster consists of, on disk, so that any later command can find it and take it down."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.cluster import settings
from tests.cluster.console import tell
from tests.cluster.process import Running

_FILE = settings.STATE / "cluster.json"


@dataclass
class State:
    """The record of one cluster. Saved before and after every change to the machine."""

    binaries: str = ""
    ready: bool = False
    processes: list[Running] = field(default_factory=list)
    stop_signals: dict[str, int] = field(default_factory=dict)
    ip_forward_before: str | None = None
    made_directories: list[str] = field(default_factory=list)

    def save(self) -> None:
        settings.STATE.mkdir(mode=0o755, parents=True, exist_ok=True)
        draft = _FILE.with_suffix(".new")
        draft.write_text(json.dumps(asdict(self), indent=1))
        draft.replace(_FILE)

    @property
    def dead(self) -> list[str]:
        return [process.name for process in self.processes if not process.alive]


def load() -> State | None:
    """The recorded cluster, whole or not; None if there is none."""
    try:
        raw = json.loads(_FILE.read_text())
    except FileNotFoundError:
        return None
    raw["processes"] = [Running(**process) for process in raw["processes"]]
    return State(**raw)


def forget() -> None:
    """Remove everything that the cluster kept on disk."""
    if settings.STATE.exists():
        shutil.rmtree(settings.STATE)


@contextmanager
def locked() -> Iterator[None]:
    """Only one command at a time brings the cluster up or down; the others wait, and say so."""
    descriptor = os.open(settings.LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f"another command (pid {os.pread(descriptor, 20, 0).decode() or '?'}) is at work here: waiting")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def make_directory(path: Path, state: State) -> None:
    """Create a directory outside our own places, noting it (and each new parent) for removal."""
    for missing in reversed([p for p in (path, *path.parents) if not p.exists()]):
        state.made_directories.append(str(missing))
        state.save()
        missing.mkdir()
