"""etcd, API server, controller manager and scheduler, and the credentials of everyone who talks to them."""

import base64
import secrets
import ssl
import subprocess
import urllib.request
from pathlib import Path

import yaml

from tests.cluster import settings
from tests.cluster.process import Server
from tests.cluster.settings import HOST_IP, LOOPBACK, PKI

ETCD_URL = f"http://{LOOPBACK}:2379"
# who → (user name, groups). What a component may do is RBAC's business, as in any cluster.
USERS = {
    "admin": ("admin", "system:masters"),
    "controller-manager": ("system:kube-controller-manager", ""),
    "scheduler": ("system:kube-scheduler", ""),
    "proxy": ("system:kube-proxy", ""),
    "dns": ("system:coredns", ""),
    "kwok": ("kwok", "system:masters"),
    "volumes": ("volumes", "system:masters"),
    settings.NODE: (f"system:node:{settings.NODE}", "system:nodes"),
}


def write_credentials() -> None:
    """A certificate authority, the API server's certificate, and a token and kubeconfig for each user."""
    PKI.mkdir(parents=True, mode=0o700)
    settings.KUBECONFIGS.mkdir(mode=0o700)
    names = [f"IP:{address}" for address in (settings.API_SERVICE_IP, HOST_IP)]
    names += ["DNS:kubernetes.default.svc", "DNS:kubernetes.default.svc.cluster.local"]
    (PKI / "api.ext").write_text(f"subjectAltName={','.join(names)}\n")
    for command in (
        "genrsa -out sa.key 2048",
        "rsa -in sa.key -pubout -out sa.pub",
        "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -subj /CN=qlora-test-cluster -days 365",
        "req -newkey rsa:2048 -nodes -keyout api.key -out api.csr -subj /O=system:masters/CN=kube-apiserver",
        "x509 -req -in api.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -out api.crt -extfile api.ext",
    ):
        subprocess.run(["openssl", *command.split()], cwd=PKI, check=True, capture_output=True)
    tokens = {who: secrets.token_hex(16) for who in USERS}
    rows = [f'{tokens[who]},{name},{who},"{groups}"' for who, (name, groups) in USERS.items()]
    _private(PKI / "tokens.csv", "\n".join(rows) + "\n")
    for who, token in tokens.items():
        _private(settings.KUBECONFIGS / f"{who}.kubeconfig", _kubeconfig(token))


def _private(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)


def _kubeconfig(token: str) -> str:
    authority = base64.b64encode((PKI / "ca.crt").read_bytes()).decode()
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "qlora", "cluster": {"server": settings.API_URL, "certificate-authority-data": authority}}
            ],
            "users": [{"name": "qlora", "user": {"token": token}}],
            "contexts": [{"name": "qlora", "context": {"cluster": "qlora", "user": "qlora"}}],
            "current-context": "qlora",
        }
    )


def servers(binaries: Path) -> list[Server]:
    """The four, in the order they need each other."""

    def credentials(who: str) -> str:
        return f"--kubeconfig={settings.KUBECONFIGS}/{who}.kubeconfig"

    etcd = [
        f"{binaries}/etcd",
        f"--data-dir={settings.STATE}/etcd",
        "--unsafe-no-fsync",  # nothing in it outlives the cluster
        f"--listen-client-urls={ETCD_URL}",
        f"--advertise-client-urls={ETCD_URL}",
        f"--listen-peer-urls=http://{LOOPBACK}:2380",
        f"--initial-advertise-peer-urls=http://{LOOPBACK}:2380",
        f"--initial-cluster=default=http://{LOOPBACK}:2380",
    ]
    apiserver = [
        f"{binaries}/kube-apiserver",
        f"--etcd-servers={ETCD_URL}",
        f"--bind-address={HOST_IP}",
        f"--advertise-address={HOST_IP}",
        "--secure-port=6443",
        f"--tls-cert-file={PKI}/api.crt",
        f"--tls-private-key-file={PKI}/api.key",
        f"--client-ca-file={PKI}/ca.crt",
        f"--cert-dir={PKI}/run",
        f"--token-auth-file={PKI}/tokens.csv",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={PKI}/sa.pub",
        f"--service-account-signing-key-file={PKI}/sa.key",
        f"--service-cluster-ip-range={settings.SERVICE_CIDR}",
        "--allow-privileged=true",
        f"--kubelet-client-certificate={PKI}/api.crt",
        f"--kubelet-client-key={PKI}/api.key",
        "--kubelet-preferred-address-types=InternalIP",
    ]
    controllers = [
        f"{binaries}/kube-controller-manager",
        credentials("controller-manager"),
        "--leader-elect=false",
        "--secure-port=0",
        "--use-service-account-credentials=true",
        # fake nodes by the thousand: each loses a taint once it is Ready, and says rarely that it lives (kwok.py)
        "--kube-api-qps=200",
        "--kube-api-burst=400",
        "--node-monitor-grace-period=120s",
        f"--service-account-private-key-file={PKI}/sa.key",
        f"--root-ca-file={PKI}/ca.crt",
        f"--flex-volume-plugin-dir={settings.STATE}/volume-plugins",  # else it makes one under /usr/libexec
    ]
    scheduler = [
        f"{binaries}/kube-scheduler",
        credentials("scheduler"),
        "--leader-elect=false",
        "--secure-port=0",
    ]
    return [
        Server("etcd", etcd, lambda: answers(f"{ETCD_URL}/health")),
        # it takes a minute to stop on SIGTERM and holds its port meanwhile: SIGKILL, as for the rest
        Server("kube-apiserver", apiserver, lambda: answers(f"{settings.API_URL}/readyz")),
        Server("kube-controller-manager", controllers, lambda: True),
        Server("kube-scheduler", scheduler, lambda: True),
    ]


def answers(url: str) -> bool:
    """Whether a GET of the URL, with the cluster's authority where it is HTTPS, is answered with success."""
    trust = ssl.create_default_context(cafile=str(PKI / "ca.crt")) if url.startswith("https") else None
    direct = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), *([urllib.request.HTTPSHandler(context=trust)] if trust else [])
    )
    try:
        with direct.open(url, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


# What CoreDNS reads, and what clusters from kubeadm call it.
DNS_RIGHTS = [
    {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": "system:coredns"},
        "rules": [
            {
                "apiGroups": [""],
                "resources": ["endpoints", "services", "pods", "namespaces"],
                "verbs": ["list", "watch"],
            },
            {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
        ],
    },
    {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "system:coredns"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:coredns"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "system:coredns"}],
    },
]
