"""Examples as tokens: which of them carry loss, how they are packed, and in which order they are learned."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, islice
from typing import Any, Literal

import numpy as np
import torch
from jinja2 import TemplateError
from trl.chat_template_utils import get_training_chat_template, is_chat_template_stop_token_trained
from trl.data_utils import common_prefix_length

from qlora_api.findings import FindingCode
from qlora_trainer.environment import log
from qlora_trainer.failures import BadInput
from qlora_trainer.formats import Example, Kind, Mistake

Loss = Literal["assistant", "completion", "all"]
#: Label of a token that carries no loss; torch's cross-entropy and transformers share it.
NO_LOSS = -100
#: Examples that are shown as the model sees them.
SAMPLES = 5


@dataclass(frozen=True)
class Sequence:
    """One row of training: one example, or several packed behind one another."""

    ids: list[int]
    labels: list[int]
    lengths: list[int]

    @cached_property
    def loss_tokens(self) -> int:
        """Tokens that are predicted and carry loss: the first of each example has nothing before it."""
        firsts = accumulate(self.lengths[:-1], initial=0)
        unpredicted = sum(self.labels[first] != NO_LOSS for first in firsts)
        return len(self.labels) - self.labels.count(NO_LOSS) - unpredicted


class Tokenisation:
    """How examples become tokens, with the loss asked for.

    `formats` is what training examples are; what is left open follows from it. Where both chats and other examples are
    trained on, `assistant` means the completion of the others. A text asks nothing, so all of it is learned.
    Raises BadInput where the formats or the tokenizer's chat template cannot do that.
    """

    def __init__(self, tokenizer: Any, formats: Iterable[Kind], loss: Loss | None) -> None:
        formats = set(formats)
        self.tokenizer = tokenizer
        by_format: Loss = "assistant" if "messages" in formats else "all" if formats == {"text"} else "completion"
        self.loss: Loss = loss or by_format
        self.template: str | None = _chosen_template(tokenizer) if tokenizer.chat_template else None
        if formats == {"text"} and self.loss != "all":
            raise BadInput(f"dataset.loss: {self.loss} is for questions with answers; of a text, all is learned")
        if "messages" in formats:
            require_chat_template(tokenizer)
            if self.loss == "assistant":
                self.template = self._template_with_marks()
        elif self.loss == "assistant":
            raise BadInput("dataset.loss: assistant is for messages; for prompts and completions use completion")

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
        """Tokens and labels of `example`, not cut. Raises Mistake when the chat template refuses it."""
        example = suited(example, self.tokenizer)
        if example.format == "messages":
            try:
                ids, carrying = self._messages(example)
            except TemplateError as error:
                raise Mistake(FindingCode.TEMPLATE_REFUSES, f"the model's chat template refuses it: {error}") from error
        elif example.format == "text":
            ids = self._ended(example.content["text"])
            carrying = [1] * len(ids)
        else:
            ids, carrying = self._prompt_completion(example)
        labels = [token if carries else NO_LOSS for token, carries in zip(ids, carrying, strict=True)]
        return Sequence(ids, labels, [len(ids)])

    def _messages(self, example: Example) -> tuple[list[int], list[int]]:
        messages = example.content["messages"]
        options = {"tools": example.content.get("tools"), "chat_template": self.template, "return_dict": True}
        if self.loss == "assistant" and self.template:
            rendered = self.tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, **options)
            return rendered["input_ids"], rendered["assistant_masks"]
        ids = self.tokenizer.apply_chat_template(messages, **options)["input_ids"]
        if self.loss == "all":
            return ids, [1] * len(ids)
        prompt = self.tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)["input_ids"]
        start = common_prefix_length(prompt, ids)
        return ids, [0] * start + [1] * (len(ids) - start)

    def _ended(self, text: str) -> list[int]:
        end = self.tokenizer.eos_token
        return self.tokenizer(text if text.endswith(end) else text + end)["input_ids"]

    def _prompt_completion(self, example: Example) -> tuple[list[int], list[int]]:
        prompt = self.tokenizer(example.content["prompt"])["input_ids"]
        ids = self._ended(example.content["prompt"] + example.content["completion"])
        if self.loss == "all":
            return ids, [1] * len(ids)
        start = common_prefix_length(prompt, ids)
        return ids, [0] * start + [1] * (len(ids) - start)

    def stops(self) -> set[int]:
        """Tokens that end an answer: the tokenizer's, and the special one that its chat template puts after a turn."""
        stops = {self.tokenizer.eos_token_id}
        if self.template:
            turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
            ids = self.tokenizer.apply_chat_template(turn, chat_template=self.template, return_dict=True)["input_ids"]
            last = next((token for token in reversed(ids) if self.tokenizer.decode([token]).strip()), None)
            stops |= {last} & set(self.tokenizer.all_special_ids)
        return stops - {None}

    def round_trip(self, example: Example) -> str | None:
        """In which way the tokens of `example` are not what was written, or not what the model is asked; else None."""
        example = suited(example, self.tokenizer)
        if example.format != "messages":
            keys = ("text",) if example.format == "text" else ("prompt", "completion")
            written = "".join(example.content[key] for key in keys)
            ids = self.tokenizer(written)["input_ids"]
            return None if _tight(written) in _tight(self.tokenizer.decode(ids)) else "its tokens are another text"
        messages = example.content["messages"]
        options = {"tools": example.content.get("tools")}
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        start = 0
        for number, message in enumerate(messages):
            said = (message.get("content") or "").strip()
            if (found := text.find(said, start)) < 0:
                return f"the chat template does not render messages[{number}] as it was written"
            start = found + len(said)
        ids = self.tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]
        if _tight(self.tokenizer.decode(ids)) != _tight(text):
            return "its tokens are another text"
        try:
            asked = prompt_tokens(self.tokenizer, example)
        except TemplateError as error:
            return f"the chat template refuses it without its answer: {error}"
        same = common_prefix_length(asked, ids) == len(asked)
        return None if same else "the model is asked with another beginning than it learns"


def answering(tokenizer: Any) -> Callable[[Example], Sequence]:
    """How examples become tokens of which only the expected answer carries loss, and of a text all; of any format."""

    @cache
    def of(kind: Kind) -> Tokenisation:
        return Tokenisation(tokenizer, {kind}, "all" if kind == "text" else "completion")

    return lambda example: of(example.format)(example)


def require_chat_template(tokenizer: Any) -> None:
    """Raises BadInput without a chat template."""
    if not tokenizer.chat_template:
        raise BadInput(
            "dataset: messages need a chat template and the model's tokenizer has none: "
            "use an instruction-tuned model, add a chat_template, or write prompts and completions"
        )


def suited(example: Example, tokenizer: Any) -> Example:
    """An instruction is a chat for models that have a chat template, and a prompt for others."""
    if example.format != "instruction":
        return example
    return example.as_chat() if tokenizer.chat_template else example.as_prompt()


def _tight(text: str) -> str:
    """Without white space, which some tokenizers add at the start or join."""
    return "".join(text.split())


def _chosen_template(tokenizer: Any) -> str:
    template = tokenizer.chat_template
    return template["default"] if isinstance(template, dict) else template


def prompt_tokens(tokenizer: Any, example: Example) -> list[int]:
    """Tokens of `example` up to where the model is to answer; of a text, none but the first."""
    example = suited(example, tokenizer)
    if example.format == "messages":
        rendered = tokenizer.apply_chat_template(
            example.content["messages"][:-1],
            tools=example.content.get("tools"),
            add_generation_prompt=True,
            return_dict=True,
        )
        return rendered["input_ids"]
    if example.format == "text":
        return tokenizer(example.content["text"])["input_ids"][:1]
    return tokenizer(example.content["prompt"])["input_ids"]


def marked(sequence: Sequence, tokenizer: Any) -> str:
    """An example as the model sees it, what carries loss in ⟦brackets⟧."""
    text, learning = "", False
    for token, label in zip(sequence.ids, sequence.labels, strict=True):
        if (label != NO_LOSS) != learning:
            text += "⟧" if learning else "⟦"
            learning = not learning
        text += tokenizer.decode([token])
    return f"{text}⟧" if learning else text


def log_samples(samples: Iterable[str], golden: Iterable[Example]) -> None:
    """Print the first examples as the model sees them, and the first golden answers: data in the log, so on request."""
    for number, text in enumerate(samples):
        log.info("example %d: %s", number, text)
    for number, example in enumerate(islice(golden, SAMPLES)):
        log.info("golden %d expects: %s", number, example.expected)


def cut(sequence: Sequence, max_length: int) -> Sequence | None:
    """The first `max_length` tokens; None where they have no token to learn."""
    shorter = Sequence(sequence.ids[:max_length], sequence.labels[:max_length], [min(len(sequence.ids), max_length)])
    return shorter if shorter.loss_tokens else None


class Extents:
    """How long many examples are and where in them loss lies: 12 bytes of each, and 8 for each of its answers."""

    def __init__(self) -> None:
        self._lengths = array("i")
        self._times = array("i")
        self._answers = array("i")  # how many runs of loss an example has
        self._runs = array("i")  # where each begins and ends

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, sequence: Sequence, times: int = 1) -> None:
        """Another example, `times` times."""
        carrying = np.zeros(len(sequence.ids) + 1, np.int8)
        carrying[1:-1] = np.asarray(sequence.labels[1:]) != NO_LOSS  # nothing predicts the first token
        edges = np.flatnonzero(np.diff(carrying)) + 1
        self._lengths.append(len(sequence.ids))
        self._times.append(times)
        self._answers.append(len(edges) // 2)
        self._runs.extend(edges.tolist())

    @property
    def times(self) -> np.ndarray:
        """How often each example is meant."""
        return np.asarray(self._times)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, as often as it is meant."""
        return np.repeat(np.asarray(self._lengths), self.times)

    def loss_tokens(self, max_length: int) -> np.ndarray:
        """Tokens that carry loss within the first `max_length`, of each example, as often as it is meant."""
        starts, ends = np.minimum(np.asarray(self._runs, np.int64).reshape(-1, 2), max_length).T
        example = np.repeat(np.arange(len(self)), np.asarray(self._answers, np.int64))
        counts = np.bincount(example, weights=ends - starts, minlength=len(self)).astype(np.int64)
        return np.repeat(counts, np.asarray(self._times))


def packed(lengths: np.ndarray, max_length: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Which sequences share a row of at most `max_length` tokens: their numbers, row after row, and where rows begin.

    Best fit decreasing, as TRL packs: none split, none cut, none lost. Which of equally long ones go together is mixed
    by `seed` (they would be neighbours in the file otherwise); how many rows there are depends on the lengths alone, so
    that what inspect counts is what train does.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    rows: list[list[int]] = []
    spaces: list[int] = []  # sizes of room that there are, in order
    open_rows: dict[int, deque[int]] = {}
    for number, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        best = bisect_left(spaces, length)
        if best == len(spaces):
            row, space = len(rows), max_length
            rows.append([])
        else:
            space = spaces[best]
            row = open_rows[space].popleft()
            if not open_rows[space]:
                del open_rows[space], spaces[best]
        rows[row].append(number)
        left = space - length
        if left:
            if left not in open_rows:
                open_rows[left] = deque()
                insort(spaces, left)
            open_rows[left].append(row)
    starts = np.cumsum([0, *map(len, rows)])
    return np.fromiter((number for row in rows for number in row), np.int64, len(lengths)), starts


def joined(sequences: list[Sequence]) -> Sequence:
    """One row of several sequences."""
    return Sequence(
        [token for sequence in sequences for token in sequence.ids],
        [label for sequence in sequences for label in sequence.labels],
        [length for sequence in sequences for length in sequence.lengths],
    )


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

    @property
    def pads(self) -> int:
        """Tokens that only fill rows up to the longest."""
        return self.ids.numel() - self.tokens


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
