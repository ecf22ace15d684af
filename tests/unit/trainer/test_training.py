from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from qlora_api.exchange import ExitCode, TrainOrder, TrainResult
from qlora_trainer import learning, training
from qlora_trainer.adapter import with_adapter
from qlora_trainer.checkpoint import Checkpoint, Checkpoints, Progress
from qlora_trainer.environment import Pod
from qlora_trainer.evaluation import mean_loss, summed_loss
from qlora_trainer.failures import BadInput, Diverged, EnvironmentUnfit, Interrupted, describe
from qlora_trainer.inspection import inspect
from qlora_trainer.interruption import Interruption
from qlora_trainer.model import open_base
from qlora_trainer.optimization import learning_rate
from qlora_trainer.quantization import load_for_training
from qlora_trainer.sequences import Sequence, collate
from qlora_trainer.training import train

from .conftest import Place, chat, recipe_of, write_jsonl

CPU = torch.device("cpu")


class InterruptedAfter(Interruption):
    """Told to stop when it was asked `times` times: as SIGTERM would be, at a chosen micro-batch."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    @property
    def requested(self) -> bool:
        self.times -= 1
        return self.times < 0

    @requested.setter
    def requested(self, value: bool) -> None:
        assert not value


def losses(place: Place) -> list[float]:
    newest = sorted(place.work.glob("checkpoints/*/step-*"))[-1]
    return json.loads((newest / "progress.json").read_text())["losses"]


def afresh(place: Place) -> None:
    shutil.rmtree(place.work, ignore_errors=True)


def test_it_learns_and_says_what_it_reached(place: Place) -> None:
    data = place.data(eval_fraction=0.1)
    order = place.train_order(data, {"max_steps": None, "epochs": 20.0, "rslora": True})
    rows = inspect(place.inspect_order(data, max_length=128), place.pod).sequences
    result = train(order, place.pod)
    history = losses(place)
    assert result.steps == len(history) == order.recipe.steps(rows) == 20 * -(-rows // 4)
    assert result.epochs == 20
    assert history[-1] < history[0] / 3
    assert result.train_loss < 1.5
    assert result.eval_loss is not None
    assert result.scores[0].metric == "exactMatch"
    assert result.scores[0].tuned > result.scores[0].base == 0
    assert result.device == "cpu"
    assert result.tokens > 0 < result.tokens_per_second
    assert result.peak_memory_bytes > 100 << 20

    config = json.loads((place.work / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("pvc://base/model", None)
    assert config["use_rslora"]
    assert str(place.root) not in (place.work / "adapter" / "qlora-training.json").read_text()
    base = load_for_training(open_base(place.claims / "base" / "model", "x"), recipe_of(method="lora"), CPU)
    adapter = PeftModel.from_pretrained(base, str(place.work / "adapter"))
    assert (
        float(adapter.get_parameter("base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight").abs().max())
        > 0
    )


def test_a_finished_training_is_not_done_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    order = place.train_order(recipe={"max_steps": 2})
    result = train(order, place.pod)
    with monkeypatch.context() as patch:
        patch.setattr(training, "load_for_training", lambda *_: pytest.fail("trained again"))
        assert train(order.model_copy(update={"attempt": 2}), place.pod) == result
    (place.work / "adapter" / "adapter_config.json").write_text("{}")
    assert train(order, place.pod).adapter_digest == result.adapter_digest, "a damaged adapter is made anew, and equal"


def test_the_micro_batch_changes_nothing(place: Place) -> None:
    """Out of memory halves the micro-batch; what is learned must stay what was ordered."""
    found: list[list[float]] = []
    for micro, accumulation in ((4, 1), (2, 2), (1, 4), (3, 2)):
        afresh(place)
        train(place.train_order(micro_batch_size=micro, gradient_accumulation=accumulation), place.pod)
        found.append(losses(place))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=2e-4)
    assert found[0][-1] < found[0][0]


def test_checkpointing_activations_changes_nothing(place: Place) -> None:
    train(place.train_order(recipe={"dropout": 0.1}), place.pod)
    plain = losses(place)
    afresh(place)
    train(place.train_order(recipe={"dropout": 0.1, "gradient_checkpointing": True}), place.pod)
    assert losses(place) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "paged_adamw_8bit"])
def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(place: Place, optimizer: str) -> None:
    order = place.train_order(
        place.data(eval_fraction=0.1), {"optimizer": optimizer, "dropout": 0.1, "compute_dtype": "bfloat16"}
    )
    whole = train(order, place.pod)
    history = losses(place)
    afresh(place)

    with pytest.raises(Interrupted, match="at step 3 of 6") as raised:
        train(order, Pod(InterruptedAfter(3 * 3 + 1), place.pod.claims))  # asked twice in a step and once at its end
    assert describe(raised.value)[0] == ExitCode.INTERRUPTED
    assert losses(place) == history[:3]
    resumed = train(order.model_copy(update={"attempt": 2}), place.pod)
    assert resumed.resumed_from_step == 3
    assert losses(place) == history, "the losses after the resume are not those of an undisturbed run, bit by bit"
    assert resumed.adapter_digest == whole.adapter_digest
    assert resumed.eval_loss == whole.eval_loss
    assert resumed.scores == whole.scores


def test_damaged_and_foreign_checkpoints_are_not_used(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    order = place.train_order(recipe={"max_steps": 4}, checkpoint_every_seconds=1)
    with pytest.raises(Interrupted):
        train(order, Pod(InterruptedAfter(6), place.pod.claims))
    (newest,) = place.work.glob("checkpoints/*/step-*")
    content = bytearray((newest / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "optimizer.pt").write_bytes(content)
    assert train(order, place.pod).resumed_from_step is None
    assert "its files are not those of its manifest" in caplog.text


CHANGED: list[Any] = [
    # what is ordered otherwise than before, and what is said of it
    ({"recipe": {"seed": 8, "effective_batch_size": 2}}, ["recipe.effectiveBatchSize 4 → 2; recipe.seed 7 → 8"]),
    ({"recipe": {"packing": False}}, ["recipe.packing True → False"]),
    ({"recipe": {"rslora": True}}, ["recipe.rslora the default → True"]),
    ({"model_digest": "sha256:" + "0" * 64}, ["model sha256:", " → sha256:000000000000."]),
    ({"data_digest": "sha256:" + "1" * 64}, ["dataset sha256:", " → sha256:111111111111."]),
]


@pytest.mark.parametrize(("changes", "said"), CHANGED, ids=lambda value: next(iter(value)))
def test_checkpoints_of_another_training_are_refused_with_what_differs(
    tmp_path: Path, place: Place, changes: dict[str, Any], said: list[str]
) -> None:
    """Begun anew beside them, what was learned would be lost without a word."""
    order = place.train_order()
    first = Checkpoints(tmp_path, order.bound(), keep=2)
    first.save(Checkpoint(Progress(step=3), {"a": torch.ones(2)}, {}))
    fields = {key: value for key, value in changes.items() if key != "recipe"}
    other = place.train_order(recipe=changes.get("recipe")).model_copy(update=fields)
    with pytest.raises(BadInput, match="are of another training") as raised:
        Checkpoints(tmp_path, other.bound(), keep=2)
    assert [part for part in said if part not in str(raised.value)] == [], raised.value


def test_what_may_change_under_a_checkpoint_goes_on_from_it(tmp_path: Path, place: Place) -> None:
    order = place.train_order()
    Checkpoints(tmp_path, order.bound(), keep=2).save(Checkpoint(Progress(step=3), {"a": torch.ones(2)}, {}))
    elsewhere = {"offload": "activations", "gradient_checkpointing": True}
    later = order.model_copy(
        update={
            "attempt": 2, "micro_batch_size": 1, "gradient_accumulation": 4, "ranks_per_node": 2, "nodes": 2,
            "recipe": order.recipe.model_copy(update=elsewhere),
        }
    )  # fmt: skip
    found = Checkpoints(tmp_path, later.bound(), keep=2).newest()
    assert found is not None
    assert found.progress.step == 3


def test_checkpoints_of_an_older_version_are_left_alone(
    tmp_path: Path, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """They do not say of what they are: an upgrade costs what was learned, and not the job."""
    caplog.set_level("INFO")
    bare = tmp_path / "0123456789abcdef" / "step-00000003"
    bare.mkdir(parents=True)
    (bare / "manifest.json").write_text('{"binding": "sha256:0"}')
    assert Checkpoints(tmp_path, place.train_order().bound(), keep=2).newest() is None
    assert "it does not say of what training it is" in caplog.text
    assert bare.is_dir()


def test_a_full_volume_is_told_and_the_checkpoint_before_is_kept(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch says of a full disk while it writes is not what the system said: the cause is looked for."""
    order = place.train_order()
    checkpoints = Checkpoints(tmp_path, order.bound(), keep=1)
    checkpoints.save(Checkpoint(Progress(step=1), {"a": torch.ones(2)}, {}))
    real = torch.save

    def into_a_full_volume(states: Any, file: Any) -> None:
        with Path("/dev/full").open("wb", buffering=0) as full:  # opened for writing only: nothing replaces the device
            real(states, full)

    with monkeypatch.context() as patch, pytest.raises((OSError, RuntimeError)) as raised:
        patch.setattr(torch, "save", into_a_full_volume)
        checkpoints.save(Checkpoint(Progress(step=2), {"a": torch.ones(9)}, {"moments": torch.ones(300_000)}))
    code, message = describe(raised.value, order)
    assert code == ExitCode.VOLUME_FULL
    assert "the work volume" in message
    assert "what is on it is kept; enlarge its claim" in message
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.progress.step == 1
    assert [path.name for path in checkpoints.directory.iterdir()] == ["step-00000001"]


def test_checkpoints_are_written_by_the_clock_and_the_oldest_go(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(10**6))
    monkeypatch.setattr(learning.time, "monotonic", lambda: float(next(now)))
    train(place.train_order(checkpoint_every_seconds=1, checkpoint_keep=2), place.pod)
    assert [path.name for path in sorted(place.work.glob("checkpoints/*/*"))] == ["step-00000005", "step-00000006"]


def test_an_evaluation_leaves_the_gradients_alone(place: Place) -> None:
    """Without the cure in quantization.py, bitsandbytes repacks weights on CPUs with AVX512-BF16: another model."""
    base = open_base(place.claims / "base" / "model", "pvc://base/model")
    recipe = recipe_of(compute_dtype="bfloat16")
    model = with_adapter(load_for_training(base, recipe, CPU), recipe, base).train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(1))
    rows = [Sequence(list(range(5, 45)), list(range(5, 45)), [40])]

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        summed_loss(model, collate(rows, pad=0), CPU).backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    before = gradients()
    mean_loss(model, rows, 1, CPU, pad=0, flat=False)
    after = gradients()
    assert len(before) == len(after) == 28
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(float(grad.abs().max()) > 0 for grad in after.values())


def test_what_is_not_a_number_ends_the_training(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    order = place.train_order()
    monkeypatch.setattr(
        learning, "summed_loss", lambda model, batch, device: summed_loss(model, batch, device) * float("nan")
    )
    with pytest.raises(Diverged, match=r"3 steps in a row, up to step 3: lower training\.learningRate") as raised:
        train(order, place.pod)
    assert describe(raised.value)[0] == ExitCode.DIVERGED


def test_one_step_that_is_not_finite_is_left_out(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(1000))

    def once_infinite(model: Any, batch: Any, device: torch.device) -> torch.Tensor:
        return summed_loss(model, batch, device) * (float("inf") if next(calls) == 3 else 1)

    order = place.train_order()
    monkeypatch.setattr(learning, "summed_loss", once_infinite)
    result = train(order, place.pod)
    assert result.steps == 6
    assert result.train_loss < losses(place)[0]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
])  # fmt: skip
def test_out_of_memory_keeps_what_was_learned(
    place: Place, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    calls = iter(range(1000))

    def too_large(model: Any, batch: Any, device: torch.device) -> torch.Tensor:
        if next(calls) == 5:
            raise error
        return summed_loss(model, batch, device)

    order = place.train_order()
    with monkeypatch.context() as patch:
        patch.setattr(learning, "summed_loss", too_large)
        with pytest.raises(type(error)) as raised:
            train(order, place.pod)
    assert describe(raised.value)[0] == ExitCode.OUT_OF_MEMORY
    halved = order.model_copy(update={"micro_batch_size": 1, "gradient_accumulation": 4, "attempt": 2})
    assert train(halved, place.pod).resumed_from_step == 2


def test_a_changed_model_or_data_set_is_not_trained_on(place: Place) -> None:
    order = place.train_order()
    write_jsonl(place.claims / "data" / "golden.jsonl", [chat("A carp?", "fish")])
    with pytest.raises(BadInput, match="dataset: the data has changed since inspection"):
        train(order, place.pod)
    tokens = place.claims / "base" / "model" / "tokenizer_config.json"
    tokens.write_text(tokens.read_text() + " ")
    with pytest.raises(BadInput, match=r"model\.uri: pvc://base/model has changed since inspection"):
        train(order, place.pod)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what must be missing")
def test_a_gpu_that_is_not_there_is_the_nodes_fault(place: Place) -> None:
    order = place.train_order(recipe={"max_steps": 1}, accelerator="nvidia")
    with pytest.raises(EnvironmentUnfit, match="this node offers none") as raised:
        train(order, place.pod)
    assert describe(raised.value)[0] == ExitCode.ENVIRONMENT_UNFIT
    allowed: TrainOrder = order.model_copy(update={"cpu_allowed": True})
    assert train(allowed, place.pod).device == "cpu"


@pytest.mark.parametrize("changes", [{"method": "lora"}, {"quant_type": "fp4", "double_quant": False}])
def test_other_methods_learn_too(place: Place, changes: dict[str, Any]) -> None:
    result: TrainResult = train(place.train_order(recipe={"compute_dtype": "bfloat16", **changes}), place.pod)
    assert losses(place)[-1] < losses(place)[0]
    assert result.adapter_bytes > 0


def test_fp16_gradients_are_scaled(place: Place) -> None:
    train(place.train_order(recipe={"compute_dtype": "float16", "max_steps": 2}), place.pod)
    fp16 = losses(place)
    afresh(place)
    train(place.train_order(recipe={"max_steps": 2}), place.pod)
    assert fp16 == pytest.approx(losses(place), rel=0.01)


@pytest.mark.parametrize(
    ("schedule", "step", "rate"),
    [
        ("cosine", 0, 0.1), ("cosine", 9, 1.0), ("cosine", 10, 1.0), ("cosine", 55, 0.6), ("cosine", 100, 0.2),
        ("linear", 55, 0.6), ("linear", 100, 0.2), ("constant", 4, 0.5), ("constant", 99, 1.0),
    ],
)  # fmt: skip
def test_the_learning_rate_follows_its_schedule(schedule: str, step: int, rate: float) -> None:
    recipe = recipe_of(schedule=schedule, learning_rate=1.0, min_learning_rate=0.2, warmup_fraction=0.1)
    assert learning_rate(step, 100, recipe) == pytest.approx(rate)
