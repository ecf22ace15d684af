"""The rows on the work volume are those that inspect counted, made once, and the same for whoever reads them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_api.exchange import DataSource, TrainOrder
from qlora_trainer import prepared
from qlora_trainer.failures import BadInput
from qlora_trainer.formats import Example
from qlora_trainer.inspection import inspect
from qlora_trainer.model import BaseModel, open_base
from qlora_trainer.prepared import VERSION, Prepared, Rows, directory_of, open_prepared, prepare
from qlora_trainer.sequences import Sequence, Tokenisation, cut

from .conftest import KIND, THINGS, Place, chat, examples, recipe_of, write_jsonl


def base_of(place: Place) -> BaseModel:
    return open_base(place.claims / "base" / "model", "pvc://base/model")


def made(place: Place, order: TrainOrder) -> Prepared:
    return open_prepared(prepare(order, place.pod, base_of(place)))


def parts(rows: Rows) -> Counter[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The examples in `rows`, however they are packed."""
    found: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for row in rows:
        start = 0
        for length in row.lengths:
            found[tuple(row.ids[start : start + length]), tuple(row.labels[start : start + length])] += 1
            start += length
    return found


def tokens_of(place: Place, rows: list[dict[str, Any]], max_length: int = 128) -> Counter[Any]:
    tokenise = Tokenisation(AutoTokenizer.from_pretrained(place.claims / "base" / "model"), {"messages"}, None)
    sequences = [cut(tokenise(Example("messages", row)), max_length) for row in rows]
    return Counter((tuple(row.ids), tuple(row.labels)) for row in sequences if row)


@pytest.mark.parametrize("packing", [True, False])
def test_rows_hold_every_example_and_are_those_that_inspect_counted(place: Place, packing: bool) -> None:
    data = place.data(eval_fraction=0.2)
    order = place.train_order(data, {"packing": packing})
    found = made(place, order)
    seen = inspect(place.inspect_order(data, max_length=128, packing=packing), place.pod)
    assert len(found.train) == seen.sequences
    assert parts(found.train) + parts(found.eval) == tokens_of(place, examples())
    assert parts(found.eval).total() == seen.eval_examples > 0
    for rows in (found.train, found.eval, found.golden_rows, found.canary_rows):
        assert rows.lengths.tolist() == [len(row.ids) for row in rows]
    assert found.examples == seen.examples
    assert [example.expected for example in found.golden] == [KIND[thing] for thing in THINGS]
    assert all(isinstance(row, Sequence) and len(row.ids) <= 128 for row in found.train)


def test_a_second_attempt_and_another_rank_read_what_the_first_one_made(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = place.train_order(place.data(eval_fraction=0.2))
    first = made(place, order)
    write_jsonl(place.claims / "data" / "train.jsonl", [])  # it is not asked again
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "Tokenisation", lambda *_: pytest.fail("tokenised again"))
        again = made(place, order.model_copy(update={"attempt": 2, "micro_batch_size": 1}))
    other_rank = open_prepared(directory_of(order))
    for rows in (again, other_rank):
        assert list(rows.train) == list(first.train)
        assert list(rows.eval) == list(first.eval)
        assert (rows.golden, rows.digest, rows.samples) == (first.golden, first.digest, first.samples)


def test_the_same_order_gives_the_same_rows_on_another_volume(place: Place) -> None:
    order = place.train_order()
    elsewhere = order.model_copy(update={"work_dir": str(place.root / "other")})
    assert made(place, order).digest == made(place, elsewhere).digest


@pytest.mark.parametrize("change", [{"seed": 8}, {"packing": False}, {"max_length": 64}, {"loss": "all"}])
def test_another_recipe_has_other_rows(place: Place, change: dict[str, Any]) -> None:
    first, other = place.train_order(), place.train_order(recipe=change)
    assert directory_of(first) != directory_of(other)
    assert list(made(place, first).train) != list(made(place, other).train)


def test_rows_of_an_earlier_layout_do_not_stay(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    order = place.train_order()
    now = VERSION
    monkeypatch.setattr("qlora_trainer.prepared.VERSION", now - 1)
    made(place, order)
    monkeypatch.setattr("qlora_trainer.prepared.VERSION", now)
    made(place, order)
    assert list((place.work / "prepared").iterdir()) == [directory_of(order)]


def test_damaged_rows_are_made_anew(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    order = place.train_order()
    first = made(place, order)
    rows, path = list(first.train), directory_of(order) / "train.tokens"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    assert list(made(place, order).train) == rows
    assert "its files are not those of its manifest" in caplog.text


def test_known_answers_may_hold_other_ends_of_lines(place: Place) -> None:
    question, answer = "A\u2028carp?", "fi\u0085sh"
    write_jsonl(place.claims / "data" / "golden.jsonl", [chat(question, answer)] * 2)
    found = made(place, place.train_order(place.data()))
    assert [example.expected for example in found.golden] == [answer] * 2


def test_data_that_was_changed_is_not_prepared(place: Place) -> None:
    order = place.train_order()
    write_jsonl(place.claims / "data" / "golden.jsonl", [chat("A carp?", "fish")])
    with pytest.raises(BadInput, match="dataset: the data has changed since inspection"):
        made(place, order)
    assert not directory_of(order).exists()
    assert not list((place.work / "prepared").glob("*"))


def test_weights_say_how_often_examples_occur(place: Place) -> None:
    general = [chat(f"How much is {n} and {n}?", str(2 * n)) for n in range(40)]
    write_jsonl(place.claims / "data" / "general.jsonl", general)
    sources = [
        DataSource(uri="pvc://data/train.jsonl", weight=2),
        DataSource(uri="pvc://data/general.jsonl", weight=0.25),
    ]
    data = place.data(train=sources)
    order = place.train_order(data)
    found = made(place, order)
    seen = inspect(place.inspect_order(data, max_length=128), place.pod)
    assert found.examples == seen.examples == 2 * 48 + 10
    assert len(found.train) == seen.sequences
    ours, theirs = tokens_of(place, examples()), tokens_of(place, general)
    counts = parts(found.train)
    assert {counts[example] for example in ours} == {2}
    assert sorted(counts[example] for example in theirs) == [0] * 30 + [1] * 10

    write_jsonl(place.claims / "data" / "general.jsonl", general[::-1])
    assert {example for example in parts(made(place, place.train_order(data)).train) if example in theirs} == {
        example for example in theirs if counts[example]
    }, "which of them are taken follows from the examples, not from their order"


def test_the_first_examples_are_kept_as_the_model_sees_them(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    samples = made(place, place.train_order()).samples
    assert len(samples) == 5
    assert samples[0] == "<|start|>user\nWhat is a sparrow?<|end|>\n<|start|>assistant\n⟦bird<|end|>⟧\n"
    assert "sparrow" not in caplog.text
    made(place, place.train_order(place.data(log_samples=True)))
    assert samples[0] in caplog.text


WITHIN_LIMIT = """
import json, resource, sys
from pathlib import Path
from qlora_api.exchange import InspectOrder, TrainOrder
from qlora_trainer.environment import Pod, prepare_process, quiet_libraries
from qlora_trainer.interruption import Interruption
prepare_process()
import qlora_trainer.duplicates
from qlora_trainer.evaluation import micro_batches
from qlora_trainer.inspection import inspect
from qlora_trainer.model import open_base
from qlora_trainer.prepared import open_prepared, prepare
quiet_libraries()
orders, claims, allowed = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
pod = Pod(Interruption(), claims)
base = open_base(Path(claims) / "base" / "model", "pvc://base/model")
used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + allowed, used + allowed))
seen = inspect(InspectOrder.model_validate(orders["inspect"]), pod)
order = TrainOrder.model_validate(orders["train"] | {"dataDigest": seen.data_digest, "modelDigest": seen.model_digest})
rows = open_prepared(prepare(order, pod, base)).train
assert len(rows) == seen.sequences
assert sum(batch.tokens for batch in micro_batches(rows, 1, pad=0, flat=False)) == seen.tokens.total
print(seen.tokens.total)
"""


@pytest.mark.soak
def test_data_may_be_larger_than_memory(place: Place) -> None:
    """72 MiB of text through inspect and prepare, with 40 MiB for all that they hold: its tokens take more, too."""
    config = place.claims / "base" / "model" / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 256', '"max_position_embeddings": 65536'))
    words = Tokenizer(models.WordLevel({"<|pad|>": 0, "<|end|>": 1}, unk_token="<|pad|>"))  # a quick one
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    quick = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<|pad|>", eos_token="<|end|>")
    quick.save_pretrained(config.parent)
    draw = random.Random(0)
    with (place.claims / "data" / "train.jsonl").open("w") as file:
        for _ in range(4608):
            file.write(json.dumps({"text": draw.randbytes(6900).hex(" ", 3)}) + "\n")
    data = place.data(golden=None)
    orders = {
        "inspect": place.inspect_order(data, max_length=32768, packing=False).model_dump(mode="json", by_alias=True),
        "train": TrainOrder(
            **place.envelope(), model_uri="pvc://base/model", model_digest="", data=data, data_digest="",
            recipe=recipe_of(max_length=32768, packing=False, loss="all"), micro_batch_size=1, gradient_accumulation=1,
            accelerator="cpu", checkpoint_every_seconds=1, checkpoint_keep=1,
        ).model_dump(mode="json", by_alias=True),
    }  # fmt: skip
    command = [sys.executable, "-c", WITHIN_LIMIT, json.dumps(orders), str(place.claims), str(40 << 20)]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stdout=subprocess.PIPE)
    assert ended.returncode == 0
    assert 4 * int(ended.stdout.splitlines()[-1]) > 40 << 20
