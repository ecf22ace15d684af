"""Several processes that train one adapter, as torchrun starts them in a pod: real FSDP2 over gloo, on real NF4."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_api.exchange import DataSource, EvaluationOrder, ExitCode, GateOrder, TrainOrder, TrainResult, parse_report
from qlora_operator.sizing.config import shape_of_config
from qlora_operator.sizing.training import adapted_by_default, attention_by_default
from qlora_trainer import learning
from qlora_trainer.adapter import with_adapter
from qlora_trainer.evaluation import summed_loss
from qlora_trainer.examination import Examiner, answers_to
from qlora_trainer.failures import GateFailed
from qlora_trainer.formats import Example
from qlora_trainer.launch import cause
from qlora_trainer.model import BaseModel, empty_model, open_base, shape_of
from qlora_trainer.prepared import open_prepared, prepare
from qlora_trainer.quantization import load_for_training
from qlora_trainer.ranks import ALONE, Ranks, mesh_of, whole
from qlora_trainer.sharding import load_sharded, shares_of
from qlora_trainer.starts import start
from qlora_trainer.training import train
from qlora_trainer.weights import read_weights
from qlora_trainer.words import Word

from ..families import CONFIGS
from .conftest import THINGS, Place, chat, recipe_of, write_jsonl
from .side_by_side import needs_forks, side_by_side
from .test_families import MIXTURES, replace_model
from .test_training import losses

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]
#: What several ranks can step, in batches that both two and three can share.
SHARED: dict[str, Any] = {"optimizer": "adamw_torch_fused", "effective_batch_size": 6, "gradient_checkpointing": True}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def started(place: Place, order: TrainOrder) -> subprocess.Popen[str]:
    """The pod's program on `order`, with the environment that the manifests give it."""
    (place.root / "order.json").write_text(order.to_json())
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("crds", "trainer")),
        "OMP_NUM_THREADS": "1",
        "QLORA_ORDER": str(place.root / "order.json"),
        "QLORA_REPORT": str(place.root / "report"),
        "QLORA_CLAIMS": str(place.claims),
        "QLORA_METRICS_HOST": "127.0.0.1",
        "QLORA_METRICS_PORT": str(free_port()),
        "PET_NNODES": "1",
        "PET_NPROC_PER_NODE": str(order.ranks_per_node),
        "PET_MASTER_PORT": str(free_port()),
        "PET_SHUTDOWN_TIMEOUT": "60",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "qlora_trainer"],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def ended(place: Place, program: subprocess.Popen[str], read: str = "") -> tuple[int, str, Any]:
    """Exit code, output and report."""
    output = read + program.communicate(timeout=600)[0]
    return program.returncode, output, parse_report((place.root / "report").read_text())


def up_to(program: subprocess.Popen[str], said: str) -> str:
    """What `program` says until a line with `said`."""
    assert program.stdout
    lines: list[str] = []
    for line in program.stdout:
        lines.append(line)
        if said in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


def on(ranks: int, order: TrainOrder, *, sharded: bool = True) -> TrainOrder:
    return order.model_copy(update={"ranks_per_node": ranks, "sharded": sharded})


def undisturbed(place: Place, order: TrainOrder) -> list[float]:
    """The losses of one process; the work directory is as before."""
    train(order, place.pod)
    found = losses(place)
    shutil.rmtree(place.work)
    return found


STARTS: list[dict[str, Any]] = [{"dora": True}, {"init": "loftq"}, {"dora": True, "init": "loftq"}]


@pytest.mark.parametrize(
    ("name", "changes"),
    [("mixtral", STARTS[2]), *(pytest.param(None, more, marks=pytest.mark.soak) for more in ({}, *STARTS))],
)
def test_two_ranks_share_a_model_and_one_goes_on_alone(place: Place, name: str | None, changes: dict[str, Any]) -> None:
    """SIGTERM stops both at the same step with a checkpoint, from which another number of ranks continues the run."""
    if name:
        replace_model(place, CONFIGS[name])
        changes = changes | {"target_modules": adapted_by_default(shape_of_config(CONFIGS[name]))}
    order = place.train_order(place.data(eval_fraction=0.1), SHARED | {"max_steps": 24} | changes)
    expected = undisturbed(place, order)

    program = started(place, on(2, order))
    said = up_to(program, "step 1/24")
    program.send_signal(signal.SIGTERM)
    code, output, report = ended(place, program, said)
    assert code == ExitCode.INTERRUPTED, output
    reached = len(losses(place))
    assert report.failure == f"told to stop at step {reached} of 24; the next attempt goes on there"
    found = re.search(r"this rank holds ([\d.]+) of ([\d.]+) MiB", output)
    assert found
    assert float(found[1]) == pytest.approx(float(found[2]) / 2, rel=0.05)

    result = train(order.model_copy(update={"attempt": 2}), place.pod)
    assert result.resumed_from_step == reached
    assert 0 < reached < 24
    assert losses(place) == pytest.approx(expected, rel=1e-4)


@pytest.mark.soak
@pytest.mark.parametrize(("ranks", "sharded"), [(2, False), (3, True), (4, True)])
def test_any_number_of_ranks_learns_the_same(place: Place, ranks: int, sharded: bool) -> None:
    """Batches are not even: six sequences on four ranks leave one of them without any."""
    changes = SHARED | {"max_steps": 10} | ({} if sharded else {"optimizer": "paged_adamw_8bit"})
    order = place.train_order(place.data(eval_fraction=0.1), changes, micro_batch_size=1)
    expected = undisturbed(place, order)
    code, output, report = ended(place, started(place, on(ranks, order, sharded=sharded)))
    assert code == 0, output
    assert losses(place) == pytest.approx(expected, rel=1e-4)
    shutil.rmtree(place.work)  # its checkpoints are of another training
    alone = train(order.model_copy(update={"recipe": order.recipe.model_copy(update={"seed": 8})}), place.pod)
    assert report.result["evalLoss"] != alone.eval_loss, "the comparison would see another training"


@pytest.mark.soak
@pytest.mark.parametrize(("name", "ranks"), [*((name, 2) for name in MIXTURES), ("mixtral", 3)])
@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_ranks_share_a_mixture(place: Place, name: str, ranks: int, method: str) -> None:
    """Experts and all: the losses of one process, and an adapter that is worth to one process what it was to all."""
    targets = adapted_by_default(shape_of_config(CONFIGS[name]))
    replace_model(place, CONFIGS[name])
    changes = SHARED | {"max_steps": 10, "method": method, "target_modules": targets}
    order = place.train_order(place.data(eval_fraction=0.1), changes, micro_batch_size=1)
    expected = undisturbed(place, order)
    code, output, report = ended(place, started(place, on(ranks, order)))
    assert code == 0, output
    assert losses(place) == pytest.approx(expected, rel=1e-4)
    found = re.search(r"this rank holds ([\d.]+) of ([\d.]+) MiB", output)
    assert found
    base = open_base(place.claims / "base" / "model", "x")
    share = 1 / ranks
    if method == "lora":  # FSDP2 deals out whole rows, and of experts whole experts: the first rank has the larger part
        weights = list(empty_model(base.config).parameters())
        first = sum(-(-len(weight) // ranks) * weight[0].numel() for weight in weights)
        share = first / sum(weight.numel() for weight in weights)
    assert float(found[1]) / float(found[2]) == pytest.approx(share, rel=0.1)  # weights of few rows leave a rank none

    model = PeftModel.from_pretrained(load_for_training(base, order.recipe, CPU), str(place.work / "adapter"))
    rows = open_prepared(prepare(order, place.pod, base)).eval
    examiner = Examiner(model, base.tokenizer, 1, CPU, False, lambda: None, ALONE)
    assert examiner.loss(list(rows)) == pytest.approx(report.result["evalLoss"], rel=1e-5)


@pytest.mark.soak
@pytest.mark.parametrize("sharded", [True, False])
def test_ranks_select_and_pass_judgement_as_one_does(place: Place, sharded: bool) -> None:
    """Held-out answers that contradict what is learned: all ranks stop at one step, and leave the same adapter."""
    wrong = [chat(f"What is a {thing}?", "a thing that nobody knows") for thing in THINGS]
    write_jsonl(place.claims / "data" / "eval.jsonl", wrong)
    recipe = {"max_steps": None, "epochs": 12.0, "best_metric": "evalLoss", "early_stopping_epochs": 1}
    gates = [GateOrder(metric="exactMatch", min=1.0), GateOrder(metric="evalLoss", max_drop_from_base=100)]
    order = place.train_order(
        place.data(eval=DataSource(uri="pvc://data/eval.jsonl")), SHARED | recipe,
        evaluation=EvaluationOrder(metrics=["exactMatch", "perplexity"], gates=gates), micro_batch_size=1,
    )  # fmt: skip
    with pytest.raises(GateFailed) as alone:
        train(order, place.pod)
    shutil.rmtree(place.work)
    expected = alone.value.result
    assert expected.stopped_early

    code, output, report = ended(place, started(place, on(2, order, sharded=sharded)))
    assert code == ExitCode.GATE_FAILED, output
    found = TrainResult.model_validate(report.result)
    assert (found.steps, found.selected_step) == (expected.steps, expected.selected_step)
    assert [score.metric for score in found.scores] == ["exactMatch", "perplexity", "evalLoss"]
    for one, other in zip(found.scores, expected.scores, strict=True):
        assert (one.base, one.tuned) == pytest.approx((other.base, other.tuned), rel=1e-3)
    assert (place.work / "report" / "evaluation.html").is_file()


@pytest.mark.soak
def test_ranks_go_on_where_one_was(place: Place) -> None:
    order = place.train_order(place.data(eval_fraction=0.1), SHARED | {"max_steps": 12})
    expected = undisturbed(place, order)
    first = order.model_copy(update={"checkpoint_every_seconds": 1})
    program = started(place, first)
    said = up_to(program, "checkpoint at step")
    program.send_signal(signal.SIGTERM)
    code, output, _ = ended(place, program, said)
    assert code == ExitCode.INTERRUPTED, output
    code, output, report = ended(place, started(place, on(2, order)))
    assert code == 0, output
    assert report.result["resumedFromStep"] > 0
    assert losses(place) == pytest.approx(expected, rel=1e-4)


@pytest.mark.soak
def test_a_rank_that_is_killed_ends_all_and_is_named(place: Place) -> None:
    order = place.train_order(None, SHARED | {"max_steps": 400}, checkpoint_every_seconds=1)
    program = started(place, on(2, order))
    said = up_to(program, "checkpoint at step")
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    ranks = [int(pid) for pid in children if b"qlora_trainer" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(ranks[1], signal.SIGKILL)
    code, output, report = ended(place, program, said)
    assert code == 137, output
    assert report.failure.startswith("rank 1 was killed by SIGKILL")
    assert list(place.work.glob("checkpoints/*/step-*"))


@needs_forks
@pytest.mark.parametrize("failing", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_what_replicas_have_learned_outlives_a_rank_without_memory(
    place: Place, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """It saves alone, for its neighbour is in the midst of the step; half the micro-batch then learns the same."""
    order = place.train_order(place.data(golden=None), SHARED | {"max_steps": 4})
    expected = undisturbed(place, order)
    together = on(2, order, sharded=False)
    calls = itertools.count()

    def with_a_limit(rank: int) -> None:
        def limited(*arguments: Any) -> torch.Tensor:
            if rank == failing and next(calls) == 4:  # in the third step: the second, an epoch's last, is short
                torch.empty(1 << 50)
            return summed_loss(*arguments)

        monkeypatch.setattr(learning, "summed_loss", limited)
        train(together, place.pod)

    codes = side_by_side(2, with_a_limit)
    assert codes[failing] == ExitCode.OUT_OF_MEMORY
    assert codes[1 - failing] == 1
    (saved,) = place.work.glob("checkpoints/*/step-*")
    assert saved.name == "step-00000002"
    assert losses(place) == pytest.approx(expected[:2], rel=1e-4)

    halved = together.model_copy(update={"micro_batch_size": 1, "gradient_accumulation": 4, "attempt": 2})
    assert side_by_side(2, lambda _: train(halved, place.pod)) == [0, 0]
    assert not list(place.work.glob("checkpoints/*/.step-*")), "what the rescue has left over is gone"
    assert json.loads((place.work / "results" / "train.json").read_text())["result"]["resumedFromStep"] == 2
    assert losses(place) == pytest.approx(expected, rel=1e-4)


@needs_forks
@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_what_a_lost_neighbour_leaves_of_a_training(
    place: Place, monkeypatch: pytest.MonkeyPatch, *, sharded: bool
) -> None:
    """A replica saves the last finished step; of a model that is shared, a part alone is no checkpoint."""
    order = on(2, place.train_order(place.data(golden=None), SHARED | {"max_steps": 4}), sharded=sharded)
    calls = itertools.count()

    def killed(rank: int) -> None:
        def lost(*arguments: Any) -> torch.Tensor:
            if rank == 1 and next(calls) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return summed_loss(*arguments)

        monkeypatch.setattr(learning, "summed_loss", lost)
        train(order, place.pod)

    assert side_by_side(2, killed) == [1, -signal.SIGKILL]
    assert [path.name for path in place.work.glob("checkpoints/*/step-*")] == ([] if sharded else ["step-00000002"])


@pytest.mark.soak
def test_weights_can_wait_in_host_memory(place: Place) -> None:
    changes = SHARED | {"max_steps": 4}
    expected = undisturbed(place, place.train_order(None, changes))
    offloaded = place.train_order(None, changes | {"offload": "parameters"})
    code, output, _ = ended(place, started(place, offloaded))
    assert code == 0, output
    assert losses(place) == pytest.approx(expected, rel=1e-4)


def test_ranks_that_have_the_model_whole_share_the_questions(place: Place) -> None:
    """70 questions of different lengths are three batches: one rank answers two of them, and both know all answers."""
    base = open_base(place.claims / "base" / "model", "x")
    model = AutoModelForCausalLM.from_pretrained(base.directory).eval()
    asked = [Example("messages", chat(f"{'again and ' * (number % 7)} {number}?", "bird")) for number in range(70)]

    def answered(ranks: Ranks, made: list[int]) -> list[str]:
        return answers_to(model, base.tokenizer, asked, alive=lambda: made.append(1), ranks=ranks)

    batches: list[int] = []
    alone = answered(ALONE, batches)
    assert len(batches) == 3
    assert len(set(alone)) > 5, "or the order of the answers would not show"

    def counted(rank: int) -> None:
        dist.init_process_group("gloo")
        made: list[int] = []
        texts = answered(Ranks(rank, 2), made)
        (place.root / f"{rank}.json").write_text(json.dumps([*texts, str(len(made))]))
        dist.destroy_process_group()

    assert side_by_side(2, counted) == [0, 0]
    found = [json.loads((place.root / f"{rank}.json").read_text()) for rank in range(2)]
    assert found == [[*alone, "2"], [*alone, "1"]]


# --- the loader ---


@pytest.fixture
def mesh() -> Iterator[Any]:
    yield mesh_of(ALONE, CPU)
    dist.destroy_process_group()


ORDINARY = ["llama, biases and tied", "gemma3", "phi, normed heads", "mixtral", "deepseek_v3"]


def base_of(config: dict[str, Any], directory: Path) -> BaseModel:
    """A model of random weights on disk, without a tokenizer."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).to(torch.bfloat16)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # what a training has made of it is in the files
            buffer.normal_()
    model.save_pretrained(directory)
    weights = read_weights(directory, "x")
    loaded = AutoConfig.from_pretrained(directory)
    return BaseModel(directory, "x", loaded, None, weights, "", shape_of(model, weights, None), type(model).__name__)


@pytest.mark.parametrize("method", ["qlora", "lora"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ORDINARY else [pytest.mark.soak]) for name in CONFIGS]
)
def test_a_model_loaded_layer_by_layer_is_the_model(name: str, method: str, tmp_path: Path, mesh: Any) -> None:
    """Weights, 4-bit codes, buffers and the fresh adapter, bit by bit as transformers and PEFT load them."""
    base = base_of(CONFIGS[name], tmp_path)
    recipe = recipe_of(
        method=method, compute_dtype="bfloat16", attention=attention_by_default(base.shape),
        target_modules=adapted_by_default(base.shape),
    )  # fmt: skip
    expected = with_adapter(load_for_training(base, recipe, CPU), recipe, base)
    compare(expected, load_sharded(base, recipe, CPU, mesh))


@pytest.mark.parametrize("more", [*STARTS, {"dora": True, "method": "lora"}], ids=str)
def test_an_adapter_that_starts_from_the_base_starts_the_same(more: dict[str, Any], tmp_path: Path, mesh: Any) -> None:
    base = base_of(CONFIGS["llama"], tmp_path)
    recipe = recipe_of(**more)
    expected = with_adapter(load_for_training(base, recipe, CPU), recipe, base)
    start(expected, recipe, base)
    compare(expected, load_sharded(base, recipe, CPU, mesh))
    unset = dict(load_sharded(base, recipe, CPU, mesh, starts=False).named_parameters())
    assert any(
        not torch.equal(whole(unset[path]), weight)
        for path, weight in expected.named_parameters()
        if weight.requires_grad
    )


def compare(expected: Any, model: Any) -> None:
    """Weights, buffers and logits, bit by bit."""
    assert shares_of(model)[0] == shares_of(model)[1] > 0

    found = dict(model.named_parameters())
    for path, weight in expected.named_parameters():
        value = whole(found.pop(path))
        if value.dtype != weight.dtype:  # packed: two codes to a byte, kept in the type of the others
            value = value.view(weight.dtype).reshape(weight.shape)
        assert torch.equal(value, weight), path
    assert not found
    buffers = dict(model.named_buffers())
    for path, buffer in expected.named_buffers():
        assert torch.equal(buffers[path], buffer), path
    ids = torch.randint(3, 500, (2, 40))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


# --- whose end it was ---


def word(rank: int, code: int, *, foreseen: bool = True) -> Word:
    return Word(rank, code, json.dumps({"rank": rank}), at=float(rank), foreseen=foreseen)


def crashed(rank: int) -> Word:
    return word(rank, 1, foreseen=False)


STOPPED = ExitCode.INTERRUPTED


@pytest.mark.parametrize(
    ("words", "killed", "told", "rank", "code"),
    [
        ([word(0, 0), word(1, 0)], {}, False, 0, 0),
        ([crashed(0), word(1, ExitCode.OUT_OF_MEMORY)], {}, False, 1, ExitCode.OUT_OF_MEMORY),
        ([word(0, STOPPED), word(1, ExitCode.DIVERGED)], {}, True, 1, ExitCode.DIVERGED),
        ([crashed(0), word(1, 1)], {}, False, 1, 1),
        ([crashed(0)], {1: 9}, False, 1, 137),
        ([word(0, STOPPED), word(2, STOPPED)], {1: 9}, False, 1, 137),
        ([word(0, STOPPED), crashed(1)], {}, True, 0, STOPPED),
        ([word(0, STOPPED), crashed(1)], {}, False, 1, 1),
        ([crashed(0), crashed(1)], {}, False, 0, 1),
        ([word(0, 0), crashed(1)], {}, False, 1, 1),
    ],
)
def test_the_rank_that_knows_why_speaks(
    words: list[Word], killed: dict[int, int], told: bool, rank: int, code: int
) -> None:
    found = cause(words, killed, told=told)
    assert found
    assert (found.rank, found.code) == (rank, code)


def test_ranks_without_a_word_have_no_end_to_tell() -> None:
    assert cause([], {}, told=True) is None
