"""The processes inside pods, ended or held from outside: the node's processes are this machine's."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from examples.quickstart.install import NAMESPACE as OPERATOR_NAMESPACE
from qlora_operator.leadership import LEADER_LABEL
from qlora_operator.manifests.jobs import USER
from tests.cluster import state
from tests.cluster.client import Cluster, Manifest

#: More than what a process takes and gives back by and by.
MUCH_BYTES = 48 << 20


def kill(pod: Manifest, program: str) -> None:
    """SIGKILL to the process of `pod` whose command line names `program`: nothing is saved or handed over.

    Waits for the process, which may just be starting again.
    """
    os.kill(_process_of(pod, program), signal.SIGKILL)


def starve(pod: Manifest, program: str) -> None:
    """Let the process of `pod` whose command line names `program` allocate less than it does at most.

    By `RLIMIT_DATA`, half-way between the least and the most that it has held for a while: what it needs for a step
    fails, what it needs to end well does not.
    """
    pid, held, deadline = _process_of(pod, program), set[int](), time.monotonic() + 60
    while len(held) < 2 or max(held) - min(held) < MUCH_BYTES:
        assert time.monotonic() < deadline, f"it allocates nothing: {sorted(held)}"
        held.add(_held_bytes(pid, "VmData"))
        time.sleep(0.005)
    limit = (min(held) + max(held)) // 2
    # by its own user, for root needs a capability to limit another's process
    subprocess.run(
        ["prlimit", f"--pid={pid}", f"--data={limit}:{limit}"], check=True, user=USER, group=USER, extra_groups=[]
    )


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[None]:
    """A file system of its own at `place`, as pods see it: the node has mounts of its own."""
    found = state.load()
    assert found
    node = next(process.pid for process in found.processes if process.name == "node")
    inside = ["nsenter", f"--mount=/proc/{node}/ns/mnt", f"--pid=/proc/{node}/ns/pid_for_children"]
    place.mkdir(mode=0o755)
    subprocess.run([*inside, "mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run([*inside, "umount", "--lazy", str(place)], check=True)
        place.rmdir()


def memory_bytes(pod: Manifest, program: str) -> int:
    """Resident memory of the process of `pod` whose command line names `program`."""
    return _held_bytes(_process_of(pod, program), "VmRSS")


def _held_bytes(pid: int, kind: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{kind}:"))


def _process_of(pod: Manifest, program: str) -> int:
    """Its number on this machine."""
    uid, deadline = pod["metadata"]["uid"], time.monotonic() + 60
    while time.monotonic() < deadline:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _is_of(entry, uid, program):
                return int(entry.name)
        time.sleep(0.2)
    raise AssertionError(f"pod {pod['metadata']['name']} has no process {program}")


def _is_of(process: Path, uid: str, program: str) -> bool:
    try:
        return uid in (process / "cgroup").read_text() and program in (process / "cmdline").read_text()
    except OSError:  # it ended meanwhile
        return False


def leader(cluster: Cluster) -> Manifest:
    """The pod of the replica that leads."""
    (pod,) = cluster.wait(
        "one replica leads",
        lambda: [
            pod
            for pod in cluster.list("pod", OPERATOR_NAMESPACE, f"{LEADER_LABEL}=true")
            if "deletionTimestamp" not in pod["metadata"]
        ],
        lambda pods: len(pods) == 1,
        timeout=60,
        namespace=OPERATOR_NAMESPACE,
        interval=0.5,
    )
    return pod


def kill_operator(cluster: Cluster) -> None:
    """SIGKILL to the replica that leads; the kubelet starts it again, and one of them takes over."""
    kill(leader(cluster), "qlora_operator")


@contextmanager
def operator_away(cluster: Cluster) -> Iterator[None]:
    """No operator meanwhile; afterwards as many as before."""
    deployment = _deployment(cluster)
    name, replicas = deployment["metadata"]["name"], deployment["spec"]["replicas"]

    def scale(count: int) -> None:
        cluster.kubectl("scale", "deployment", name, f"--replicas={count}", namespace=OPERATOR_NAMESPACE)

    scale(0)
    try:
        cluster.wait(
            "the operator is gone", lambda: cluster.list("pod", OPERATOR_NAMESPACE), lambda pods: not pods, timeout=120
        )
        yield
    finally:
        scale(replicas)
        _wait_rolled_out(cluster, name)


def _deployment(cluster: Cluster) -> Manifest:
    (deployment,) = cluster.list("deployment", OPERATOR_NAMESPACE)
    return deployment


def _wait_rolled_out(cluster: Cluster, name: str) -> None:
    cluster.kubectl("rollout", "status", "deployment", name, "--timeout=120s", namespace=OPERATOR_NAMESPACE)


@contextmanager
def api_server_away() -> Iterator[None]:
    """The API server stands still meanwhile: connections stay open and nothing answers."""
    found = state.load()
    assert found
    pid = next(process.pid for process in found.processes if process.name == "kube-apiserver")
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
