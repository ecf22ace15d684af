"""What waits in host memory comes back as it was, and nothing else goes there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_trainer.adapter import with_adapter
from qlora_trainer.evaluation import summed_loss
from qlora_trainer.model import open_base
from qlora_trainer.offloading import CheckpointsOnTheHost, activations_offloaded
from qlora_trainer.quantization import load_for_training
from qlora_trainer.sequences import Sequence, collate

from .conftest import recipe_of

CPU = torch.device("cpu")
ROWS = [Sequence(list(range(start, start + 40)), list(range(start, start + 40)), [40]) for start in (5, 60)]


def gradients(model: Any, context: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    with context:
        loss = summed_loss(model, collate(ROWS, pad=0), CPU)
    loss.backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return found | {"loss": loss.detach()}


@pytest.mark.parametrize("more", [{}, {"dora": True}, {"compute_dtype": "bfloat16"}], ids=str)
def test_offloading_changes_no_gradient_and_moves_a_checkpoint_per_layer(model_dir: Any, more: dict[str, Any]) -> None:
    base = open_base(model_dir, "pvc://base/model")
    recipe = recipe_of(dropout=0.1, gradient_checkpointing=True, **more)
    model = with_adapter(load_for_training(base, recipe, CPU), recipe, base).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    hooks = CheckpointsOnTheHost(base.shape.hidden_size, CPU)
    plain, moved = gradients(model, activations_offloaded(recipe, base.shape.hidden_size, CPU)), gradients(model, hooks)
    assert plain.keys() == moved.keys()
    assert all(torch.equal(plain[name], moved[name]) for name in plain)

    size = 2 if recipe.compute_dtype == "bfloat16" else 4
    checkpoint = 2 * 40 * base.shape.hidden_size * size
    # beside the checkpoints, the last norm keeps its input, twice where it casts it to fp32
    assert base.shape.layers * checkpoint <= hooks.moved_bytes <= (base.shape.layers + 4) * checkpoint * 4 // size
    assert hooks.moved_bytes < 2 * 40 * base.shape.vocab_size * 4, "the logits stay"


def test_nothing_is_moved_unasked() -> None:
    with activations_offloaded(recipe_of(), 64, torch.device("cuda")) as context:
        assert context is None
