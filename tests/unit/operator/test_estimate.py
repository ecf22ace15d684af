"""`kubectl qlora estimate`: its knobs, its sweeps and its chart."""

from __future__ import annotations

import json
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_operator.cli import main
from qlora_operator.commands.bar import WIDTH
from qlora_operator.commands.sweep import CARDS, parse, smallest_card
from qlora_operator.sizing.catalogue import shape_of_model
from qlora_operator.sizing.memory import training_memory
from tests.unit.operator import given

GIB = 1024**3
MODEL = "HuggingFaceTB/SmolLM2-135M"


def estimated(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["estimate", *arguments, "-o", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def total(capsys: pytest.CaptureFixture[str], *arguments: str) -> int:
    return estimated(capsys, MODEL, "--method", "qlora", *arguments)["methods"][0]["totalBytes"]


# --- one estimate ---


def test_people_get_a_bar_of_what_a_gpu_must_have_and_the_items(capsys: pytest.CaptureFixture[str]):
    assert main(["estimate", MODEL, "--method", "qlora", "--seq-len", "2k"]) == 0
    title, sentence, bar, *items = capsys.readouterr().out.splitlines()
    assert title == f"{MODEL}: qlora on one GPU"
    recipe = given.recipe(max_length=2048, loss="all")
    memory = training_memory(shape_of_model(MODEL), recipe, micro_batch_size=1)
    predicted, needed = memory.total_bytes / GIB, memory.total_bytes * 1.15 / GIB
    assert sentence == f"memory of one GPU: {predicted:.1f} GiB predicted, {needed:.1f} with 15 % headroom"
    assert len(bar) == WIDTH
    assert bar.endswith("░" * round(WIDTH * 0.15 / 1.15))
    names = [line[3:].split("  ")[0] for line in items]
    assert names == [*(item.name for item in sorted(memory.items, key=lambda item: -item.bytes)), "headroom"]


def test_what_is_sharded_takes_less_of_each_gpu_and_the_optimizer_follows(capsys: pytest.CaptureFixture[str]):
    alone, shared = (estimated(capsys, "llama-3.1-70b", "--method", "qlora", "--gpus", n) for n in ("1", "8"))
    base = [
        next(item["bytes"] for item in each["methods"][0]["items"] if item["name"] == "base weights")
        for each in (alone, shared)
    ]
    assert base[1] == pytest.approx(base[0] / 8, rel=0.01)
    assert shared["gpus"] == 8
    given_one = estimated(
        capsys, "llama-3.1-70b", "--method", "qlora", "--gpus", "8", "--optimizer", "adamw_torch_fused"
    )
    assert given_one == shared
    assert main(["estimate", MODEL, "--gpus", "8", "--optimizer", "adamw_8bit"]) == 2
    assert capsys.readouterr().err == "--optimizer adamw_8bit cannot step weights that --gpus 8 share\n"
    assert main(["estimate", MODEL, "--gpus", "8"]) == 0
    assert "memory of each of 8 GPUs: " in capsys.readouterr().out


def test_every_knob_turns_something(capsys: pytest.CaptureFixture[str]):
    plain = total(capsys)
    assert total(capsys, "--attention", "eager") > plain
    assert total(capsys, "--optimizer", "adamw_torch") > plain
    assert total(capsys, "--micro-batch", "4") > plain
    assert total(capsys, "--offload", "activations") < plain
    assert total(capsys, "--rank", "64") > plain
    assert total(capsys, "--seq-len", "8k") > total(capsys, "--seq-len", "4k") == plain


def test_several_models_at_once(capsys: pytest.CaptureFixture[str]):
    found = estimated(capsys, MODEL, "llama-3.1-8b")
    assert [each["model"] for each in found] == [MODEL, "llama-3.1-8b"]
    assert main(["estimate", MODEL, "llama-3.1-8b", "-o", "yaml"]) == 0
    assert list(yaml.safe_load_all(capsys.readouterr().out)) == found
    assert main(["estimate", MODEL, "llama-3.1-8b"]) == 0
    titles = [line for line in capsys.readouterr().out.splitlines() if line.endswith("on one GPU")]
    assert titles == [f"{model}: {how} on one GPU" for model in (MODEL, "llama-3.1-8b") for how in ("lora", "qlora")]


# --- sweeps ---


@pytest.mark.parametrize(
    ("sweep", "option", "values"),
    [
        ("seqLen=2k,4k", "--seq-len", [2048, 4096]),
        ("rank=8, 64", "--rank", [8, 64]),
        ("microBatch=1,2", "--micro-batch", [1, 2]),
    ],
)
def test_a_sweep_is_the_estimate_of_each_value(
    capsys: pytest.CaptureFixture[str], sweep: str, option: str, values: list[int]
):
    document = estimated(capsys, MODEL, "--sweep", sweep)
    assert document["values"] == values
    lora, qlora = document["curves"]
    assert (lora["method"], qlora["method"]) == ("lora", "qlora")
    assert qlora["totalBytes"] == [total(capsys, option, str(value)) for value in values]
    assert qlora["neededBytes"] == [each * 115 // 100 for each in qlora["totalBytes"]]


def test_people_get_a_table_with_the_smallest_card(capsys: pytest.CaptureFixture[str]):
    assert main(["estimate", "llama-3.1-8b", "--sweep", "seqLen=4k,128k", "--method", "qlora"]) == 0
    model, header, short, long, _, footer = capsys.readouterr().out.splitlines()
    found = [
        each["totalBytes"] / GIB
        for length in ("4k", "128k")
        for each in estimated(capsys, "llama-3.1-8b", "--method", "qlora", "--seq-len", length)["methods"]
    ]
    assert model == "llama-3.1-8b"
    assert header.split() == ["seqLen", "qlora", "GiB", "smallest", "card"]
    assert short.split() == ["4,096", f"{found[0]:.1f}", "L4"]
    assert long.split() == ["131,072", f"{found[1]:.1f}", "none"]
    assert footer.endswith(
        "the smallest of L4 (24 GB), L40S (48 GB), H100-80 (80 GB), H200 (141 GB) with 15 % headroom"
    )


@pytest.mark.parametrize(
    ("gib", "card"), [(1, "L4"), (22.4, "L4"), (24, "L40S"), (48, "H100-80"), (80, "H200"), (141, None)]
)
def test_a_card_has_less_than_it_is_sold_as(gib: float, card: str | None):
    assert smallest_card(int(gib * GIB)) == card
    assert list(CARDS.values()) == sorted(CARDS.values())


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ("maxLength=1k", "--sweep: 'maxLength' is none of seqLen, rank, microBatch; write for example seqLen=2k,4k,8k"),
        ("seqLen", "--sweep: '' is no whole number from 1, such as 4096 or 4k; write for example seqLen=2,4,8"),
        ("rank=8,,16", "--sweep: '' is no whole number from 1, such as 4096 or 4k; write for example rank=2,4,8"),
        ("rank=8,0", "--sweep: '0' is no whole number from 1, such as 4096 or 4k; write for example rank=2,4,8"),
        ("seqLen=4k,4096", "--sweep: 4k,4096 names a value twice"),
        ("seqLen=16k", "spec.dataset.maxLength: 16384 tokens, the model takes 8192"),
    ],
)
def test_a_sweep_that_is_not_understood_is_told_with_the_cure(
    capsys: pytest.CaptureFixture[str], sweep: str, said: str
):
    assert main(["estimate", MODEL, "--sweep", sweep]) == 2
    assert capsys.readouterr() == ("", f"{said}\n")


def test_k_stands_for_1024():
    assert parse("seqLen=2k,3K,100").values == (2048, 3072, 100)


# --- the chart ---


def described(picture: bytes) -> dict[str, Any]:
    """The figures that a chart was drawn from, which the PNG carries along."""
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    position = 8
    while position < len(picture):
        size, kind = struct.unpack(">I4s", picture[position : position + 8])
        content = picture[position + 8 : position + 8 + size]
        if kind == b"tEXt" and content.startswith(b"Description\0"):
            return json.loads(content.partition(b"\0")[2])
        if kind == b"zTXt" and content.startswith(b"Description\0"):
            return json.loads(zlib.decompress(content.partition(b"\0")[2][1:]))
        position += size + 12
    raise AssertionError("the picture does not say what it shows")


def test_a_chart_carries_its_figures(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    path = tmp_path / "sweep.png"
    document = estimated(capsys, MODEL, "llama-3.1-8b", "--sweep", "seqLen=2k,4k", "--plot", str(path))
    assert described(path.read_bytes()) == document
    assert len(document["curves"]) == 4


def test_a_chart_that_cannot_be_written_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    for name, said in (("none/x.png", "No such file or directory"), ("x.docx", "Format 'docx' is not supported")):
        assert main(["estimate", MODEL, "--sweep", "rank=8,16", "--plot", str(tmp_path / name)]) == 2
        found = capsys.readouterr()
        assert found.err.startswith(f"--plot {tmp_path / name}: ")
        assert said in found.err
        assert found.out == ""


def test_without_matplotlib_a_chart_is_refused_with_the_cure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["estimate", MODEL, "--sweep", "rank=8,16", "--plot", "x.png"]) == 2
    assert capsys.readouterr() == ("", "--plot needs matplotlib: pip install 'qlora-operator[plot]'\n")


def test_a_chart_needs_a_sweep(capsys: pytest.CaptureFixture[str]):
    assert main(["estimate", MODEL, "--plot", "x.png"]) == 2
    assert capsys.readouterr().err == (
        "--plot draws what --sweep goes through: give --sweep too, such as seqLen=2k,4k,8k\n"
    )
