"""Examples as tokens: which of them carry loss, how they are packed, and in which order they are learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from trl.chat_template_utils import get_training_chat_template, is_chat_template_stop_token_trained
from trl.data_utils import common_prefix_length, pack_dataset

from qlora_trainer.data import Corpus, Example
from qlora_trainer.environment import log
from qlora_trainer.failures import BadInput

Loss = Literal["assistant", "completion", "all"]
#: Label of a token that carries no loss; torch's cross-entropy and transformers share it.
NO_LOSS = -100
SAMPLES_LOGGED = 5


@dataclass(frozen=True)
class Sequence:
    """One row of training: one example, or several packed behind one another."""

    ids: list[int]
    labels: list[int]
    lengths: list[int]

    @property
    def loss_tokens(self) -> int:
        """Tokens that are predicted and carry loss: the first of each example has nothing before it."""
        starts = np.cumsum([0, *self.lengths[:-1]])
        carrying = np.asarray(self.labels) != NO_LOSS
        carrying[starts] = False
        return int(carrying.sum())


class Tokenisation:
    """How examples of one format become tokens, with the loss asked for.

    Raises BadInput where the tokenizer's chat template cannot do that.
    """

    def __init__(self, tokenizer: Any, format: str, loss: Loss | None) -> None:  # noqa: A002  the field's name
        self.tokenizer = tokenizer
        self.loss: Loss = loss or ("assistant" if format == "messages" else "completion")
        self.template: str | None = None
        if format != "messages":
            if self.loss == "assistant":
                raise BadInput("dataset.loss: assistant is for messages; for prompts and completions use completion")
            return
        if not tokenizer.chat_template:
            raise BadInput(
                "dataset: messages need a chat template and the model's tokenizer has none: "
                "use an instruction-tuned model, add a chat_template, or write prompts and completions"
            )
        self.template = _chosen_template(tokenizer)
        if self.loss == "assistant":
            self.template = self._template_with_marks()

    def _template_with_marks(self) -> str | None:
        """A chat template that marks what the assistant says: the tokenizer's own, or TRL's version of it."""
        try:
            patched = get_training_chat_template(self.tokenizer)
        except ValueError as error:
            raise BadInput(
                "dataset.loss: assistant needs a chat template with {% generation %} marks, and the model's has none "
                "and is not one that is known: set dataset.loss to completion (the last answer only) or all, "
                "or add the marks to the template"
            ) from error
        template = patched or self.template
        if not is_chat_template_stop_token_trained(self.tokenizer, template):
            raise BadInput(
                "dataset.loss: with the model's chat template the assistant's end-of-turn token carries no loss, so "
                "the model would never learn to stop: move {% endgeneration %} behind it, or set dataset.loss to all"
            )
        return template

    def __call__(self, example: Example) -> Sequence:
        """Tokens and labels of `example`, not cut."""
        if example.format == "messages":
            ids, carrying = self._messages(example)
        else:
            ids, carrying = self._prompt_completion(example)
        labels = [token if carries else NO_LOSS for token, carries in zip(ids, carrying, strict=True)]
        return Sequence(ids, labels, [len(ids)])

    def _messages(self, example: Example) -> tuple[list[int], list[int]]:
        messages = example.content["messages"]
        options = {"tools": example.content.get("tools"), "chat_template": self.template, "return_dict": True}
        if self.loss == "assistant":
            rendered = self.tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, **options)
            return rendered["input_ids"], rendered["assistant_masks"]
        ids = self.tokenizer.apply_chat_template(messages, **options)["input_ids"]
        if self.loss == "all":
            return ids, [1] * len(ids)
        prompt = self.tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)["input_ids"]
        start = common_prefix_length(prompt, ids)
        return ids, [0] * start + [1] * (len(ids) - start)

    def _prompt_completion(self, example: Example) -> tuple[list[int], list[int]]:
        prompt = self.tokenizer(example.content["prompt"])["input_ids"]
        text = example.content["prompt"] + example.content["completion"]
        end = self.tokenizer.eos_token
        ids = self.tokenizer(text if text.endswith(end) else text + end)["input_ids"]
        if self.loss == "all":
            return ids, [1] * len(ids)
        start = common_prefix_length(prompt, ids)
        return ids, [0] * start + [1] * (len(ids) - start)

    def prompt_of(self, example: Example) -> list[int]:
        """Tokens up to where the model is to answer."""
        return prompt_tokens(self.tokenizer, example)


def _chosen_template(tokenizer: Any) -> str:
    template = tokenizer.chat_template
    return template["default"] if isinstance(template, dict) else template


def prompt_tokens(tokenizer: Any, example: Example) -> list[int]:
    """Tokens of `example` up to where the model is to answer."""
    if example.format == "messages":
        rendered = tokenizer.apply_chat_template(
            example.content["messages"][:-1],
            tools=example.content.get("tools"),
            add_generation_prompt=True,
            return_dict=True,
        )
        return rendered["input_ids"]
    return tokenizer(example.content["prompt"])["input_ids"]


def log_samples(sequences: list[Sequence], corpus: Corpus, tokenizer: Any) -> None:
    """Print the first examples as the model sees them, loss in ⟦brackets⟧, and the first golden answers."""
    for number, sequence in enumerate(sequences[:SAMPLES_LOGGED]):
        text, learning = "", False
        for token, label in zip(sequence.ids, sequence.labels, strict=True):
            if (label != NO_LOSS) != learning:
                text += "⟧" if learning else "⟦"
                learning = not learning
            text += tokenizer.decode([token])
        log.info("example %d: %s%s", number, text, "⟧" if learning else "")
    for number, example in enumerate(corpus.golden[:SAMPLES_LOGGED]):
        log.info("golden %d expects: %s", number, example.expected)


def cut(sequences: list[Sequence], max_length: int) -> list[Sequence]:
    """Each sequence's first `max_length` tokens; those left without a token to learn are dropped."""
    shorter = (
        Sequence(sequence.ids[:max_length], sequence.labels[:max_length], [min(len(sequence.ids), max_length)])
        for sequence in sequences
    )
    return [sequence for sequence in shorter if sequence.loss_tokens]


def pack(sequences: list[Sequence], max_length: int, *, seed: int = 0) -> list[Sequence]:
    """Several sequences in a row of at most `max_length` tokens: best fit, none split, none cut, none lost.

    Rows are mixed by `seed` (best fit goes by length, so unmixed rows would hold neighbours); how many rows there are
    depends on the lengths alone, so that what inspect counts is what train does.
    """
    order = np.random.default_rng(seed).permutation(len(sequences))
    columns = {
        "input_ids": [sequences[i].ids for i in order],
        "labels": [sequences[i].labels for i in order],
    }
    whole = {"batch_size": len(sequences)}
    rows = pack_dataset(Dataset.from_dict(columns), max_length, "bfd", map_kwargs=whole)
    return [Sequence(*row) for row in zip(rows["input_ids"], rows["labels"], rows["seq_lengths"], strict=True)]


def batches(count: int, batch_size: int, seed: int, *, start: int, stop: int) -> Iterator[list[int]]:
    """Which of `count` sequences each optimizer step from `start` to `stop` learns from.

    Every epoch goes through all of them, in an order given by `seed` and epoch alone; its last batch may be smaller.
    """
    per_epoch = -(-count // batch_size)
    epoch, order = -1, np.empty(0)
    for step in range(start, stop):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = np.random.default_rng([seed, epoch]).permutation(count)
        first = (step % per_epoch) * batch_size
        yield [int(i) for i in order[first : first + batch_size]]


@dataclass(frozen=True)
class Batch:
    """What a forward pass takes: [rows, length] each; `labels` are already moved one token to the left."""

    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    tokens: int


def collate(sequences: list[Sequence], *, pad: int, flat: bool = False) -> Batch:
    """Rows of equal length, or all in one row (`flat`, for attention kernels that take sequences of any length).

    Positions begin at 0 with every example, and with every single pad token: that is how transformers tells packed
    examples apart, and why there is no attention mask. It holds only without a KV cache.
    """
    ids, positions, labels = [], [], []
    for sequence in sequences:
        following = [*sequence.labels[1:], NO_LOSS]
        end = 0
        for length in sequence.lengths:
            end += length
            following[end - 1] = NO_LOSS  # what follows an example's last token is another example
        ids.append(torch.tensor(sequence.ids))
        labels.append(torch.tensor(following))
        positions.append(torch.cat([torch.arange(length) for length in sequence.lengths]))
    tokens = sum(len(row) for row in ids)
    if flat:
        return Batch(torch.cat(ids)[None], torch.cat(positions)[None], torch.cat(labels)[None], tokens)

    def rows(values: list[torch.Tensor], padding: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding)

    return Batch(rows(ids, pad), rows(positions, 0), rows(labels, NO_LOSS), tokens)
