"""Puts the quickstart's base model and data on a claim, through a pod, as on any cluster."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster import pods, settings
from tests.cluster.client import Cluster, Manifest
from tests.cluster.console import step

HERE = Path(__file__).resolve().parent
CLAIM = "quickstart"
MOUNT = "/data"
DATA = ("train.jsonl", "golden.jsonl")


class BaseModelError(Exception):
    """The base model could not be made; the message has the maker's last lines."""


def base_model() -> Path:
    """The base model's directory: made once per content of its maker and text, kept in the cache.

    Raises BaseModelError.
    """
    key = hashlib.sha256()
    for name in ("make_base.py", "definitions.txt"):
        key.update((HERE / name).read_bytes())
    place = settings.cache() / f"quickstart-base-{key.hexdigest()[:12]}"
    if not place.exists():
        for old in settings.cache().glob("quickstart-base-*"):
            shutil.rmtree(old)
        place.parent.mkdir(parents=True, exist_ok=True)
        with step("pre-training the quickstart's base model (once)") as work:
            maker = subprocess.Popen(
                [sys.executable, str(HERE / "make_base.py"), str(place)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            said: list[str] = []
            for line in maker.stdout or ():
                said.append(line)
                work.say(line)
            if maker.wait():
                raise BaseModelError(f"make_base.py failed:\n{''.join(said[-20:])}")
    return place


def fill_claim(cluster: Cluster, namespace: str, image: str, data: tuple[Path, ...] = ()) -> None:
    """The claim `quickstart` in `namespace` with base model and data (default: the quickstart's own files)."""
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": CLAIM},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "2Gi"}}},
    }
    cluster.apply(claim, namespace=namespace)
    model = base_model()
    with shell(cluster, namespace, image) as pod, step("copying base model and data to the claim"):
        cluster.kubectl("exec", pod, "--", "rm", "-rf", f"{MOUNT}/base", namespace=namespace)
        cluster.kubectl("cp", "--no-preserve", str(model), f"{pod}:{MOUNT}/base", namespace=namespace)
        for file in data or tuple(HERE / name for name in DATA):
            cluster.kubectl("cp", "--no-preserve", str(file), f"{pod}:{MOUNT}/{file.name}", namespace=namespace)


@contextmanager
def shell(cluster: Cluster, namespace: str, image: str, name: str = "quickstart-shell") -> Iterator[str]:
    """A restricted pod of the trainer image with the claim mounted, to copy and to ask in; gone afterwards."""
    cluster.delete("pod", name, namespace)
    cluster.apply(_pod(name, image), namespace=namespace)
    with step(f"pod {name}: pulling the trainer image if the node lacks it"):
        cluster.wait_pod(name, namespace, "Running", timeout=600)
    try:
        yield name
    finally:
        cluster.delete("pod", name, namespace)


def _pod(name: str, image: str) -> Manifest:
    pod = pods.restricted(name, ["sleep", "infinity"], image=image, claim=CLAIM)
    (container,) = pod["spec"]["containers"]
    container["env"] = [{"name": "OMP_NUM_THREADS", "value": "1"}]
    container["volumeMounts"].append({"name": "tmp", "mountPath": "/tmp"})  # the root file system is read-only
    pod["spec"]["volumes"].append({"name": "tmp", "emptyDir": {}})
    return pod


def ask(cluster: Cluster, namespace: str, pod: str, model: str, prompt: str) -> str:
    """What the model directory `model` (on the claim) answers."""
    command = ["python", "-m", "qlora_trainer.ask", "--model", f"{MOUNT}/{model}", "--prompt", prompt]
    return cluster.kubectl("exec", pod, "--", *command, namespace=namespace).strip()
