"""What takes too long for every run: `make soak`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from examples.quickstart.upload import HERE, MOUNT, shell
from tests.e2e.conftest import Product, quickstart

pytestmark = [pytest.mark.e2e, pytest.mark.soak]

TIMEOUT_SECONDS = 1200


def tuned_score(product: Product, name: str) -> float:
    job = product.wait_for(name, "Succeeded", timeout=TIMEOUT_SECONDS)
    (score,) = job["status"]["evaluation"]["scores"]
    return score["tuned"]


def test_what_is_learned_is_the_task_and_not_the_form(product: Product, tmp_path: Path) -> None:
    """The same job on shuffled labels sees the same texts and answers, and must be worse by 20 points."""
    shuffled = tmp_path / "train-shuffled.jsonl"
    maker = [sys.executable, str(HERE / "make_data.py"), "--shuffle-labels", str(shuffled)]
    subprocess.run(maker, check=True, capture_output=True)
    with shell(product.cluster, product.namespace, product.images.trainer) as pod:
        target = f"{pod}:{MOUNT}/{shuffled.name}"
        product.cluster.kubectl("cp", "--no-preserve", str(shuffled), target, namespace=product.namespace)

    same_job = quickstart("learned")
    dataset = {**same_job["spec"]["dataset"], "train": [{"uri": f"pvc://quickstart/{shuffled.name}"}]}
    product.apply(same_job)
    learned = tuned_score(product, "learned")
    product.apply(quickstart("shuffled", dataset=dataset))
    assert learned >= tuned_score(product, "shuffled") + 0.20
