"""Bringing the cluster up, finding it again, and taking it down."""

import contextlib
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from tests.cluster import build, controlplane, kwok, network, node, prerequisites, registry, settings, state, volumes
from tests.cluster.client import Cluster
from tests.cluster.console import step, tell
from tests.cluster.process import Server, launch, stop, wait_ready
from tests.cluster.state import State


def current() -> Cluster | None:
    """The running cluster, if there is one and all of it lives."""
    found = state.load()
    if found is None or not found.ready or found.dead:
        return None
    return Cluster(settings.KUBECONFIG, Path(found.binaries))


def ensure_up() -> Cluster:
    """The cluster of this machine: the one that runs, or a new one.

    A cluster that has lost a process, or was left half made, is taken down first. On failure and on Ctrl-C
    everything that was started is removed again, and the logs are kept.

    Raises:
        UnfitMachineError: the machine lacks something.
        ServerFailedError: a server did not come up.
    """
    prerequisites.require_root()
    if found := _whole():
        return found
    with state.locked(), _interruptible():
        if found := _whole():  # another command made it while we waited
            return found
        if left := state.load():
            tell(f"a cluster is there, but not whole (dead: {', '.join(left.dead) or 'none'}): starting afresh")
            _take_down(left)
        try:
            return _bring_up()
        except BaseException:
            if unfinished := state.load():
                kept = keep_logs(settings.cache() / "logs" / "last-failure")
                tell(f"the cluster did not come up; taking down what there is. Logs kept in {kept}")
                _take_down(unfinished)
            raise


def _whole() -> Cluster | None:
    found = current()
    return found if found and controlplane.answers(f"{settings.API_URL}/readyz") else None


def _bring_up() -> Cluster:
    prerequisites.check()
    record = State(binaries=str(build.binaries()))
    build.prune()
    cluster = Cluster(settings.KUBECONFIG, Path(record.binaries))
    binaries = cluster.binaries
    with step("starting the cluster") as work:
        record.save()
        network.up(record)
        controlplane.write_credentials()
        registry.prepare()
        node.prepare(record)
        for server in (registry.server(), *controlplane.servers(binaries)):
            work.say(server.name)
            _start(server, record)
        registry.push_small_images()
        cluster.apply(*controlplane.DNS_RIGHTS, *volumes.STORAGE_CLASS)
        for server in (
            *node.servers(binaries, cluster),
            kwok.server(binaries),
            volumes.server(binaries, cluster),
        ):
            work.say(server.name)
            _start(server, record)
        cluster.wait("the default namespace takes pods", lambda: cluster.find("serviceaccount", "default", "default"))
    record.ready = True
    record.save()
    return cluster


def _start(server: Server, record: State) -> None:
    running = launch(server, settings.LOGS, settings.REPOSITORY)
    record.processes.append(running)
    record.stop_signals[server.name] = server.stop_signal
    record.save()
    wait_ready(server, running, settings.LOGS)


def down(keep_logs_in: Path | None = None) -> bool:
    """Stop and remove everything; False if there was nothing."""
    prerequisites.require_root()
    with state.locked():
        found = state.load()
        if found is None:
            return False
        if keep_logs_in:
            tell(f"logs kept in {keep_logs(keep_logs_in)}")
        with step("taking the cluster down"):
            _take_down(found)
        return True


def _take_down(found: State) -> None:
    for running in reversed(found.processes):
        stop(running, signal.Signals(found.stop_signals.get(running.name, signal.SIGKILL)))
    network.down(found)
    _retry(node.remove_cgroups)
    _retry(state.forget)
    for directory in reversed(found.made_directories):
        with contextlib.suppress(OSError):  # somebody else uses it by now
            Path(directory).rmdir()


def _retry(action, seconds: float = 10.0) -> None:
    """Until the kernel has buried the node's processes and mounts, their directories are busy."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return action()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def keep_logs(target: Path) -> Path:
    """Copy the servers' and the pods' logs to `target`, replacing what is there."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(settings.LOGS, target / "servers", dirs_exist_ok=True)
    pods = node.HOME / "log" / "pods"
    if pods.exists():
        shutil.copytree(pods, target / "pods", dirs_exist_ok=True)
    return target


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP end the work as Ctrl-C does: with everything taken down again."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    except ValueError:  # not the main thread, which alone may set handlers
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
