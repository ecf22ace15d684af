"""What follows when an attempt ends badly, on the real cluster: memory runs out, a training diverges, a volume is full.

Killed and deleted pods, drained nodes, a killed operator and edits on the way are in test_faults.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster import settings, volumes
from tests.cluster.client import Manifest
from tests.e2e import invariants
from tests.e2e.conftest import Product, condition, tiny
from tests.e2e.judge import judge
from tests.e2e.processes import small_disk, starve
from tests.e2e.troubleshooting import DIVERGED, FULL, OUTGROWN, Trouble

pytestmark = pytest.mark.e2e

BATCH, STEPS = 16, 16
#: A step of so many sequences takes large blocks, which are asked of the system anew each time.
LARGE = {"maxSteps": STEPS, "effectiveBatchSize": BATCH, "microBatchSize": BATCH, "gradientCheckpointing": False}
SHORT = {"train": [{"uri": "pvc://quickstart/train.jsonl"}], "maxLength": 128}


@pytest.fixture(scope="module")
def all_at_once(product: Product) -> Iterator[None]:
    """The three jobs, applied at the same time; the work volume of one has room for no checkpoint."""
    name = f"{product.namespace}-full"
    here = {"key": "kubernetes.io/hostname", "operator": "In", "values": [settings.NODE]}
    volume: Manifest = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": volumes.CLASS,
            "claimRef": {"name": f"{FULL.name}-work", "namespace": product.namespace},
            "local": {"path": str(settings.VOLUMES / name)},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}},
        },
    }
    with small_disk(settings.VOLUMES / name, "1m"):
        product.cluster.apply(volume)
        kept = {"retain": "Keep"}  # giving the volume back takes the finished pods, and their logs
        often = {"every": "1s"}
        product.apply(tiny(OUTGROWN.name, STEPS, training=LARGE, dataset=SHORT, checkpoint=often, storage=kept))
        product.apply(tiny(DIVERGED.name, STEPS, dataset=SHORT, **DIVERGED.spec))
        product.apply(tiny(FULL.name, STEPS, dataset=SHORT, **FULL.spec))
        yield
        product.cluster.delete("qlorajobs.qlora.dev", FULL.name, product.namespace)
        product.cluster.delete("persistentvolume", name, wait=False)


def ended(job: Manifest, stage: str = "train") -> list[Manifest]:
    return [a for a in job["status"].get("attempts", ()) if a["stage"] == stage and a.get("outcome")]


def failed(product: Product, trouble: Trouble) -> Manifest:
    job = product.wait_for(trouble.name, *invariants.FINAL, timeout=300)
    assert (job["status"]["phase"], condition(job, "Ready")["reason"]) == (trouble.phase, trouble.reason)
    assert trouble.is_said_in(job["status"]["message"]), job["status"]["message"]
    assert judge([job])[0].status == "Failed"
    assert [a["outcome"] for a in ended(job)] == [trouble.reason], "it is not tried again"
    return job


def test_a_training_that_outgrows_its_memory_goes_on_with_half_the_micro_batch(
    product: Product, all_at_once: None
) -> None:
    cluster, name = product.cluster, OUTGROWN.name
    pod = product.running(name, "train")
    cluster.wait(
        f"{name} has a checkpoint",
        lambda: cluster.logs(pod["metadata"]["name"], product.namespace),
        lambda text: "checkpoint at step" in text,
        timeout=240,
        namespace=product.namespace,
        interval=0.5,
    )
    starve(pod, "qlora_trainer")
    done = product.wait_for(name, "Succeeded", timeout=300)
    first, second = ended(done)
    assert (first["outcome"], first["exitCode"], second["outcome"]) == ("OutOfMemory", 13, "Succeeded")
    assert first["change"] == f"micro-batch {BATCH} → {BATCH // 2}, accumulation 1 → 2"
    assert "out of memory" in first["message"]
    plan = done["status"]["plan"]
    assert (plan["microBatchSize"], plan["gradientAccumulation"]) == (BATCH // 2, 2)
    assert plan["recipe"]["effectiveBatchSize"] == BATCH
    assert "resumed from step" in product.logs(name, "train")
    invariants.check(cluster, done)


def test_a_training_that_diverges_is_given_up_at_once(product: Product, all_at_once: None) -> None:
    job = failed(product, DIVERGED)
    assert ended(job)[0]["exitCode"] == 12
    invariants.check(product.cluster, job)


def test_a_full_volume_is_told_and_kept(product: Product, all_at_once: None) -> None:
    job = product.cluster.wait(
        f"{FULL.name} stands still",
        lambda: product.job(FULL.name),
        lambda job: condition(job, "Ready").get("reason") == FULL.reason,
        300,
        product.namespace,
        interval=1,
    )
    assert job["status"]["phase"] == FULL.phase
    assert FULL.is_said_in(job["status"]["message"]), job["status"]["message"]
    assert judge([job])[0].status == "Failed", "as kstatus has it: nothing goes on by itself"
    assert [(a["outcome"], a["exitCode"]) for a in ended(job)] == [("VolumeFull", 17)], "it is not tried again"
    assert job["spec"]["storage"]["retain"] == "Delete"
    assert job["status"]["workVolume"]["retained"]
    invariants.check(product.cluster, job)
    assert product.cluster.find("persistentvolumeclaim", f"{FULL.name}-work", product.namespace)
