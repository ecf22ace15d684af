"""A job whose model and data are on a hub that the installation names, beside jobs that get something wrong there."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from itertools import islice

import pytest
import yaml

from examples.quickstart.install import NAMESPACE as OPERATOR_NAMESPACE
from examples.quickstart.install import REPOSITORY
from examples.quickstart.upload import HERE, base_model
from tests.cluster import settings
from tests.cluster.client import Manifest
from tests.cluster.hub import Hub, directory_files, serving
from tests.e2e.conftest import Product, condition
from tests.e2e.test_stores import EXAMPLES, TINY, create_secret

pytestmark = pytest.mark.e2e

SECRET = "hub"
MODEL, DATA = "meta-llama/Llama-3.1-8B-Instruct", "corp/support-tickets"


@pytest.fixture(scope="module")
def hub(product: Product, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """On the cluster's bridge, with a certificate of an authority of its own, and with what the example reads."""
    with serving(tmp_path_factory.mktemp("hub"), settings.HOST_IP, settings.HUB_PORT, tls=True) as hub:
        reader = hub.token()
        with (HERE / "train.jsonl").open("rb") as lines:
            data = b"".join(islice(lines, EXAMPLES))
        hub.create("model", MODEL, directory_files(base_model()), gated=True, readers={reader})
        hub.create("dataset", DATA, {"train.jsonl": data, "README.md": b"tickets"}, private=True, readers={reader})
        create_secret(product, SECRET, {"token": reader, "caBundle": hub.ca})
        yield hub


def example(name: str, secret: str = SECRET) -> Manifest:
    """examples/hub.yaml under another name, perhaps with another Secret, and a training of three steps."""
    job = yaml.safe_load((REPOSITORY / "examples" / "hub.yaml").read_text())
    spec = job["spec"]
    job["metadata"]["name"] = name
    spec["training"], spec["hardware"] = TINY, {"accelerator": "cpu"}
    spec["storage"] = {"retain": "Keep"}  # and with it the pods, whose logs are read
    spec["output"]["uri"] = f"pvc://quickstart/models/{name}"
    for place in (spec["model"], *spec["dataset"]["train"]):
        place["credentialsSecretRef"] = {"name": secret}
    return job


def test_from_a_hub_at_one_commit_and_what_can_be_wrong_there(product: Product, hub: Hub) -> None:
    stranger = hub.token()
    create_secret(product, "stranger", {"token": stranger, "caBundle": hub.ca})
    create_secret(product, "mistyped", {"token": "hf_mistyped", "caBundle": hub.ca})
    jobs = {
        "from-a-hub": example("from-a-hub"),
        "hub-stranger": example("hub-stranger", "stranger"),
        "hub-mistyped": example("hub-mistyped", "mistyped"),
        "hub-revision": example("hub-revision"),
        "hub-typing-error": example("hub-typing-error"),
    }
    jobs["from-a-hub"]["spec"]["planOnly"] = True
    jobs["hub-revision"]["spec"]["model"]["revision"] = "v9"
    jobs["hub-typing-error"]["spec"]["dataset"]["train"][0]["uri"] = f"hf://{DATA}/trian.jsonl"
    for job in jobs.values():
        product.apply(job)

    refused = {
        "hub-stranger": (
            f"model {MODEL} is gated",
            "of the token in Secret stranger has not been let in",
            "accept its",
        ),
        "hub-mistyped": ("model.credentialsSecretRef", "does not accept the token of Secret mistyped (401)"),
        "hub-revision": (f"model.revision: model {MODEL} at {hub.endpoint} has no branch, tag or commit v9",),
        "hub-typing-error": (f"dataset.train[0].uri: there is no hf://{DATA}/trian.jsonl", "README.md, train.jsonl"),
    }
    for name, says in refused.items():
        failed = product.wait_for(name, "Failed", timeout=240)
        assert condition(failed, "Failed")["reason"] == "BadInput", failed["status"]
        assert all(part in failed["status"]["message"] for part in says), failed["status"]["message"]
        assert product.pods(name, "train") == []

    planned = product.wait_for("from-a-hub", "Planned", timeout=240)
    seen = planned["status"]["inspection"]
    model, data = hub.repositories["model", MODEL], hub.repositories["dataset", DATA]
    assert seen["modelRevision"] == model.names["main"]
    assert seen["dataRevisions"] == {"dataset.train[0]": data.names["main"]}
    model.commit({"config.json": b"{}"})  # the branches move while the plan is being looked at
    data.commit({"README.md": b"moved"})
    product.edit("from-a-hub", {"planOnly": False})
    done = product.wait_for("from-a-hub", "Succeeded", timeout=300)
    assert {a["outcome"] for a in done["status"]["attempts"]} == {"Succeeded"}
    assert done["status"]["inspection"] == seen

    told = product.cluster.kubectl(
        "get", "qlorajobs.qlora.dev,jobs,pods,configmaps,events", "--output=yaml", namespace=product.namespace
    )
    told += "".join(product.logs(name, stage) for name in jobs for stage in ("inspect", "train", "publish"))
    told += "".join(
        product.cluster.logs(p["metadata"]["name"], OPERATOR_NAMESPACE)
        for p in product.cluster.list("pod", OPERATOR_NAMESPACE)
    )
    for token in (*hub.tokens, "hf_mistyped"):
        assert token not in told
        assert base64.b64encode(token.encode()).decode() not in told
