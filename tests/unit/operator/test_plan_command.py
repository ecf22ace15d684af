"""`kubectl qlora plan`: what it prints, and the sentence for each thing that can be wrong with what it is given."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given as for_all
from hypothesis import strategies as st
from rich.console import Console

from qlora_api.v1alpha1 import MemoryItem, Plan
from qlora_operator.cli import main
from qlora_operator.commands.bar import FREE, HEADROOM, WIDTH, bar
from qlora_operator.commands.installation import installation_of
from qlora_operator.commands.nodes import AMD_NAMES, NAMES, NVIDIA_NAMES, nodes_described
from qlora_operator.commands.shown import duration
from qlora_operator.placement.flavours import Demands
from qlora_operator.placement.inventory import Inventory
from qlora_operator.placement.products import products
from tests.unit.operator import given
from tests.unit.operator.jobs_in_cluster import FILES, MODEL, planned
from tests.unit.operator.test_directory import MIXTURE, mixture_tensors, write_model
from tests.unit.operator.test_watch import Kubectl

NODES = str(FILES / "nodes.yaml")
CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
}


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kubectl:
    stand_in = Kubectl(tmp_path / "bin")
    monkeypatch.setenv("PATH", stand_in.environment()["PATH"])
    return stand_in


def manifest(edits: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A job whose model is in the catalogue and whose sequence length is known."""
    known = {"model.uri": "hf://meta-llama/Llama-3.1-8B", "dataset.maxLength": 4096}
    return given.document(known | dict(edits or {})) | changes


def written(tmp_path: Path, *documents: Any) -> str:
    """Path of a file with these documents, or this text."""
    path = tmp_path / "job.yaml"
    path.write_text("---\n".join(each if isinstance(each, str) else yaml.safe_dump(each) for each in documents))
    return str(path)


# --- for people ---


def test_it_says_where_by_which_recipe_with_what_memory_and_why_not_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["plan", "-f", written(tmp_path, manifest()), "--nodes", NODES]) == 0
    lines = capsys.readouterr().out.splitlines()
    made, _ = planned()
    assert lines[0] == "team-a/support-bot"
    assert lines[1] == "runs on     1 × NVIDIA-L40S in 1 node"
    assert lines[2].startswith(f"recipe      {made.recipe.method}")
    assert lines[3].startswith(f"batch       micro-batch {made.micro_batch_size} × 4,096 tokens, ")
    total, needed = made.memory.total_bytes / 2**30, made.memory.total_bytes * 1.15 / 2**30
    assert f"memory of the GPU: {total:.1f} GiB predicted, {needed:.1f} with 15 % headroom, of 45.0 there" == lines[7]
    bars, items = lines[8], lines[9 : 9 + len(made.memory.items)]
    assert len(bars) == WIDTH
    assert {item.split("  ")[1] for item in items} == {item.name for item in made.memory.items}
    rejected = lines[lines.index("not chosen") + 1 :]
    for each in made.rejected:
        assert f"  {each.flavour}: {each.reason}" in rejected
    assert "  NVIDIA-H100-80GB-HBM3: taint team=research:NoSchedule is not in spec.podTemplate.tolerations" in rejected


def test_a_job_that_fits_nowhere_has_reasons_and_an_exit_code_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["plan", "-f", written(tmp_path, manifest({"dataset.maxLength": 16384})), "--gpus", "T4"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith("no plan (NoFlavourFits): ")
    assert "Tesla-T4: " in said[1]
    assert "15.0 GiB" in said[1]


def test_a_model_that_is_shared_by_several_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "-f", written(tmp_path, manifest({"dataset.maxLength": 8192})), "--gpus", "T4:4x2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "runs on     2 × Tesla-T4 in 1 node"
    assert "adamw_torch_fused" in lines[2]
    assert lines[7].startswith("memory of each GPU: ")


def test_settings_that_contradict_the_model_are_told_in_the_planners_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = written(tmp_path, manifest({"lora.targetModules": ["w1"]}))
    assert main(["plan", "-f", path, "--gpus", "L40S"]) == 1
    said = "no plan (UnknownTargetModules): spec.lora.targetModules: the model has no linear layer w1; it has q_proj"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("edits", "arguments", "length", "said"),
    [
        ({}, [], 4096, []),
        ({"dataset.maxLength": None}, ["--seq-len", "2k"], 2048, []),
        (
            {"dataset.maxLength": None},
            [],
            4096,
            [
                "assumed: 4,096 tokens per sequence: the cluster takes what covers 99.5 % of the examples; "
                "give --seq-len, or set spec.dataset.maxLength"
            ],
        ),
        (
            {},
            ["--seq-len", "2048"],
            4096,
            ["assumed: 4,096 tokens per sequence: spec.dataset.maxLength goes before --seq-len"],
        ),
        (
            {"dataset.train": [{"uri": "s3://corp/tickets.jsonl"}]},
            [],
            4096,
            [
                "assumed: no bytes of data on the work volume: how many are downloaded to it is seen in the cluster",
            ],
        ),
    ],
)
def test_what_is_assumed_is_said(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    edits: dict[str, Any],
    arguments: list[str],
    length: int,
    said: list[str],
):
    path = written(tmp_path, manifest(edits | {"model.uri": "pvc://models/base"}))
    assert main(["plan", "-f", path, "--model", "llama-3.1-8b", "--gpus", "H200", "-o", "json", *arguments]) == 0
    found = capsys.readouterr()
    assert json.loads(found.out)["recipe"]["maxLength"] == length
    assert found.err.splitlines() == [f"team-a/support-bot: {each}" for each in said]


def test_a_short_models_own_length_is_assumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    path = written(tmp_path, manifest({"model.uri": "pvc://models/own", "dataset.maxLength": None}))
    assert main(["plan", "-f", path, "--config", str(tmp_path), "--gpus", "T4"]) == 0
    assert "assumed: 2,048 tokens per sequence" in capsys.readouterr().out


def test_an_address_that_this_version_cannot_reach_is_remarked_and_planned_past(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = written(tmp_path, manifest({"output.uri": "oci://registry/tuned"}))
    assert main(["plan", "-f", path, "--gpus", "H200"]) == 0
    assert (
        "the operator of this version will refuse it: spec.output.uri: oci://registry/tuned is not supported by this "
        "version; use pvc://claim/path or s3://bucket/path"
    ) in capsys.readouterr().out.splitlines()


# --- for machines ---


@pytest.mark.parametrize("output", ["json", "yaml"])
def test_machines_get_the_plan_as_the_status_has_it(capsys: pytest.CaptureFixture[str], output: str):
    assert main(["plan", "-f", str(FILES / "job.yaml"), "--model", MODEL, "--nodes", NODES, "-o", output]) == 0
    made, _ = planned()
    found = Plan.model_validate(yaml.safe_load(capsys.readouterr().out))
    assert found == made.model_copy(update={"steps": None, "estimated_seconds": None, "estimated_gpu_hours": None})


def test_several_jobs_are_planned_in_their_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    small = manifest({"model.uri": "hf://HuggingFaceTB/SmolLM2-135M", "dataset.maxLength": 1024})
    large = manifest({"model.uri": "hf://meta-llama/Llama-3.1-405B"})
    other = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "store"}}
    path = written(tmp_path, small, other, {"apiVersion": "v1", "kind": "List", "items": [large, small]})
    assert main(["plan", "-f", path, "--gpus", "L4", "-o", "json"]) == 1
    found = capsys.readouterr()
    assert [each.get("flavour", each.get("reason")) for each in json.loads(found.out)] == [
        "NVIDIA-L4",
        "NoFlavourFits",
        "NVIDIA-L4",
    ]
    assert found.err.splitlines()[0] == f"{path}, object 2: Secret is passed over"
    assert main(["plan", "-f", path, "--gpus", "L4", "-o", "yaml"]) == 1
    assert len(list(yaml.safe_load_all(capsys.readouterr().out))) == 3
    assert main(["plan", "-f", path, "--gpus", "L4"]) == 1
    assert capsys.readouterr().out.count("team-a/support-bot") == 3


def test_a_manifest_from_a_cluster_brings_its_inspection_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    inspection = given.inspection(max_length=512, sequences=640)
    status = {"inspection": inspection.model_dump(mode="json", by_alias=True, exclude_none=True), "phase": "New"}
    path = written(tmp_path, given.document() | {"status": status})
    assert main(["plan", "-f", path, "--gpus", "T4", "-o", "json"]) == 0
    found = capsys.readouterr()
    plan = json.loads(found.out)
    assert (plan["recipe"]["maxLength"], plan["steps"]) == (512, 60)
    assert found.err == ""


def test_another_shape_may_be_given_than_inspection_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    inspection = given.inspection().model_dump(mode="json", by_alias=True, exclude_none=True)
    path = written(tmp_path, manifest() | {"status": {"inspection": inspection}})
    assert main(["plan", "-f", path, "--model", "llama-3.1-8b", "--gpus", "H200", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["totalBytes"] > 8e9


def test_what_is_downloaded_has_its_room_on_the_work_volume(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sizes = []
    for uri in ("pvc://models/base", "s3://models/base"):
        path = written(tmp_path, manifest({"model.uri": uri}))
        assert main(["plan", "-f", path, "--model", "llama-3.1-8b", "--gpus", "H200", "-o", "json"]) == 0
        sizes.append(json.loads(capsys.readouterr().out)["diskBytes"])
    assert sizes[1] - sizes[0] == 2 * 8_030_261_248


def test_dates_in_annotations_stay_text(tmp_path: Path):
    text = yaml.safe_dump(manifest()).replace("metadata:\n", "metadata:\n  annotations: {reviewed: 2026-09-01}\n")
    assert "2026-09-01}" in text
    assert main(["plan", "-f", written(tmp_path, text), "--gpus", "H200"]) == 0


def test_what_the_sizing_says_of_its_figures_is_passed_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    said = "note: 4 bits do not reach the experts, 81 % of the weights: they stay in bfloat16"
    write_model(tmp_path, MIXTURE, mixture_tensors(fused=True, turned=True))
    path = written(tmp_path, manifest({"method": "qlora", "dataset.maxLength": 128}))
    assert main(["plan", "-f", path, "--model", str(tmp_path), "--gpus", "H200"]) == 0
    assert said in capsys.readouterr().out.splitlines()
    assert main(["estimate", str(tmp_path), "--seq-len", "128", "--method", "qlora"]) == 0
    assert said in capsys.readouterr().out.splitlines()


def test_how_many_steps_is_unknown_without_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "-f", written(tmp_path, manifest()), "--gpus", "H200", "-o", "json"]) == 0
    assert "steps" not in json.loads(capsys.readouterr().out)
    path = written(tmp_path, manifest({"training.maxSteps": 50}))
    assert main(["plan", "-f", path, "--gpus", "H200", "-o", "json"]) == 0
    timed = json.loads(capsys.readouterr().out)
    assert timed["steps"] == 50
    assert timed["estimatedSeconds"] > 0


def test_how_long_it_takes_follows_from_the_number_of_sequences(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["plan", "-f", written(tmp_path, manifest()), "--gpus", "H100-80"]
    assert main([*command, "-o", "json"]) == 0
    assert "estimatedSeconds" not in json.loads(capsys.readouterr().out)
    assert main([*command, "--sequences", "32k", "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 3 * 1024
    assert main([*command, "--sequences", "32k"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].endswith(", 3,072 steps")
    assert (
        lines[4]
        == f"time        about {duration(found['estimatedSeconds'])}, {found['estimatedGPUHours']:,.1f} GPU-hours"
    )


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0s"), (59, "59s"), (60, "1m"), (3599, "59m59s"), (3661, "1h1m"), (86400, "1d"), (90061, "1d1h")],
)
def test_a_time_is_told_in_its_two_largest_units(seconds: int, said: str):
    assert duration(seconds) == said


def test_stdin_is_a_file_too():
    ended = subprocess.run(
        [sys.executable, "-m", "qlora_operator.cli", "plan", "-f", "-", "--gpus", "H200", "-o", "json"],
        input=json.dumps(manifest()), capture_output=True, text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert (ended.returncode, json.loads(ended.stdout)["flavour"]) == (0, "NVIDIA-H200")


# --- the nodes ---


def test_every_product_that_can_be_named_is_known():
    assert set(NVIDIA_NAMES.values()) <= set(products())
    for name in NAMES:
        (flavour,) = (
            Inventory.of(nodes_described(f"{name}:2"))
            .offers(Demands(accelerator="amd" if name in AMD_NAMES else "nvidia"))
            .flavours
        )
        assert flavour.gpus_per_node == 2
    by_label = nodes_described("nvidia-rtx-pro-6000-blackwell-server-edition:4x2")
    assert Inventory.of(by_label).offers(Demands()).flavours[0].nodes == 2


def test_nodes_may_be_json_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "nodes.json"
    path.write_text(json.dumps(yaml.safe_load(Path(NODES).read_text()), indent=4))
    assert main(["plan", "-f", written(tmp_path, manifest()), "--nodes", str(path), "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["flavour"] == "NVIDIA-L40S"


def installed_with(tmp_path: Path, values: Any) -> str:
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_what_the_operator_was_installed_with_opens_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = written(tmp_path, manifest({"hardware.gpuProducts": ["NVIDIA-H100-80GB-HBM3"]}))
    assert main(["plan", "-f", path, "--nodes", NODES]) == 1
    for toleration, code in (
        ({"key": "team", "operator": "Exists"}, 0),
        ({"key": "team", "value": "research", "effect": "NoSchedule"}, 0),
        ({"key": "team", "value": "sales"}, 1),
    ):
        values = installed_with(tmp_path, {"tolerations": [toleration], "workers": 8})
        assert main(["plan", "-f", path, "--nodes", NODES, "--values", values]) == code
    assert "NVIDIA-H100-80GB-HBM3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("edits", "gpus", "values", "without"),
    [
        pytest.param(
            {"hardware.accelerator": "amd"}, "MI300X:8", {"trainer": {"amdImage": "r/t:v1"}}, "NoTrainerImage", id="amd"
        ),
        pytest.param(
            {"quantization.type": "hqq", "method": "qlora"},
            "L40S",
            {"trainer": {"backEnds": ["hqq"]}},
            "NotInTheImage",
            id="hqq",
        ),
        pytest.param({}, "A40,L40S", {"gpuPrices": {"NVIDIA-L40S": 1.0, "NVIDIA-A40": 2.0}}, "NVIDIA-A40", id="prices"),
    ],
)
def test_an_installation_decides_only_where_it_is_known(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    edits: dict[str, Any],
    gpus: str,
    values: dict[str, Any],
    without: str,
):
    command = ["plan", "-f", written(tmp_path, manifest(edits)), "--gpus", gpus]
    assert main(command) == 0
    assert main([*command, "--values", installed_with(tmp_path, values)]) == 0
    capsys.readouterr()
    main([*command, "--values", installed_with(tmp_path, {"workers": 8})])
    assert without in capsys.readouterr().out


def test_a_mirror_is_known_by_its_variable(tmp_path: Path):
    assert installation_of(installed_with(tmp_path, {"stageEnv": {"HF_ENDPOINT": "https://hub.example.com"}})).mirror
    assert not installation_of(installed_with(tmp_path, {"stageEnv": {"HF_HOME": "/cache"}})).mirror
    assert not installation_of(installed_with(tmp_path, None)).mirror, "helm writes null where no value was set"
    assert installation_of(None).mirror


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"tolerations": [{"key": "team", "operator": "Exist"}]},
            "{path}: tolerations[0].operator: must be one of 'Exists' or 'Equal' (found 'Exist')",
        ),
        (["tolerations"], "{path}: is no mapping of names to values"),
    ],
)
def test_values_that_the_chart_would_not_take_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], values: Any, said: str
):
    path = installed_with(tmp_path, values)
    assert main(["plan", "-f", written(tmp_path, manifest()), "--nodes", NODES, "--values", path]) == 2
    assert capsys.readouterr().err == said.replace("{path}", path) + "\n"


def test_described_nodes_are_those_that_the_job_selects(tmp_path: Path):
    path = written(tmp_path, manifest({"podTemplate.nodeSelector": {"pool": "training"}}))
    assert main(["plan", "-f", path, "--gpus", "L40S"]) == 0
    assert main(["plan", "-f", path, "--nodes", NODES]) == 1


@for_all(
    st.lists(
        st.tuples(st.sampled_from(sorted(NVIDIA_NAMES)), st.integers(1, 16), st.integers(1, 9)), min_size=1, max_size=4
    )
)
def test_nodes_in_words_are_as_many_as_the_words_say(parts: list[tuple[str, int, int]]):
    nodes = nodes_described(",".join(f"{name}:{gpus}x{count}" for name, gpus, count in parts))
    assert len({node["metadata"]["name"] for node in nodes}) == len(nodes)
    found = [
        (node["metadata"]["labels"]["nvidia.com/gpu.product"], node["status"]["allocatable"]["nvidia.com/gpu"])
        for node in nodes
    ]
    assert found == [(NVIDIA_NAMES[name], str(gpus)) for name, gpus, count in parts for _ in range(count)]


def test_without_nodes_the_cluster_is_asked(
    kubectl: Kubectl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kubectl.play(json.dumps(yaml.safe_load(Path(NODES).read_text())))
    path = written(tmp_path, manifest())
    assert main(["plan", "-f", path, "--context", "prod", "--kubeconfig", "/k/config", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["flavour"] == "NVIDIA-L40S"
    assert kubectl.runs == ["--context=prod --kubeconfig=/k/config get nodes --output=json"]


@pytest.mark.parametrize(
    "complaint",
    [
        "The connection to the server 127.0.0.1:6443 was refused - did you specify the right host or port?",
        'Error from server (Forbidden): nodes is forbidden: User "dev" cannot list resource "nodes"',
    ],
)
def test_a_cluster_that_does_not_answer_has_an_exit_code_of_its_own(
    kubectl: Kubectl, tmp_path: Path, capsys: pytest.CaptureFixture[str], complaint: str
) -> None:
    kubectl.play(complaint=f"E1123 08:20:03.786060 memcache.go:381] logged\n{complaint}\n", code=1)
    assert main(["plan", "-f", written(tmp_path, manifest())]) == 3
    assert capsys.readouterr().err == (
        f"{complaint}; to plan without a cluster give --nodes FILE or --gpus PRODUCT:GPUSxNODES\n"
    )


def test_no_kubectl(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["plan", "-f", written(tmp_path, manifest())]) == 3
    assert capsys.readouterr().err == (
        "kubectl is not on the PATH: install it, https://kubernetes.io/docs/tasks/tools; "
        "to plan without a cluster give --nodes FILE or --gpus PRODUCT:GPUSxNODES\n"
    )


# --- bad input ---

KNOWN = ", ".join(NAMES)
GIVE = "give its shape with --model: the path of its config.json, or the name of a model of the catalogue"
SYNTAX = "write PRODUCT:GPUS-PER-NODExNODES, such as H100-80:8x4 or L40S:4x2,H100-80:8x1"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", ["{path}: is empty"]),
        ("metadata:\n  name: a\n name: b\n", ["{path} line 3: is not YAML: did not find expected key"]),
        ("kind: QLoRAJob\nspec: {}\nspec: {}\n", ["{path} line 3: spec is there twice"]),
        ("- just\n- a list\n", ["{path}, object 1: is no Kubernetes object, which begins with apiVersion and kind"]),
        (
            given.document() | {"apiVersion": "v1", "kind": "Pod"},
            ["{path}: has no QLoRAJob, but Pod: give a manifest with apiVersion qlora.dev/v1alpha1, kind QLoRAJob"],
        ),
        (given.document() | {"kind": "QloraJob"}, ["{path}: kind: must be one of 'QLoRAJob' (found 'QloraJob')"]),
        (
            given.document() | {"apiVersion": "qlora.dev/v1"},
            ["{path}: apiVersion: must be one of 'qlora.dev/v1alpha1' (found 'qlora.dev/v1')"],
        ),
        ({"kind": "QLoRAJob"}, ["{path}: apiVersion: required, and not there"]),
        (
            given.document({"training.epohcs": 3, "lora.rank": 0}),
            [
                "{path}: spec.lora.rank: must be greater than or equal to 1 (found 0)",
                "{path}: spec.training.epohcs: no such field; check the spelling and the indentation",
            ],
        ),
        (
            given.document({"training.epochs": 3, "training.maxSteps": 5}),
            ["{path}: spec.training: epochs and maxSteps exclude each other: set one of them or none"],
        ),
        (
            given.document({"output.signingKeySecretRef": {"name": "key"}}),
            ["{path}: spec.output.signingKeySecretRef: not supported by this version; remove the field"],
        ),
        (
            given.document({"model.uri": "pvc://models/qwen2.5-7b"}),
            [
                "{path}: spec.model.uri: pvc://models/qwen2.5-7b cannot be looked into from here; "
                f"{GIVE} (near: Qwen/Qwen2.5-7B-Instruct)"
            ],
        ),
        (
            given.document({"model.uri": "hf://nobody/zzz"}),
            [f"{{path}}: spec.model.uri: hf://nobody/zzz is not in the catalogue; {GIVE}"],
        ),
    ],
)
def test_a_bad_manifest_is_told_field_by_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, said: list[str]
):
    path = written(tmp_path, content)
    assert main(["plan", "-f", path, "--gpus", "H200"]) == 2
    assert capsys.readouterr().err.splitlines() == [sentence.replace("{path}", path) for sentence in said]


def test_the_bad_fields_of_every_job_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = written(tmp_path, given.document({"lora.rank": 0}), given.document(), given.document({"lora.alpha": 0}))
    assert main(["plan", "-f", path, "--gpus", "H200"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"{path}, object 1: spec.lora.rank: must be greater than or equal to 1 (found 0)",
        f"{path}, object 3: spec.lora.alpha: must be greater than or equal to 1 (found 0)",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "H100-80;8"], f"--gpus: H100-80;8 is no product known here (near: H100-80); known are {KNOWN}"),
        (["--gpus", "L4:0x2"], f"--gpus: 'L4:0x2' is not understood: {SYNTAX}"),
        (["--gpus", "L4:2*2"], f"--gpus: 'L4:2*2' is not understood: {SYNTAX}"),
        (["--gpus", "L4,,T4"], f"--gpus: '' is not understood: {SYNTAX}"),
        (["--gpus", "H100:8"], f"--gpus: H100 is no product known here (near: H100-80, H100-NVL); known are {KNOWN}"),
        (["--nodes", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
        (
            ["--nodes", str(FILES / "job.yaml")],
            f"{FILES}/job.yaml: has no Node, but QLoRAJob: write it with kubectl get nodes -o yaml > {FILES}/job.yaml",
        ),
        (
            ["--gpus", "L4", "--model", "lama-3.1-8b"],
            "--model: lama-3.1-8b is not in the catalogue (near: meta-llama/Llama-3.1-8B): "
            "give the path of its config.json",
        ),
        (["--gpus", "L4", "--model", "no/config.json"], "--model: no/config.json: "),
    ],
)
def test_bad_arguments_are_told_with_the_cure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
):
    assert main(["plan", "-f", written(tmp_path, manifest()), *arguments]) == 2
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "L4", "--nodes", NODES], "argument --nodes: not allowed with argument --gpus"),
        (["--seq-len", "4q"], "argument --seq-len: '4q' is no whole number from 1, such as 4096 or 4k"),
    ],
)
def test_options_that_are_not_understood_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "-f", written(tmp_path, manifest()), *arguments])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"kubectl qlora plan: error: {said}"


def test_a_job_for_the_cpu_needs_real_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = written(tmp_path, manifest({"hardware.accelerator": "cpu", "model.uri": "hf://HuggingFaceTB/SmolLM2-135M"}))
    assert main(["plan", "-f", path, "--gpus", "L4"]) == 2
    assert capsys.readouterr().err == (
        "--gpus describes GPUs, and team-a/support-bot has spec.hardware.accelerator: cpu; give --nodes\n"
    )
    assert main(["plan", "-f", path, "--nodes", NODES]) == 1
    values = installed_with(tmp_path, {"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}]})
    assert main(["plan", "-f", path, "--nodes", NODES, "--values", values]) == 0
    assert "runs on     the CPU of 1 node" in capsys.readouterr().out


# --- the bar ---

ITEMS = st.lists(st.integers(1, 2**40), min_size=1, max_size=16)


@for_all(ITEMS, st.integers(0, 2**40), st.integers(0, 2**40))
def test_the_bar_is_as_wide_as_the_memory_that_is_there(sizes: list[int], headroom: int, free: int):
    items = [MemoryItem(name=f"item {size}", bytes=size) for size in sizes]
    whole = sum(sizes) + headroom + free
    text = bar(items, whole_bytes=whole, headroom_bytes=headroom).plain
    assert len(text) == WIDTH
    assert abs(text.count(FREE) / WIDTH - free / whole) <= 1 / WIDTH
    assert abs(text.count(HEADROOM) / WIDTH - headroom / whole) <= 1 / WIDTH
    letters = text.rstrip(FREE).rstrip(HEADROOM)
    assert sorted(letters) == list(letters), "the largest first, each in one stretch"


def test_what_does_not_fit_is_cut_off():
    items = [MemoryItem(name="base weights", bytes=100)]
    assert bar(items, whole_bytes=50, headroom_bytes=15).plain == "A" * WIDTH


def test_on_a_terminal_each_use_has_a_colour():
    items = [MemoryItem(name="base weights", bytes=100), MemoryItem(name="logits", bytes=50)]
    console = Console(file=StringIO(), force_terminal=True, color_system="truecolor", width=120)
    console.print(bar(items, whole_bytes=150))
    assert isinstance(console.file, StringIO)
    assert console.file.getvalue().count("\x1b[30;48;2;") == 2
