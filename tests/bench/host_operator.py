"""The operator as a process of this machine, so that /proc tells what it takes."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import urllib.request
from pathlib import Path

import yaml

from qlora_operator import settings
from tests.cluster.client import Cluster
from tests.cluster.process import Running, Server, launch, stop, wait_ready
from tests.cluster.settings import REPOSITORY

QUIET_SHARE = 0.1
QUIET_SECONDS = 3.0
_TICKS = os.sysconf("SC_CLK_TCK")


class Operator:
    """`python -m qlora_operator` for one namespace of the cluster; other namespaces' jobs are left alone."""

    def __init__(self, cluster: Cluster, namespace: str, directory: Path) -> None:
        self.namespace = namespace
        self._running: Running | None = None
        self._port = _free_port()
        self._directory = directory
        config = directory / "config.yaml"
        config.write_text(
            yaml.safe_dump(
                {
                    "trainerImage": "trainer:bench",
                    "namespaces": [namespace],
                    "probePort": self._port,
                    "resyncSeconds": 60,
                    "graceSeconds": 5,  # the namespace controller waits for half of it before it looks again
                }
            )
        )
        self.settings = settings.load(str(config))
        environment = cluster.environment() | {"QLORA_CONFIG": str(config), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "qlora_operator"]
        self._server = Server("operator", command, self._is_ready, signal.SIGTERM, environment)

    def start(self) -> None:
        """Start it; returns at once."""
        self.started = time.monotonic()
        self._running = launch(self._server, self._directory, REPOSITORY)

    def wait_ready(self) -> None:
        """Until it has listed the jobs. Raises ServerFailedError."""
        wait_ready(self._server, self._process, self._directory)

    def stop(self) -> None:
        """Stop it, where it runs."""
        if self._running:
            stop(self._running, signal.SIGTERM, 15)
            self._running = None

    @property
    def _process(self) -> Running:
        if self._running is None:
            raise LookupError("the operator is not started")
        return self._running

    def cpu_seconds(self) -> float:
        """CPU time so far, user and system, of all threads."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def memory_bytes(self, row: str = "VmRSS") -> int:
        """Resident memory now, or with `VmHWM` at its peak."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{row}:"))

    def settled(self, timeout: float = 300.0) -> float:
        """When (monotonic seconds) it began to take less than `QUIET_SHARE` of a core for `QUIET_SECONDS`.

        Raises TimeoutError.
        """
        deadline = time.monotonic() + timeout
        since, cpu = time.monotonic(), self.cpu_seconds()
        while time.monotonic() < deadline:
            time.sleep(0.1)
            now, spent = time.monotonic(), self.cpu_seconds()
            if spent - cpu > QUIET_SHARE * QUIET_SECONDS:
                since, cpu = now, spent
            elif now - since >= QUIET_SECONDS:
                return since
        raise TimeoutError(f"the operator was still busy after {timeout:.0f} s")

    def _is_ready(self) -> bool:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(f"http://127.0.0.1:{self._port}/readyz", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
