"""The server behind `volumes`: empties what is released, offers new ones (`-m tests.cluster.volume_keeper`)."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.cluster import volumes
from tests.cluster.client import Cluster, KubectlError


def _tend(cluster: Cluster) -> None:
    """One round: remove what is released, files and all, and make good what is missing."""
    kept = volumes.volumes(cluster)
    for volume in kept:
        if volume.get("status", {}).get("phase") in ("Released", "Failed"):
            cluster.delete("persistentvolume", volume["metadata"]["name"])
            shutil.rmtree(volume["spec"]["local"]["path"], ignore_errors=True)
    for offer in volumes.OFFERS:
        # one without a phase yet was made a moment ago
        ours = [v for v in kept if v["metadata"]["labels"][volumes.KEPT] == offer.name]
        open_now = [v for v in ours if v.get("status", {}).get("phase", "Pending") in ("Pending", "Available")]
        for _ in range(offer.free - len(open_now)):
            volumes.create(cluster, offer)


def _keep(cluster: Cluster) -> None:
    """For ever: a round now, and another at each change of any volume."""
    while True:
        watch = [f"{cluster.binaries}/kubectl", f"--kubeconfig={cluster.kubeconfig}"]
        watch += ["get", "persistentvolumes", "--watch", "--output=name"]
        with subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) as changes:
            assert changes.stdout
            try:
                _tend(cluster)
                for _ in changes.stdout:
                    _tend(cluster)
            except KubectlError as error:  # a conflict, or the API server is away: look again
                print(error, file=sys.stderr, flush=True)
            finally:
                changes.kill()
        time.sleep(1)


if __name__ == "__main__":
    _keep(Cluster(Path(sys.argv[1]), Path(sys.argv[2])))
