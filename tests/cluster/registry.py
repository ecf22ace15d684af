"""The registry that the node pulls from: Debian's docker-registry, its storage kept in the cache."""

import hashlib
import io
import json
import signal
import subprocess
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import yaml

from tests.cluster import settings
from tests.cluster.controlplane import answers
from tests.cluster.process import Server

_URL = f"http://{settings.REGISTRY}"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = settings.STATE / "registry.yaml"


def storage() -> Path:
    return settings.cache() / "registry"


def server() -> Server:
    """Ready when it answers; SIGTERM lets it finish what it writes."""
    return Server(
        "registry", ["docker-registry", "serve", str(_CONFIG)], lambda: answers(f"{_URL}/v2/"), signal.SIGTERM
    )


def prepare() -> None:
    """Write the configuration, and drop from the storage what no tag names any more."""
    storage().mkdir(parents=True, exist_ok=True)
    configuration = {
        "version": 0.1,
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {
            "filesystem": {"rootdirectory": str(storage())},
            "delete": {"enabled": True},
            "maintenance": {"uploadpurging": {"enabled": True, "age": "24h", "interval": "24h", "dryrun": False}},
        },
        "http": {"addr": settings.REGISTRY},
    }
    _CONFIG.write_text(yaml.safe_dump(configuration))
    collect()


def collect() -> None:
    """Remove layers that no tag leads to any more. Only while nobody pushes."""
    if (storage() / "docker").exists():
        settings.LOGS.mkdir(parents=True, exist_ok=True)
        with (settings.LOGS / "registry-collect.log").open("wb") as log:
            command = ["docker-registry", "garbage-collect", "--delete-untagged", str(_CONFIG)]
            subprocess.run(command, stdout=log, stderr=log, check=False)


def _request(method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None):
    url = path if path.startswith("http") else f"{_URL}/v2/{path}"
    request = urllib.request.Request(url, data=body, method=method, headers=headers or {})
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60)


def digest(name: str, tag: str) -> str | None:
    """Digest of the manifest that `name:tag` stands for; None if there is none."""
    accept = f"{_MANIFEST}, application/vnd.docker.distribution.manifest.v2+json"
    try:
        with _request("HEAD", f"{name}/manifests/{tag}", headers={"Accept": accept}) as answer:
            return answer.headers["Docker-Content-Digest"]
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def tags(name: str) -> list[str]:
    try:
        with _request("GET", f"{name}/tags/list") as answer:
            return json.load(answer)["tags"] or []
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return []
        raise


def delete(name: str, tag: str) -> None:
    """Remove a manifest with all its tags; its layers go with the next cluster's start."""
    if found := digest(name, tag):
        _request("DELETE", f"{name}/manifests/{found}").close()


def _push_blob(name: str, blob: bytes) -> str:
    found = f"sha256:{hashlib.sha256(blob).hexdigest()}"
    with _request("POST", f"{name}/blobs/uploads/", b"") as answer:
        location = answer.headers["Location"]
    target = f"{location}{'&' if '?' in location else '?'}digest={found}"
    _request("PUT", target, blob, {"Content-Type": "application/octet-stream"}).close()
    return found


def push_files(name: str, tag: str, files: list[tuple[str, bytes | str | None, int]], command: list[str]) -> str:
    """Push an image of one layer made of `files`; returns its reference.

    Each file is (name, bytes for a file | str for a symlink's target | None for a directory, mode).
    """
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for path, data, mode in files:
            info = tarfile.TarInfo(path)
            info.mode = mode
            if data is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(data, str):
                info.type, info.linkname = tarfile.SYMTYPE, data
            else:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data) if isinstance(data, bytes) else None)
    blob = layer.getvalue()
    layer_digest = _push_blob(name, blob)
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": command, "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [layer_digest]},
        }
    ).encode()
    config_type, layer_type = "application/vnd.oci.image.config.v1+json", "application/vnd.oci.image.layer.v1.tar"
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": {"mediaType": config_type, "size": len(config), "digest": _push_blob(name, config)},
        "layers": [{"mediaType": layer_type, "size": len(blob), "digest": layer_digest}],
    }
    _request("PUT", f"{name}/manifests/{tag}", json.dumps(manifest).encode(), {"Content-Type": _MANIFEST}).close()
    return f"{settings.REGISTRY}/{name}:{tag}"


BUSYBOX_IMAGE = f"{settings.REGISTRY}/busybox:1"
_TOOLS = [
    "sh",
    "cat",
    "echo",
    "sleep",
    "id",
    "ls",
    "dd",
    "wget",
    "nslookup",
    "env",
    "grep",
    "test",
    "touch",
    "rm",
    "mkdir",
]


def push_small_images() -> None:
    """`pause`, which holds each pod's namespaces, and `busybox` for tests: both from this machine's busybox."""
    busybox = Path("/bin/busybox").read_bytes()
    files: list[tuple[str, bytes | str | None, int]] = [
        ("bin", None, 0o755),
        ("tmp", None, 0o1777),
        ("etc", None, 0o755),
        ("bin/busybox", busybox, 0o755),
    ]
    links: list[tuple[str, bytes | str | None, int]] = [(f"bin/{tool}", "busybox", 0o777) for tool in _TOOLS]
    push_files("pause", "1", [*files, ("bin/sleep", "busybox", 0o777)], ["sleep", "2147483647"])
    push_files("busybox", "1", files + links, ["sh"])
