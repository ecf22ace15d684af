"""Whether a model keeps the examples of a packed row apart: asked of the model itself, on a few tokens.

Attention that masks by position does; a layer that carries a state from token to token, or an attention that reads no
positions, lets the second example see the first, and nothing fails.
"""

from __future__ import annotations

from typing import Any

import torch

from qlora_api.exchange import Recipe
from qlora_trainer.failures import BadInput
from qlora_trainer.sequences import Sequence, collate

LENGTH = 8
#: Of what a second example changes by when it does see the first. Rounding is far below, a leak is all of it.
TOLERANCE = 0.05


@torch.no_grad()
def require_apart(model: Any, recipe: Recipe, device: torch.device, architecture: str, *, flat: bool) -> None:
    """Raises BadInput when what the model says to an example depends on the example before it in the row."""
    if not recipe.packing:
        return
    training = model.training
    model.eval()
    first, other, second = (
        [number % model.config.vocab_size for number in range(start, start + LENGTH)] for start in (5, 25, 45)
    )
    packed, joined = (
        [_logits(model, [*before, *second], lengths, device, flat=flat)[-LENGTH:] for before in (first, other)]
        for lengths in ([LENGTH, LENGTH], [2 * LENGTH])
    )
    model.train(training)
    seen, all_there_is = (float((pair[0] - pair[1]).abs().max()) for pair in (packed, joined))
    if seen > TOLERANCE * all_there_is:
        raise BadInput(
            f"dataset.packing: {architecture} with {recipe.attention} attention does not keep the examples of "
            "a row apart (what it says to one depends on the one before): set dataset.packing to false"
        )


def _logits(model: Any, ids: list[int], lengths: list[int], device: torch.device, *, flat: bool) -> torch.Tensor:
    batch = collate([Sequence(ids, ids, lengths)], pad=0, flat=flat)
    out = model(input_ids=batch.ids.to(device), position_ids=batch.positions.to(device), use_cache=False)
    return out.logits[0].float()
