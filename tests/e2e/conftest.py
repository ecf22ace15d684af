"""The product as a user has it: installed by its chart, with its images, on the real cluster."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from examples.quickstart.install import REPOSITORY, Images, install
from examples.quickstart.upload import DATA, HERE, fill_claim
from tests.cluster import gpus, images, kwok, settings
from tests.cluster.client import Cluster, Manifest
from tests.e2e.processes import kill_operator
from tests.e2e.troubleshooting import write_bad_files
from tests.e2e.versions import Versions

WHOLE_WAY = "the-whole-way"
#: Some of the golden examples: to answer them all takes longer than a short training.
FEW = "few.jsonl"
#: Real pods do not run on nodes that only look like it.
GPU_TAINT = {"key": gpus.RESOURCE, "value": "present", "effect": "NoSchedule"}

VALUES = {
    "cpuAllowed": True,
    # the installation's mirror; the tests that ask it serve it
    "stageEnv": {"OMP_NUM_THREADS": "1", "HF_ENDPOINT": f"https://{settings.HOST_IP}:{settings.HUB_PORT}"},
    "resyncSeconds": 10,
    "operator": {"replicas": 2},
    # several jobs at once on a small machine
    "cpuStages": {"requests": {"cpu": "200m", "memory": "1Gi"}},
    "trainStage": {"requests": {"cpu": "200m"}},
}


@dataclass(frozen=True)
class Product:
    """The installed product, and a namespace whose claim `quickstart` holds base model and data."""

    cluster: Cluster
    images: Images
    namespace: str

    def apply(self, job: Manifest) -> str:
        """Apply a QLoRAJob; its name."""
        self.cluster.kubectl("apply", "--filename=-", namespace=self.namespace, stdin=yaml.safe_dump(job))
        return job["metadata"]["name"]

    def job(self, name: str) -> Manifest:
        return self.cluster.get("qlorajobs.qlora.dev", name, self.namespace)

    def edit(self, name: str, spec: Manifest) -> None:
        self.cluster.patch("qlorajobs.qlora.dev", name, {"spec": spec}, self.namespace)

    def pods(self, name: str, stage: str | None = None) -> list[Manifest]:
        selector = f"qlora.dev/job={name}" + (f",qlora.dev/stage={stage}" if stage else "")
        return self.cluster.list("pod", self.namespace, selector)

    def logs(self, name: str, stage: str) -> str:
        """What the stage's pods have written so far."""
        return "\n".join(self.cluster.logs(p["metadata"]["name"], self.namespace) for p in self.pods(name, stage))

    def running(self, name: str, stage: str, timeout: float = 240) -> Manifest:
        """The pod in which `stage` runs, once it does."""

        def now() -> list[Manifest]:
            return [p for p in self.pods(name, stage) if p["status"]["phase"] == "Running" and not _is_leaving(p)]

        found = self.cluster.wait(f"{stage} of {name} runs", now, bool, timeout, self.namespace, interval=0.5)
        return found[-1]

    def wait_for(self, name: str, *phases: str, timeout: float) -> Manifest:
        """The job, once it is in one of `phases`. A job that failed instead is an error at once."""

        def there(job: Manifest) -> bool:
            phase = job.get("status", {}).get("phase")
            if phase == "Failed" and "Failed" not in phases:
                pytest.fail(f"{name} failed: {job['status']['message']}")
            return phase in phases

        expected = f"{name} is {' or '.join(phases)}"
        return self.cluster.wait(expected, lambda: self.job(name), there, timeout, self.namespace, interval=1)


def _is_leaving(pod: Manifest) -> bool:
    return "deletionTimestamp" in pod["metadata"]


def condition(job: Manifest, kind: str) -> Manifest:
    """The condition `kind` of a job; empty if it has none."""
    return next((c for c in job.get("status", {}).get("conditions", ()) if c["type"] == kind), {})


def quickstart(name: str, **spec: Any) -> Manifest:
    """The quickstart's job under another name and with its own place for the results; `spec` replaces whole parts."""
    job = yaml.safe_load((REPOSITORY / "examples" / "quickstart.yaml").read_text())
    job["metadata"]["name"] = name
    job["spec"]["output"]["uri"] = f"pvc://quickstart/models/{name}"
    job["spec"].update(spec)
    return job


def tiny(name: str, steps: int, *formats: str, **spec: Any) -> Manifest:
    """A job that is not evaluated, and trains for so many steps of a fraction of a second; `spec` replaces parts."""
    training = {"maxSteps": steps, "effectiveBatchSize": 2, "gradientCheckpointing": False}
    dataset = {"train": [{"uri": "pvc://quickstart/train.jsonl"}], "maxLength": 256}
    job = quickstart(name, **{"evaluation": {}, "training": training, "dataset": dataset, **spec})
    job["spec"]["output"]["formats"] = list(formats) or ["adapter"]
    return job


@pytest.fixture(scope="session")
def product(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    """Installed with two replicas, and so that a job that asks for a GPU may train on the CPU: the GPUs are faked."""
    built = Images(images.ensure("operator"), images.ensure("trainer"))
    install(cluster, built, VALUES)
    namespace = f"e2e-{uuid.uuid4().hex[:6]}"
    cluster.create_namespace(namespace)
    bad = write_bad_files(tmp_path_factory.mktemp("data"), HERE / "train.jsonl")
    few = bad.with_name(FEW)
    few.write_text("".join((HERE / "golden.jsonl").read_text().splitlines(keepends=True)[:8]))
    fill_claim(cluster, namespace, built.trainer, (*(HERE / name for name in DATA), bad, few))
    yield Product(cluster, built, namespace)
    cluster.delete("namespace", namespace, wait=False)


@pytest.fixture(scope="session")
def whole_way(product: Product) -> Iterator[Versions]:
    """The job `WHOLE_WAY` on its way, watched from the first moment; the operator was killed (-9) as it began to train.

    It trains for minutes, so that a session's last tests run beside it. It asks for an NVIDIA GPU: the cluster has
    three flavours, of which only the smallest is on a node that is real (the GPU is faked, and the CPU is allowed).
    """
    cluster, namespace = product.cluster, product.namespace
    gpus.give(cluster, gpus.A2, 1)
    fake = []
    for prefix, flavour in (("gpu-l4", gpus.L4), ("gpu-h100", gpus.H100)):
        fake += kwok.create_nodes(cluster, prefix, 1, gpus.labels(flavour, 8), {gpus.RESOURCE: "8"}, taints=[GPU_TAINT])
    versions = Versions(cluster, f"/apis/qlora.dev/v1alpha1/namespaces/{namespace}/qlorajobs", WHOLE_WAY)
    product.apply(quickstart(WHOLE_WAY, hardware={"accelerator": "nvidia"}, storage={"retain": "Keep"}))
    cluster.wait(
        "the training makes steps",
        lambda: product.logs(WHOLE_WAY, "train"),
        lambda text: "step " in text,
        timeout=600,
        namespace=namespace,
        interval=2,
    )
    kill_operator(cluster)
    yield versions
    versions.stop()
    kwok.delete_nodes(cluster, fake)
    gpus.take(cluster)
