"""Servers that outlive the command that started them, found again by pid and start time."""

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


class ServerFailedError(Exception):
    """A server ended or did not become ready; the message carries the end of its log."""


@dataclass(frozen=True)
class Running:
    """A started process. `started` (clock ticks since boot) and `boot` tell it from a later one with the same pid."""

    name: str
    pid: int
    started: int
    boot: str

    @property
    def alive(self) -> bool:
        return self.boot == boot_id() and _start_time(self.pid) == self.started


@dataclass(frozen=True)
class Server:
    """A program to run in the background, and how to see that it serves."""

    name: str
    command: list[str]
    ready: Callable[[], bool]
    stop_signal: signal.Signals = signal.SIGKILL
    environment: dict[str, str] = field(default_factory=dict)
    ready_within_seconds: float = 60.0


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_time(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat, or None if there is no such process or only its zombie."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if after_name[0] in "ZX" else int(after_name[19])


def launch(server: Server, logs: Path, directory: Path) -> Running:
    """Start the server in a session of its own (so that a Ctrl-C at the terminal passes it by), logging to `logs`."""
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"{server.name}.log").open("ab") as log:
        process = subprocess.Popen(
            server.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=directory,
            env=os.environ | server.environment,
            start_new_session=True,
        )
    process.returncode = 0  # it is meant to outlive us: no warning when the object is collected
    started = _start_time(process.pid)
    return Running(server.name, process.pid, started if started is not None else -1, boot_id())


def wait_ready(server: Server, running: Running, logs: Path) -> None:
    """Return once the server answers.

    Raises:
        ServerFailedError: it ended, or its time was up.
    """
    deadline = time.monotonic() + server.ready_within_seconds
    log = logs / f"{server.name}.log"
    while not server.ready():
        if not running.alive:
            raise ServerFailedError(f"{server.name} ended before it was ready; the end of {log}:\n{tail(log)}")
        if time.monotonic() > deadline:
            raise ServerFailedError(
                f"{server.name} was not ready after {server.ready_within_seconds:.0f} s; the end of {log}:\n{tail(log)}"
            )
        time.sleep(0.1)


def stop(running: Running, stop_signal: signal.Signals, grace_seconds: float = 5.0) -> None:
    """End the process and return once it is gone: first by `stop_signal`, then, its grace over, by SIGKILL."""
    try:
        handle = os.pidfd_open(running.pid)
    except ProcessLookupError:
        return
    try:
        if not running.alive:  # looked at after the handle was opened: from here on the pid cannot change hands
            return
        for number in (stop_signal, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
            if select.select([handle], [], [], grace_seconds)[0]:
                break
    finally:
        os.close(handle)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(running.pid, 0)  # where it is our own child


def tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log, or a note that there is none."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return "(no log)"
