"""Output head and cross-entropy in one, tile by tile of tokens: the logits of a micro-batch never exist at once.

The head is frozen, so all that its backward gives is the gradient of the hidden states, (softmax − one-hot) · weight.
That is computed where the logits are, in the forward: the head is gone through once, its weight is needed once, which
saves a gather where ranks share it, and what waits for the backward is as large as the hidden states. As in Liger
Kernel (Hsu et al. 2024, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from qlora_api.heads import HEADS, tile_rows
from qlora_trainer.failures import BadInput

#: What probabilities are multiplied by while they are fp16, whose smallest normal number is 6e-5: of a vocabulary of
#: 100,000 words most are less likely. Its square root of the largest is far off with weights below 30.
_FP16_SCALE = 1024.0


@dataclass(frozen=True)
class AfterHead:
    """What turns the head's product into logits: times `scale`, then under a cap."""

    scale: float = 1.0
    cap: float | None = None


@dataclass
class Taken:
    """The loss that came out of the head in place of logits."""

    loss: Any = None


def fuse_head(model: Any) -> None:
    """Have `summed_loss` take this model's loss in its head.

    Raises BadInput where that would be another loss: it was planned for, and whole logits take more memory.
    """
    config, head = model.config, model.get_output_embeddings()
    if config.model_type not in HEADS:
        raise BadInput(
            f"model.uri: what {config.model_type} models do to the product of their head is not known to this version, "
            "and the plan is for a loss in tiles: use one image for operator and trainer"
        )
    if not isinstance(head, nn.Linear) or any(weight.requires_grad for weight in head.parameters()):
        raise BadInput("model.uri: the output head is no frozen linear layer, and the plan is for a loss in tiles")
    model.get_output_embeddings().after = after_head(config)


def after_head(config: Any) -> AfterHead:
    """As `config` sets it, of a family that is known."""
    names = HEADS[config.model_type]
    scale = 1.0
    if names.times:
        scale *= getattr(config, names.times)
    if names.over:
        scale /= getattr(config, names.over)
    return AfterHead(scale, getattr(config, names.cap, None) if names.cap else None)


def is_fused(model: Any) -> bool:
    """Whether `fuse_head` was called with this model."""
    head = model.get_output_embeddings()
    return isinstance(getattr(head, "after", None), AfterHead)


@contextmanager
def loss_in_head(model: Any, labels: torch.Tensor, carrying: torch.Tensor) -> Iterator[Taken]:
    """While it is entered, the model's head leaves the loss of the tokens `carrying` here, and gives no logits.

    The model calls its head as always, so that whatever hangs on that call happens: FSDP2 gathers the weight before it
    and lets go of it after.
    """
    head, taken = model.get_output_embeddings(), Taken()

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.dim() == 3:  # the model does not choose among its tokens
            hidden = hidden[carrying]
        taken.loss = tiled_loss(hidden, head.weight, head.bias, labels[carrying], head.after)
        return hidden.new_empty(0, head.weight.shape[0])  # for what the model does to its logits

    head.forward = forward
    try:
        yield taken
    finally:
        del head.forward


def tiled_loss(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, after: AfterHead
) -> torch.Tensor:
    """Cross-entropy of `hidden` (tokens × width) summed, in fp32; only `hidden` gets a gradient."""
    loss: Any = _TiledLoss.apply(hidden, weight, bias, labels, after)
    return loss


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        after: AfterHead,
    ) -> torch.Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        rows = tile_rows(weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            into = None if gradient is None else gradient[part]
            loss += _loss_of_tile(hidden[part], weight, bias, labels[part], after, into)
        ctx.gradient, ctx.rows = gradient, rows
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the gradient of a loss was used up by its first backward")
        for part in gradient.split(ctx.rows):  # in fp32: a narrow factor would be off in all tokens alike
            part.copy_(part.float().mul_(grads[0]))
        return gradient, None, None, None, None


def _loss_of_tile(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    after: AfterHead,
    gradient: torch.Tensor | None,
) -> torch.Tensor:
    """The summed loss of a tile; writes what its hidden states have to do with it into `gradient`.

    At the most the logits in fp32 exist, and beside them once those or their gradient as computed with (twice under a
    cap).
    """
    narrow, labels = hidden.dtype, labels[:, None]
    logits = linear(hidden, weight, bias)
    if after.scale != 1.0:
        logits.mul_(after.scale)
    bent = None
    if after.cap is not None:
        bent = logits.div_(after.cap).tanh_()
        logits = bent * after.cap
    values = logits.float()  # the same tensor where they are in fp32
    del logits
    values.sub_(values.amax(-1, keepdim=True))
    chosen = values.gather(-1, labels)
    sums = values.exp_().sum(-1, keepdim=True)
    loss = (sums.log() - chosen).sum()
    if gradient is None:
        return loss

    values.div_(sums)
    values.scatter_(-1, labels, values.gather(-1, labels) - 1)
    scale = _FP16_SCALE if narrow == torch.float16 else 1.0
    if after.scale * scale != 1.0:
        values.mul_(after.scale * scale)
    delta = values.to(narrow)
    del values
    if bent is not None:
        delta = torch.ops.aten.tanh_backward(delta, bent)
    torch.mm(delta, weight, out=gradient)
    if scale != 1.0:
        gradient.div_(scale)
    return loss
