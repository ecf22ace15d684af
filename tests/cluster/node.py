"""The one real node: containerd and kubelet in namespaces of their own, kube-proxy and CoreDNS beside them."""

import contextlib
import json
import sys
from pathlib import Path

import yaml

from tests.cluster import node_init, settings
from tests.cluster.client import Cluster
from tests.cluster.controlplane import answers
from tests.cluster.process import Server
from tests.cluster.settings import HOST_IP, KUBECONFIGS, LOOPBACK, PKI, STATE
from tests.cluster.state import State, make_directory

HOME = STATE / settings.NODE
SOCKET = HOME / "run" / "containerd.sock"
PAUSE_IMAGE = f"{settings.REGISTRY}/pause:1"


def prepare(state: State) -> None:
    """Write the configuration of every program of the node, and make the directories it mounts over."""
    for name in ("run", "cni", "sys", "log"):
        (HOME / name).mkdir(parents=True)
    for directory in node_init.PRIVATE_DIRECTORIES:
        if not Path(directory).exists():
            make_directory(Path(directory), state)
    (HOME / "containerd.toml").write_text(_containerd())
    (HOME / "cni" / "10-pods.conflist").write_text(json.dumps(_CNI))
    (HOME / "kubelet.yaml").write_text(yaml.safe_dump(_KUBELET))
    (HOME / "kube-proxy.yaml").write_text(yaml.safe_dump(_KUBE_PROXY))
    (HOME / "Corefile").write_text(_COREFILE)
    registry = HOME / "registries" / settings.REGISTRY  # plain HTTP, on our own bridge
    registry.mkdir(parents=True)
    (registry / "hosts.toml").write_text(
        f'server = "http://{settings.REGISTRY}"\n'
        f'[host."http://{settings.REGISTRY}"]\n  capabilities = ["pull", "resolve"]\n'
    )


def servers(binaries: Path, cluster: Cluster) -> list[Server]:
    """Ready when the API server calls the node Ready, and when names are answered."""
    kubelet = [
        f"{binaries}/kubelet",
        f"--config={HOME}/kubelet.yaml",
        f"--root-dir={HOME}/kubelet",
        f"--cert-dir={HOME}/kubelet/pki",
        f"--kubeconfig={KUBECONFIGS}/{settings.NODE}.kubeconfig",
        f"--hostname-override={settings.NODE}",
        f"--node-ip={HOST_IP}",
    ]
    inside = {
        "home": str(HOME),
        "log": str(settings.LOGS),
        "cgroup": settings.CGROUP,
        "containerd": ["containerd", f"--config={HOME}/containerd.toml"],
        "socket": str(SOCKET),
        "kubelet": kubelet,
    }
    (HOME / "init.json").write_text(json.dumps(inside))
    proxy = [f"{binaries}/kube-proxy", f"--config={HOME}/kube-proxy.yaml"]
    dns = [f"{binaries}/coredns", f"-conf={HOME}/Corefile"]
    return [
        # `unshare` heeds no SIGTERM; killed, it takes every process of the node with it (--kill-child)
        Server(
            "node",
            [sys.executable, node_init.__file__, "outside", f"{HOME}/init.json"],
            lambda: _node_ready(cluster),
        ),
        Server("kube-proxy", proxy, lambda: answers(f"http://{LOOPBACK}:10256/healthz")),
        Server("coredns", dns, lambda: answers(f"http://{LOOPBACK}:8181/ready")),
    ]


def _node_ready(cluster: Cluster) -> bool:
    found = cluster.find("node", settings.NODE)
    conditions = found["status"].get("conditions", []) if found else []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def remove_cgroups() -> None:
    """Remove the node's (by now empty) control groups, under cgroup v1 one tree per controller."""
    for root in node_init.cgroup_roots(settings.CGROUP):
        for directory in sorted(root.rglob("*/"), key=lambda path: len(path.parts), reverse=True):
            with contextlib.suppress(FileNotFoundError):
                directory.rmdir()
        with contextlib.suppress(FileNotFoundError):
            root.rmdir()


def _containerd() -> str:
    return f"""\
version = 2
root = "{HOME}/containerd"
state = "{HOME}/run"
[grpc]
  address = "{SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true  # works without CAP_SYS_RESOURCE too
  disable_apparmor = true  # would load a profile into the machine's kernel
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{HOME}/registries"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{HOME}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    discard_unpacked_layers = true
"""


# Point-to-point links, not a bridge: all traffic between pods is routed, so Service addresses work between pods of this
# node without the br_netfilter module. Host ports are left out: they would need iptables rules that outlive the node.
_CNI = {
    "cniVersion": "0.4.0",
    "name": "pods",
    "plugins": [
        {
            "type": "ptp",
            "ipMasq": False,
            "ipam": {
                "type": "host-local",
                "dataDir": f"{HOME}/ipam",
                "ranges": [[{"subnet": settings.POD_CIDR}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }
    ],
}

_KUBELET = {
    "apiVersion": "kubelet.config.k8s.io/v1beta1",
    "kind": "KubeletConfiguration",
    "authentication": {
        "anonymous": {"enabled": False},
        "webhook": {"enabled": True},
        "x509": {"clientCAFile": f"{PKI}/ca.crt"},
    },
    "authorization": {"mode": "Webhook"},
    "address": HOST_IP,
    "healthzBindAddress": LOOPBACK,
    "cgroupDriver": "cgroupfs",
    "failCgroupV1": False,
    "failSwapOn": False,
    "oomScoreAdj": 0,
    "makeIPTablesUtilChains": False,
    "containerRuntimeEndpoint": f"unix://{SOCKET}",
    "podLogsDir": f"{HOME}/log/pods",
    "volumePluginDir": f"{HOME}/volume-plugins",
    "clusterDNS": [HOST_IP],
    "clusterDomain": "cluster.local",
    "resolvConf": "",  # pods see the cluster's names only, as on a site without the internet
    "imageGCHighThresholdPercent": 100,
    "serializeImagePulls": False,
    "evictionHard": {"memory.available": "100Mi"},
}

_KUBE_PROXY = {
    "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
    "kind": "KubeProxyConfiguration",
    "mode": "nftables",
    "clientConnection": {"kubeconfig": f"{KUBECONFIGS}/proxy.kubeconfig"},
    "clusterCIDR": settings.POD_CIDR,
    # zero: leave the machine's own settings
    "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    "hostnameOverride": settings.NODE,
    "healthzBindAddress": f"{LOOPBACK}:10256",
    "metricsBindAddress": f"{LOOPBACK}:10249",
}

_COREFILE = f""".:53 {{
  bind {HOST_IP}
  ready {LOOPBACK}:8181
  kubernetes cluster.local {{
    kubeconfig {KUBECONFIGS}/dns.kubeconfig
  }}
  errors
}}
"""
