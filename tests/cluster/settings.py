"""Where the cluster lives on this machine: addresses, directories, names."""

import os
from pathlib import Path

# One cluster per machine: all of these are fixed, so that whoever comes second finds the first one's.
STATE = Path("/var/lib/qlora-cluster")  # on a disk: containerd unpacks images here
LOCK = Path("/run/qlora-cluster.lock")
CGROUP = "qlora-cluster"
BRIDGE = "qlora0"
NFT_TABLE = "qlora-cluster"

HOST_IP = "10.50.0.1"  # on our own bridge: reached by this machine and by pods, by nobody else
LOOPBACK = "127.50.0.1"  # what only this machine needs; not 127.0.0.1, where others' servers may listen
POD_CIDR = "10.244.0.0/24"
SERVICE_CIDR = "10.96.0.0/16"
API_SERVICE_IP = "10.96.0.1"
API_URL = f"https://{HOST_IP}:6443"
REGISTRY = f"{HOST_IP}:5000"
HUB_PORT = 5001  # tests serve a hub there while they need one
NODE = "node1"

LOGS = STATE / "log"
PKI = STATE / "pki"
KUBECONFIGS = STATE / "kubeconfig"
KUBECONFIG = KUBECONFIGS / "admin.kubeconfig"
VOLUMES = STATE / "volumes"

REPOSITORY = Path(__file__).resolve().parents[2]
GO_MODULE = Path(__file__).resolve().parent / "go"


def cache() -> Path:
    """The directory for what is worth keeping between clusters; losing it costs only time."""
    if chosen := os.environ.get("QLORA_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora-operator"
