"""How good a model is: its loss on examples it has not learned, and its answers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Several
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from qlora_trainer.environment import log
from qlora_trainer.fused_loss import is_fused, loss_in_head
from qlora_trainer.prepared import Rows
from qlora_trainer.ranks import ALONE, Ranks
from qlora_trainer.sequences import NO_LOSS, Batch, Sequence, collate

GENERATION_BATCH = 32
#: Called after each batch of what takes long, so that whoever waits knows that work goes on.
Alive = Callable[[], object]


def summed_loss(model: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    """Cross-entropy summed over the tokens of `batch` that carry loss, in fp32; logits only where there is some.

    Of a model whose head is fused, no more logits than a tile's.
    """
    labels = batch.labels.to(device)
    carrying = labels != NO_LOSS
    options = {"logits_to_keep": carrying} if _keeps_logits(model) else {}
    tokens = {"input_ids": batch.ids.to(device), "position_ids": batch.positions.to(device), "use_cache": False}
    if is_fused(model):
        with loss_in_head(model, labels, carrying) as taken:
            model(**tokens, **options)
        return taken.loss
    logits = model(**tokens, **options).logits
    if not options:
        logits = logits[carrying]
    return cross_entropy(logits.float(), labels[carrying], reduction="sum")


def _keeps_logits(model: Any) -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def micro_batches(
    sequences: Several[Sequence], size: int, *, pad: int, flat: bool, ranks: Ranks = ALONE
) -> Iterator[Batch]:
    """This rank's part of `sequences`, in batches of at most `size`, as many as every rank has; one is held at a time.

    The longest come first: little padding, memory's peak at the start, and sequences of about one length on all ranks.
    Where there are not enough for all, a rank has a token without loss, for it has to take part.
    """
    lengths = sequences.lengths if isinstance(sequences, Rows) else np.array([len(row.ids) for row in sequences])
    by_length = np.argsort(-lengths, kind="stable")
    for start in range(0, len(by_length), size * ranks.size):
        first = start + size * ranks.rank
        chosen = [sequences[int(number)] for number in by_length[first : first + size]]
        yield collate(chosen or [Sequence([pad], [NO_LOSS], [1])], pad=pad, flat=flat)


@torch.no_grad()
def mean_loss(
    model: Any,
    sequences: Several[Sequence],
    size: int,
    device: torch.device,
    *,
    pad: int,
    flat: bool,
    alive: Alive = lambda: None,
    ranks: Ranks = ALONE,
) -> float:
    """Loss per token of `sequences`, over all ranks; leaves the model in training mode if it was."""
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for batch in micro_batches(sequences, size, pad=pad, flat=flat, ranks=ranks):
        total += float(summed_loss(model, batch, device))
        tokens += int((batch.labels != NO_LOSS).sum())
        alive()
    model.train(training)
    total, tokens = ranks.total(total, tokens)
    return total / tokens


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    name: str = "",
    alive: Alive = lambda: None,
    ranks: Ranks = ALONE,
) -> list[str]:
    """The model's most likely answer to each prompt, up to its end-of-turn token; special tokens are left out.

    All ranks have to ask for the same. Those that have the model whole take turns at the batches, which are cut as for
    one rank: padding moves logits by rounding, and of 200 answers of a small model in bfloat16 7 were others in batches
    of 8.
    """
    first = next(model.parameters())
    device = first.device
    # a rank whose answers end earlier goes on until all have ended: the others need its part of the weights
    shared = isinstance(first, DTensor) and first.device_mesh.size() > 1
    stops = stop_tokens(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    texts: dict[int, str] = {}
    turns = 1 if shared else ranks.size
    for turn, start in enumerate(range(0, len(order), GENERATION_BATCH)):
        if turn % turns != ranks.rank % turns:
            continue
        chosen = order[start : start + GENERATION_BATCH]
        width = max(len(prompts[number]) for number in chosen)
        ids = torch.full((len(chosen), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, number in enumerate(chosen):  # left padding: the answer begins in one column for all
            ids[row, width - len(prompts[number]) :] = torch.tensor(prompts[number])
            mask[row, width - len(prompts[number]) :] = 1
        generated = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            synced_gpus=shared,
            num_beams=1,
            use_cache=True,
            max_new_tokens=max_new_tokens,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
        )
        for number, row in zip(chosen, generated[:, width:], strict=True):
            texts[number] = tokenizer.decode(row, skip_special_tokens=True)
        alive()
        if name and (turn // turns) % 10 == 9:
            log.info("%s: %d of %d answered", name, start + len(chosen), len(prompts))
    if not shared:
        texts = {number: text for part in ranks.gathered(texts) for number, text in part.items()}
    return [texts[number] for number in range(len(prompts))]


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's and the model's own, and what its chat template puts after a turn."""
    stops = {tokenizer.eos_token_id}
    configured = getattr(model.generation_config, "eos_token_id", None)
    stops |= set(configured if isinstance(configured, list) else [configured])
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
        text = tokenizer.apply_chat_template(turn, return_dict=True)["input_ids"]
        special = set(tokenizer.all_special_ids)
        last = next((token for token in reversed(text) if tokenizer.decode([token]).strip()), None)
        stops |= {last} & special
    return sorted(stops - {None})
