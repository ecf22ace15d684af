"""The machine is as before once the cluster is gone, whichever way it went. Takes the running cluster down."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster import lifecycle, prerequisites, settings, state
from tests.cluster.process import Running

pytestmark = [pytest.mark.cluster, pytest.mark.soak]

# What others change all the time, and what only grows.
_VOLATILE = (
    "/proc/sys/fs/",
    "/proc/sys/kernel/random/",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/net/netfilter/nf_c",
)
_FOLDERS = ("/", "/run", "/etc", "/opt", "/usr/libexec", "/var", "/var/lib", "/var/log")


def _machine() -> dict[str, str]:
    """All that a cluster might leave: links, nft tables, mounts, control groups, folders, kernel tunables."""

    def shown(*command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    seen = {
        "links": "\n".join(sorted(path.name for path in Path("/sys/class/net").iterdir())),
        "addresses": shown("ip", "-brief", "address"),
        "tables": shown("nft", "list", "tables"),
        "mounts": Path("/proc/self/mounts").read_text(),
        "cgroups": "\n".join(sorted(str(path) for path in Path("/sys/fs/cgroup").rglob(f"{settings.CGROUP}*"))),
    }
    for folder in _FOLDERS:
        names = {path.name for path in Path(folder).iterdir()} if Path(folder).is_dir() else set()
        seen[folder] = "\n".join(sorted(names - {settings.LOCK.name, "qlora-buildah"}))
    for area in ("kernel", "net", "vm"):
        for tunable in Path("/proc/sys", area).rglob("*"):
            if not str(tunable).startswith(_VOLATILE) and tunable.is_file() and os.access(tunable, os.R_OK):
                try:
                    seen[str(tunable)] = tunable.read_text()
                except OSError:
                    continue
    return seen


def _until(expected: str, holds: Callable[[], object], timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout:.0f} s: {expected}"
        time.sleep(0.05)


def _up() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.cluster", "up"]
    return subprocess.Popen(
        command,
        cwd=settings.REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # ours is ignored in the background
    )


def _started(name: str) -> Running | None:
    found = state.load()
    return next((process for process in found.processes if process.name == name), None) if found else None


@pytest.fixture
def bare_machine() -> Iterator[dict[str, str]]:
    """The machine without a cluster, as it then is; a cluster is brought up again at the end."""
    prerequisites.check()
    lifecycle.down()
    yield _machine()
    lifecycle.ensure_up()


def _differences(before: dict[str, str]) -> dict[str, tuple[str | None, str | None]]:
    after = _machine()
    return {key: (before.get(key), after.get(key)) for key in before | after if before.get(key) != after.get(key)}


def test_up_and_down_leave_nothing(bare_machine: dict[str, str]) -> None:
    cluster = lifecycle.ensure_up()
    assert cluster.find("node", settings.NODE)
    assert _differences(bare_machine)
    assert lifecycle.down()
    assert _differences(bare_machine) == {}
    assert not lifecycle.down()


def test_ctrl_c_while_it_comes_up_leaves_nothing_but_the_logs(bare_machine: dict[str, str]) -> None:
    command = _up()
    _until("the node is being started", lambda: _started("node"))
    command.send_signal(signal.SIGINT)
    _, said = command.communicate(timeout=60)
    assert command.returncode == 130, said
    kept = settings.cache() / "logs" / "last-failure"
    assert str(kept) in said
    assert (kept / "servers" / "kube-apiserver.log").stat().st_size
    assert _differences(bare_machine) == {}


def test_a_command_that_was_killed_is_cleaned_up_by_the_next(bare_machine: dict[str, str]) -> None:
    command = _up()
    _until("the node is being started", lambda: _started("node"))
    command.kill()
    command.communicate()
    left = state.load()
    assert left and not left.ready and lifecycle.current() is None
    lifecycle.ensure_up()
    assert not [process for process in left.processes if process.alive]


def test_a_cluster_that_lost_a_server_is_replaced(bare_machine: dict[str, str]) -> None:
    lifecycle.ensure_up()
    etcd = _started("etcd")
    assert etcd
    os.kill(etcd.pid, signal.SIGKILL)
    _until("etcd is gone", lambda: not etcd.alive)
    assert lifecycle.current() is None
    cluster = lifecycle.ensure_up()
    assert cluster.find("node", settings.NODE)
    assert _started("etcd") != etcd
