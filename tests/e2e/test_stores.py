"""A job whose model, data and results are in a real S3 server, beside jobs that get something wrong there."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import yaml

from examples.quickstart.install import NAMESPACE as OPERATOR_NAMESPACE
from examples.quickstart.install import REPOSITORY
from examples.quickstart.upload import HERE, base_model
from qlora_trainer.artifacts import digests_of
from qlora_trainer.publish import MANIFEST_NAME
from tests.cluster import settings
from tests.cluster.client import Manifest
from tests.cluster.s3 import S3, serving
from tests.e2e.conftest import Product, condition

pytestmark = pytest.mark.e2e

SECRET = "s3"
WRONG_KEY = "this-is-not-the-secret-key"
TINY = {"maxSteps": 3, "effectiveBatchSize": 1, "gradientCheckpointing": False}
EXAMPLES = 64


@pytest.fixture(scope="module")
def server(product: Product, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """On the cluster's bridge, with a certificate of an authority of its own, and with what the example reads."""
    root = tmp_path_factory.mktemp("s3")
    data = root / "tickets.jsonl"
    with (HERE / "train.jsonl").open() as lines:
        data.write_text("".join(islice(lines, EXAMPLES)))
    with serving(root / "server", settings.HOST_IP) as server:
        for bucket in ("models", "data"):
            server.create_bucket(bucket)
        server.put_directory(base_model(), "models", "llama-3.1-8b-instruct")
        server.store("data").put("tickets.jsonl", data)
        yield server


def example(name: str, secret: str = SECRET, bucket: str = "models") -> Manifest:
    """examples/s3.yaml under another name, with another Secret or model's bucket, and a training of three steps."""
    job = yaml.safe_load((REPOSITORY / "examples" / "s3.yaml").read_text())
    spec = job["spec"]
    job["metadata"]["name"] = name
    spec["training"], spec["hardware"] = TINY, {"accelerator": "cpu"}
    spec["storage"] = {"retain": "Keep"}  # and with it the pods, whose logs are read
    spec["model"]["uri"] = spec["model"]["uri"].replace("s3://models/", f"s3://{bucket}/")
    for place in (spec["model"], *spec["dataset"]["train"], spec["output"]):
        place["credentialsSecretRef"] = {"name": secret}
    return job


def create_secret(product: Product, name: str, content: dict[str, str]) -> None:
    data = {key: base64.b64encode(value.encode()).decode() for key, value in content.items()}
    manifest = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": data}
    product.cluster.create(manifest, product.namespace)


def test_from_store_to_store_and_what_can_be_wrong_there(product: Product, server: S3) -> None:
    create_secret(product, SECRET, server.secret())
    create_secret(product, "wrong-key", server.secret(secretKey=WRONG_KEY))
    jobs = {
        "from-store-to-store": example("from-store-to-store"),
        "s3-wrong-key": example("s3-wrong-key", "wrong-key"),
        "s3-no-bucket": example("s3-no-bucket", bucket="modles"),
        "s3-no-secret": example("s3-no-secret", "nowhere"),
    }
    jobs["s3-no-secret"]["spec"]["retry"] = {"maxRestarts": 0}
    for job in jobs.values():
        product.apply(job)

    refused = {
        "s3-wrong-key": ("BadInput", "does not know the credentials of Secret wrong-key", "SignatureDoesNotMatch"),
        "s3-no-bucket": ("BadInput", f"model.uri: {server.endpoint} has no bucket modles", "check its name"),
        "s3-no-secret": (
            "TooManyRestarts",
            "there is no Secret nowhere in the job's namespace",
            "credentialsSecretRef",
        ),
    }
    for name, (reason, *says) in refused.items():
        failed = product.wait_for(name, "Failed", timeout=240)
        assert condition(failed, "Failed")["reason"] == reason, failed["status"]
        assert all(part in failed["status"]["message"] for part in says), failed["status"]["message"]
        assert product.pods(name, "train") == []

    done = product.wait_for("from-store-to-store", "Succeeded", timeout=300)
    status = done["status"]
    assert [a["outcome"] for a in status["attempts"]] == ["Succeeded"] * 5
    read = [*base_model().iterdir(), server.buckets / "data" / "tickets.jsonl"]
    assert status["inspection"]["downloadBytes"] == sum(path.stat().st_size for path in read)
    assert status["plan"]["diskBytes"] > status["inspection"]["downloadBytes"]
    for artifact in status["artifacts"]:
        assert artifact["uri"] == f"s3://models/support-bot/{artifact['name']}"
        verify(server.buckets / "models" / "support-bot" / artifact["name"], artifact["digest"])

    told = product.cluster.kubectl(
        "get", "qlorajobs.qlora.dev,jobs,pods,configmaps,events", "--output=yaml", namespace=product.namespace
    )
    told += "".join(product.logs(name, stage) for name in jobs for stage in ("inspect", "train", "merge", "publish"))
    told += "".join(
        product.cluster.logs(p["metadata"]["name"], OPERATOR_NAMESPACE)
        for p in product.cluster.list("pod", OPERATOR_NAMESPACE)
    )
    for key in (server.secret_key, WRONG_KEY):
        assert key not in told
        assert base64.b64encode(key.encode()).decode() not in told


def verify(directory: Path, digest: str) -> None:
    """The artifact at its place is the one that the status names, file by file, and nothing else."""
    found = digests_of(directory)
    manifest = json.loads((directory / MANIFEST_NAME).read_text())
    del found[MANIFEST_NAME]
    assert manifest["digest"] == digest
    assert {name: entry["digest"] for name, entry in manifest["files"].items()} == found
