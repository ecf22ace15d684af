"""Shows a job while it runs: every change of its status, and the logs of its pods."""

from __future__ import annotations

import subprocess
import threading
import time
from typing import Any

from rich.console import Console

from tests.cluster.client import Cluster

console = Console(highlight=False, soft_wrap=True)
OVER = ("Succeeded", "Failed")


class NotOverError(Exception):
    """The job did not end in time; the message says where it stands."""


def follow(cluster: Cluster, namespace: str, name: str, *, timeout: float) -> dict[str, Any]:
    """Print what happens to the job until it is over; its last state. Raises NotOverError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    said: tuple[str, str] | None = None
    followed: set[str] = set()
    readers: list[threading.Thread] = []
    while True:
        job = cluster.get("qlorajobs.qlora.dev", name, namespace)
        status = job.get("status", {})
        now = (status.get("phase", "Pending"), status.get("message", ""))
        if now != said:
            said = now
            percent = status.get("progress", {}).get("percent", 0)
            console.print(f"[bold]{now[0]:<11}[/] {percent:>3} %  {now[1]}")
        for pod in cluster.list("pod", namespace, f"qlora.dev/job={name}"):
            running = pod["status"]["phase"] != "Pending"
            if running and pod["metadata"]["name"] not in followed:
                followed.add(pod["metadata"]["name"])
                stage = pod["metadata"]["labels"]["qlora.dev/stage"]
                reader = threading.Thread(
                    target=_print_logs, args=(cluster, namespace, pod["metadata"]["name"], stage), daemon=True
                )
                reader.start()
                readers.append(reader)
        if now[0] in OVER:
            for reader in readers:
                reader.join(timeout=10)
            return job
        if time.monotonic() > deadline:
            raise NotOverError(f"{name} is not over after {timeout:.0f} s: {now[0]}: {now[1]}")
        time.sleep(1)


def _print_logs(cluster: Cluster, namespace: str, pod: str, stage: str) -> None:
    command = ["kubectl", f"--kubeconfig={cluster.kubeconfig}", f"--namespace={namespace}", "logs", "--follow", pod]
    command[0] = str(cluster.binaries / "kubectl")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as logs:
        for line in logs.stdout or ():
            console.print(f"  {stage:<8} │ {line.rstrip()}", markup=False)
