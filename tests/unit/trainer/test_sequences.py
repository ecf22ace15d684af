from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.data_utils import pack_dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from qlora_trainer.data import read_corpus
from qlora_trainer.evaluation import summed_loss
from qlora_trainer.failures import BadInput
from qlora_trainer.formats import parse_line
from qlora_trainer.sequences import NO_LOSS, Extents, Sequence, Tokenisation, batches, collate, cut, joined, packed

from .conftest import Place, examples

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def tokenised(place: Place, tokenizer: Any) -> list[Sequence]:
    corpus = read_corpus(place.data(), place.pod)
    return [Tokenisation(tokenizer, {"messages"}, None)(example) for example in corpus.train]


def pack(sequences: list[Sequence], max_length: int, seed: int = 0) -> list[Sequence]:
    members, rows = packed(np.array([len(sequence.ids) for sequence in sequences]), max_length, seed=seed)
    return [joined([sequences[number] for number in members[start:end]]) for start, end in pairwise(rows)]


def learned(tokenizer: Any, sequence: Sequence) -> str:
    return tokenizer.decode([label for label in sequence.labels if label != NO_LOSS])


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (None, "one<|end|>two<|end|>"),
        ("assistant", "one<|end|>two<|end|>"),
        ("completion", "two<|end|>\n"),
    ],
)
def test_what_carries_loss_in_messages(tokenizer: Any, loss: Any, text: str) -> None:
    line = (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one"},'
        b'{"role": "user", "content": "b"}, {"role": "assistant", "content": "two"}]}'
    )
    assert learned(tokenizer, Tokenisation(tokenizer, {"messages"}, loss)(parse_line(line, None)[0])) == text


def test_what_carries_loss_in_prompts_and_completions(tokenizer: Any) -> None:
    example = parse_line(b'{"prompt": "a sparrow is a ", "completion": "bird"}', None)[0]
    assert learned(tokenizer, Tokenisation(tokenizer, {"prompt-completion"}, None)(example)) == "bird<|end|>"
    whole = Tokenisation(tokenizer, {"prompt-completion"}, "all")(example)
    assert learned(tokenizer, whole) == "a sparrow is a bird<|end|>"
    assert whole.loss_tokens == len(whole.ids) - 1  # nothing predicts the first
    with pytest.raises(BadInput, match="use completion"):
        Tokenisation(tokenizer, {"prompt-completion"}, "assistant")


def test_templates_that_cannot_teach_an_assistant_are_refused(model_dir: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    marked = tokenizer.chat_template
    tokenizer.chat_template = marked.replace(
        "+ '<|end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|end|>' }}"
    )
    with pytest.raises(BadInput, match="never learn to stop"):
        Tokenisation(tokenizer, {"messages"}, "assistant")
    tokenizer.chat_template = marked.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(BadInput, match=r"\{% generation %\} marks"):
        Tokenisation(tokenizer, {"messages"}, "assistant")
    Tokenisation(tokenizer, {"messages"}, "completion")
    tokenizer.chat_template = None
    with pytest.raises(BadInput, match="need a chat template"):
        Tokenisation(tokenizer, {"messages"}, "all")


def test_tokens_and_labels_are_those_of_trl(place: Place, tokenizer: Any, model: Any, tmp_path: Path) -> None:
    config = SFTConfig(
        output_dir=str(tmp_path / "trl"), assistant_only_loss=True, max_length=128, use_cpu=True, shuffle_dataset=False
    )
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(examples()), processing_class=tokenizer
    )
    theirs: Any = trainer.train_dataset
    ours = tokenised(place, tokenizer)
    assert [sequence.ids for sequence in ours] == list(theirs["input_ids"])
    assert [sequence.labels for sequence in ours] == list(theirs["labels"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=60), st.integers(0, 5))
def test_packing_loses_and_splits_nothing(lengths: list[int], seed: int) -> None:
    sequences = [
        Sequence([number] * length, [NO_LOSS, *[number] * (length - 1)], [length])
        for number, length in enumerate(lengths)
    ]
    rows = pack(sequences, 40, seed=seed)
    assert all(len(row.ids) == len(row.labels) == sum(row.lengths) <= 40 for row in rows)
    parts: list[tuple[list[int], list[int]]] = []
    for row in rows:
        start = 0
        for length in row.lengths:
            parts.append((row.ids[start : start + length], row.labels[start : start + length]))
            start += length
    assert sorted(parts) == sorted((sequence.ids, sequence.labels) for sequence in sequences)
    assert len(rows) == len(pack(sequences, 40, seed=seed + 1)), "inspect could not tell how many rows train has"
    assert sum(row.loss_tokens for row in rows) == sum(sequence.loss_tokens for sequence in sequences)
    theirs = pack_dataset(Dataset.from_dict({"input_ids": [sequence.ids for sequence in sequences]}), 40, "bfd")
    assert sorted(sorted(row.lengths) for row in rows) == sorted(sorted(row) for row in theirs["seq_lengths"])


@pytest.mark.parametrize("flat", [False, True])
def test_packed_examples_do_not_see_one_another(place: Place, tokenizer: Any, model: Any, flat: bool) -> None:
    sequences = tokenised(place, tokenizer)
    rows = pack(sequences, 128)
    assert len(rows) < len(sequences) / 2
    with torch.no_grad():
        alone = sum(float(summed_loss(model, collate([sequence], pad=0), CPU)) for sequence in sequences)
        together = float(summed_loss(model, collate(rows, pad=0, flat=flat), CPU))
    assert together == pytest.approx(alone, rel=1e-5)


def test_the_loss_is_the_models_own(place: Place, tokenizer: Any, model: Any) -> None:
    sequence = tokenised(place, tokenizer)[3]
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([sequence.ids]), labels=torch.tensor([sequence.labels])).loss
        ours = summed_loss(model, collate([sequence], pad=0), CPU) / sequence.loss_tokens
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_cutting_drops_what_has_nothing_left_to_learn() -> None:
    assert cut(Sequence([1] * 8, [NO_LOSS] * 6 + [1] * 2, [8]), 4) is None
    assert cut(Sequence([2] * 8, [NO_LOSS] * 2 + [2] * 6, [8]), 4) == Sequence([2] * 4, [NO_LOSS, NO_LOSS, 2, 2], [4])


@given(st.lists(st.tuples(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 3))), st.integers(1, 35))
def test_extents_know_what_cutting_would_leave(rows: list[tuple[list[bool], int]], max_length: int) -> None:
    extents = Extents()
    expected: list[int] = []
    for carrying, times in rows:
        sequence = Sequence([5] * len(carrying), [5 if carries else NO_LOSS for carries in carrying], [len(carrying)])
        extents.add(sequence, times)
        shorter = cut(sequence, max_length)
        expected += [shorter.loss_tokens if shorter else 0] * times
    assert extents.loss_tokens(max_length).tolist() == expected
    assert extents.lengths.tolist() == [len(carrying) for carrying, times in rows for _ in range(times)]


@given(st.integers(1, 50), st.integers(1, 12), st.integers(0, 2**31), st.integers(0, 30))
def test_every_epoch_sees_every_sequence_once_wherever_it_is_resumed(
    count: int, batch_size: int, seed: int, start: int
) -> None:
    per_epoch = -(-count // batch_size)
    stop = 3 * per_epoch
    dealt = list(batches(count, batch_size, seed, start=0, stop=stop))
    for epoch in range(3):
        seen = [number for batch in dealt[epoch * per_epoch : (epoch + 1) * per_epoch] for number in batch]
        assert sorted(seen) == list(range(count))
    assert list(batches(count, batch_size, seed, start=min(start, stop), stop=stop)) == dealt[min(start, stop) :]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second = batches(50, 50, 3, start=0, stop=2)
    (other,) = batches(50, 50, 4, start=0, stop=1)
    assert first != second
    assert first != other
