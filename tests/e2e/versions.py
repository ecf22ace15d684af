"""All that the API server tells of one object."""

from __future__ import annotations

import json
import subprocess
import threading

from tests.cluster.client import Cluster, Manifest


class Versions:
    """Every version of one object, from now until `stop`."""

    def __init__(self, cluster: Cluster, path: str, name: str) -> None:
        query = f"{path}?watch=true&fieldSelector=metadata.name%3D{name}"
        command = [str(cluster.binaries / "kubectl"), f"--kubeconfig={cluster.kubeconfig}", "get", "--raw", query]
        self._seen: list[Manifest] = []
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            event = json.loads(line)
            if event["type"] in ("ADDED", "MODIFIED"):
                self._seen.append(event["object"])

    def stop(self) -> list[Manifest]:
        """The versions, in order."""
        self._process.terminate()
        self._process.wait()
        self._reader.join()
        return self._seen
