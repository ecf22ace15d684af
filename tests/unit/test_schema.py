"""The contract without a server: generated files, descriptions, bounds, what is refused, what is not built yet."""

import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from qlora_api import reference, schema
from qlora_api.exchange import claim_of
from qlora_api.schema import Schema, UnstructuralError, crd, crd_yaml, structural, write_or_check
from qlora_api.support import LIMITS, NOT_YET, SUPPORTED, limit_on, unsupported
from qlora_api.v1alpha1 import (
    URI_PATTERN,
    Condition,
    JobSpec,
    JobStatus,
    QLoRAJob,
    camel,
    duration_seconds,
    problems,
    quantity_bytes,
)
from tests.bad_specs import A_SOURCE, BAD, SMALLEST, Bad, edited


def leaves(node: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """Every field below an object that holds a value, lists of values included."""
    for name, child in node["properties"].items():
        inner = child.get("items", child)
        here = f"{path}.{name}".lstrip(".") + ("[]" if "items" in child else "")
        if "properties" in inner:
            yield from leaves(inner, here)
        else:
            yield here, child


EXAMPLES = Path(__file__).parents[2] / "examples"
SPEC = structural(JobSpec)
LEAVES = dict(leaves(SPEC))


# --- the generated files ---


@pytest.mark.parametrize(
    ("file", "text"),
    [(schema.CRD_FILE, crd_yaml()), (reference.REFERENCE_FILE, reference.reference())],
    ids=["qlora_api.schema", "qlora_api.reference"],
)
def test_generated_file_is_what_the_models_say(file: Path, text: str, request: pytest.FixtureRequest):
    assert file.read_text(encoding="utf-8") == text, f"run `python -m {request.node.callspec.id}` in crds/"


def test_yaml_keeps_every_value():
    assert yaml.safe_load(crd_yaml()) == crd()


def test_check_fails_on_another_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    file = tmp_path / "made.yaml"
    file.write_text("old\n")
    monkeypatch.setattr(sys, "argv", ["made", "--check"])
    assert write_or_check(file, "new\n", command="make it") == 1
    assert "run `make it`" in capsys.readouterr().err
    assert file.read_text() == "old\n"
    monkeypatch.setattr(sys, "argv", ["made"])
    assert write_or_check(file, "new\n", command="make it") == 0
    monkeypatch.setattr(sys, "argv", ["made", "--check"])
    assert write_or_check(file, "new\n", command="make it") == 0


class Recursive(BaseModel):
    child: "Recursive | None" = None


class TwoTypes(BaseModel):
    value: int | str


class Untyped(BaseModel):
    value: Any


class OddFormat(BaseModel):
    value: timedelta


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Recursive, ".child: Recursive is recursive"),
        (TwoTypes, ".value: anyOf"),
        (Untyped, ".value: no type"),
        (OddFormat, ".value: format duration"),
    ],
)
def test_what_no_structural_schema_can_say_is_refused_by_path(model: type[BaseModel], message: str):
    with pytest.raises(UnstructuralError, match=message.replace(".", r"\.")):
        structural(model)


# --- what users read ---


def fields(node: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    for name, child in node.get("properties", {}).items():
        yield f"{path}.{name}", child
        yield from fields(child.get("items", child), f"{path}.{name}")


def test_every_field_of_the_spec_is_described():
    undescribed = [path for path, node in fields(SPEC, "spec") if not node.get("description", "").endswith(".")]
    assert undescribed == []


def is_bounded(node: Schema) -> bool:
    match node["type"]:
        case "boolean":
            return True
        case "string":
            return "enum" in node or "maxLength" in node
        case "integer" | "number":
            return "minimum" in node and "maximum" in node
        case "array":
            return "maxItems" in node and is_bounded(node["items"])
        case "object":
            return "properties" in node or ("maxProperties" in node and is_bounded(node["additionalProperties"]))
    return False


def test_every_field_of_the_spec_is_bounded():
    assert [path for path, node in fields(SPEC, "spec") if not is_bounded(node)] == []


DECIDED = [
    "method", "dataset.maxLength", "dataset.loss", "dataset.train[].format", "quantization.computeDtype", "lora.alpha",
    "training.microBatchSize", "training.optimizer", "training.attention", "hardware.gpus", "hardware.nodes",
]  # fmt: skip
ONE_OF = [
    "dataset.eval.uri", "dataset.evalFraction", "storage.claimName", "storage.className", "training.epochs",
    "training.maxSteps", "evaluation.gates[].min", "evaluation.gates[].max", "evaluation.gates[].maxDropFromBase",
]  # fmt: skip


@pytest.mark.parametrize("path", DECIDED + ONE_OF)
def test_absent_stays_absent(path: str):
    assert "default" not in LEAVES[path.removesuffix("[]")]


def test_kstatus_does_not_take_a_new_job_for_a_finished_one():
    status = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
    assert status["default"] == {"observedGeneration": -1}
    assert JobStatus().observed_generation == -1


def test_no_column_reads_the_last_condition():
    columns = crd()["spec"]["versions"][0]["additionalPrinterColumns"]
    shown = [column["name"] for column in columns if not column.get("priority")]
    assert shown == ["Phase", "Progress%", "GPUs", "Loss", "Remaining", "Age"]
    wide = [column["name"] for column in columns if column.get("priority") == 1]
    assert wide == ["Model", "Method", "Artifact", "Step", "Steps", "EvalLoss", "Tokens/s"]
    assert not any("conditions[" in column["jsonPath"] for column in columns)


# --- what the command line takes ---


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_command_line_refuses(bad: Bad):
    with pytest.raises(ValidationError) as caught:
        QLoRAJob.read(edited(bad.edits))
    (said,) = problems(caught.value)
    assert said.startswith(f"{bad.where}: ")
    assert bad.said_by_command_line() in said


def test_each_mistake_is_named():
    job = edited({"spec.lora.rank": 0, "spec.output.formats": ["onnx"], "spec.hardware.gpus": 9, "metadata.name": "A"})
    with pytest.raises(ValidationError) as caught:
        QLoRAJob.read(job)
    places = [said.split(":")[0] for said in problems(caught.value)]
    assert places == ["metadata.name", "spec.lora.rank", "spec.hardware", "spec.output.formats[0]"]


def test_numbers_are_read_as_the_server_reads_them():
    text = yaml.safe_dump(SMALLEST) + "  training: {learningRate: 2e-4, minLearningRate: 1E-5, warmupFraction: 0}\n"
    training = QLoRAJob.read(yaml.safe_load(text)).spec.training
    assert (training.learning_rate, training.min_learning_rate, training.warmup_fraction) == (2e-4, 1e-5, 0)


def test_null_is_absent():
    job = QLoRAJob.read(edited({"spec.lora.rank": None, "spec.method": None, "spec.training": None}))
    assert job.spec == QLoRAJob.read(SMALLEST).spec


@pytest.mark.parametrize(
    ("duration", "seconds"), [("15m", 900), ("1h30m", 5400), ("7d", 604800), ("1d2h3m4s", 93784), ("90s", 90)]
)
def test_duration_in_seconds(duration: str, seconds: int):
    assert duration_seconds(duration) == seconds


@pytest.mark.parametrize(
    ("quantity", "size"), [("200Gi", 200 * 2**30), ("1.5Gi", 3 * 2**29), ("10G", 10**10), ("512", 512), ("2k", 2000)]
)
def test_quantity_in_bytes(quantity: str, size: int):
    assert quantity_bytes(quantity) == size


@pytest.mark.parametrize(
    ("name", "in_yaml"), [("max_gpus", "maxGPUs"), ("max_gpu_hours", "maxGPUHours"), ("gpus_per_node", "gpusPerNode")]
)
def test_field_names(name: str, in_yaml: str):
    assert camel(name) == in_yaml


@given(st.from_regex(URI_PATTERN.replace(r"[^/\s]*", r"[^/\s]{0,5}"), fullmatch=True))
def test_no_address_climbs_out_of_its_claim(uri: str):
    assert ".." not in PurePosixPath(uri).parts
    if uri.startswith("pvc://"):
        claim, path = claim_of(uri)
        assert claim and path


def test_a_moment_is_written_as_kubernetes_writes_it():
    moment = datetime(2026, 11, 23, 6, 0, 1, 999, tzinfo=timezone(timedelta(hours=2)))
    condition = Condition(type="Ready", status="True", last_transition_time=moment, reason="Done", message="Done.")
    assert condition.to_api()["lastTransitionTime"] == "2026-11-23T04:00:01Z"
    assert condition.last_transition_time == datetime(2026, 11, 23, 4, 0, 1, tzinfo=UTC)
    assert Condition.model_validate(condition.to_api()) == condition


# --- what is not built yet ---


def test_every_field_is_said_to_be_built_or_not():
    for path in LEAVES:
        limit_on(path)  # raises where nothing is said


def test_no_entry_speaks_of_a_field_that_is_gone():
    known = {prefix for path in LEAVES for prefix in _prefixes(path)}
    assert sorted((LIMITS.keys() | SUPPORTED) - known) == []
    assert LIMITS.keys() & SUPPORTED == set()


def _prefixes(path: str) -> set[str]:
    steps = path.split(".")
    return {end for depth in range(1, len(steps) + 1) for end in _with_and_without_items(".".join(steps[:depth]))}


def _with_and_without_items(path: str) -> set[str]:
    return {path, path.removesuffix("[]")}


def asked(edits: dict[str, Any]) -> list[str]:
    return unsupported(QLoRAJob.read(edited(edits)).spec)


SECRET = {"name": "store"}
REFUSED = [
    (
        "spec.model.uri",
        "oci://registry/model",
        "oci://registry/model is not supported by this version; use pvc://claim/path or s3://bucket/path or hf://owner",
    ),
    ("spec.model.trustRemoteCode", True, "not supported by this version; remove the field"),
    ("spec.dataset.train[0].uri", "oci://b/t.jsonl", "use pvc://claim/path or s3://bucket/path or hf://owner/name"),
    ("spec.dataset.eval.uri", "oci://b/e.jsonl", "use pvc://claim/path or s3://bucket/path"),
    ("spec.evaluation.golden.uri", "oci://registry/golden", "use pvc://claim/path"),
    ("spec.evaluation.canary.uri", "oci://registry/canary", "use pvc://claim/path"),
    ("spec.output.uri", "oci://b/out", "use pvc://claim/path or s3://bucket/path"),
    ("spec.output.formats[0]", "fp8", "fp8 is not supported by this version; use adapter or merged"),
    ("spec.output.signingKeySecretRef", SECRET, "remove the field"),
    ("spec.offline", True, "remove the field"),
]
#: What has to stand beside a field for the job to be valid.
BESIDE = {"spec.dataset.eval": A_SOURCE, "spec.evaluation.golden": A_SOURCE, "spec.evaluation.canary": A_SOURCE}


@pytest.mark.parametrize(("path", "value", "advice"), REFUSED, ids=[path for path, *_ in REFUSED])
def test_what_is_not_built_is_refused_by_name(path: str, value: Any, advice: str):
    beside = {place: dict(source) for place, source in BESIDE.items() if path.startswith(f"{place}.")}
    by_index = path.replace("train[0]", "train.0")
    edits = {by_index.removesuffix("[0]"): [value]} if by_index.endswith("[0]") else {by_index: value}
    (sentence,) = asked(beside | edits)
    assert sentence.startswith(f"{path}: ")
    assert advice in sentence


def test_every_limit_has_a_case():
    assert {path.removeprefix("spec.").replace("[0]", "[]") for path, *_ in REFUSED} == LIMITS.keys()


def test_what_is_built_is_taken():
    assert asked({}) == []
    everything = {
        "spec.model": {"uri": "s3://models/base", "credentialsSecretRef": SECRET},
        "spec.dataset.train": [
            {"uri": "pvc://d/a", "format": "messages"},
            {"uri": "s3://d/b", "credentialsSecretRef": SECRET},
            {"uri": "hf://team/chats/train.jsonl", "revision": "v1", "credentialsSecretRef": SECRET},
        ],
        "spec.evaluation": {
            "golden": {"uri": "s3://d/golden.jsonl", "credentialsSecretRef": SECRET},
            "canary": {"uri": "s3://d/canary.jsonl", "credentialsSecretRef": SECRET},
            "metrics": ["exactMatch", "tokenF1", "rougeL", "jsonSchema", "perplexity"],
            "answerSchema": "{}",
            "gates": [{"metric": "canary.exactMatch", "maxDropFromBase": 0.02}, {"metric": "judge", "min": 3}],
            "judge": {"endpoint": "http://judge/v1", "model": "m", "credentialsSecretRef": SECRET},
        },
        "spec.training.bestMetric": "rougeL",
        "spec.training.earlyStoppingEpochs": 1,
        "spec.output.uri": "s3://results/tuned",
        "spec.output.credentialsSecretRef": SECRET,
        "spec.dataset.evalFraction": 0.1,
        "spec.quantization.computeDtype": "float32",
        "spec.training.attention": "eager",
        "spec.hardware": {"accelerator": "cpu", "nodes": 1},
        "spec.storage": {"size": "10Gi"},
        "spec.output.formats": ["merged", "adapter"],
        "spec.podTemplate.tolerations": [{"operator": "Exists"}],
    }
    assert asked(everything) == []


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_the_examples_are_jobs_that_this_version_runs(path: Path):
    assert unsupported(QLoRAJob.read(yaml.safe_load(path.read_text())).spec) == []


def test_a_default_written_out_is_no_wish():
    defaults = {path: node["default"] for path, node in LEAVES.items() if "default" in node and "[]" not in path}
    assert {path for path in defaults if limit_on(path) is NOT_YET} >= {"offline"}
    assert asked({f"spec.{path}": value for path, value in defaults.items() if path.split(".")[0] != "budget"}) == []
