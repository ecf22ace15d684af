"""The rows of a training on the work volume: tokenised, cut and packed once, read by every attempt and rank.

A directory holds what its key says (data, tokenizer, length, packing, loss, seed); another recipe has another one.
Rows are read from the files when they are asked for, so that they may be larger than memory, and several processes may
read them at once. A token is 4 bytes there; one that carries no loss is stored as its complement.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections.abc import Iterable
from collections.abc import Sequence as AbstractSequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from qlora_api.exchange import TrainOrder
from qlora_trainer.artifacts import combined_digest, digests_of, whole_directory
from qlora_trainer.data import Corpus, Findings, read_corpus
from qlora_trainer.environment import Pod, log
from qlora_trainer.failures import BadInput
from qlora_trainer.formats import Example, Mistake
from qlora_trainer.model import BaseModel
from qlora_trainer.sequences import (
    NO_LOSS,
    SAMPLES,
    Sequence,
    Tokenisation,
    answering,
    cut,
    joined,
    log_samples,
    marked,
    packed,
)

#: Of this layout and of how examples become tokens: another one is another directory.
VERSION = 2
_MANIFEST = "manifest.json"
_FLUSH_TOKENS = 1 << 20
_EVERY = 100_000


class Rows(AbstractSequence[Sequence]):
    """Rows of a training by their number."""

    def __init__(self, directory: Path, part: str) -> None:
        def mapped(name: str) -> np.ndarray:
            path = directory / f"{part}-{name}.npy"
            return np.load(path, mmap_mode="r")

        tokens = directory / f"{part}.tokens"
        self._tokens = np.memmap(tokens, np.int32, "r") if tokens.stat().st_size else np.empty(0, np.int32)
        self._starts, self._members, self._rows = mapped("starts"), mapped("members"), mapped("rows")

    def __len__(self) -> int:
        return len(self._rows) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        ends = np.concatenate([[0], np.cumsum(np.diff(self._starts)[self._members])])
        return np.diff(ends[self._rows])

    @overload
    def __getitem__(self, index: int) -> Sequence: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sequence]: ...
    def __getitem__(self, index: int | slice) -> Sequence | list[Sequence]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        members = self._members[self._rows[number] : self._rows[number + 1]]
        return joined([self._example(int(member)) for member in members])

    def _example(self, number: int) -> Sequence:
        stored = np.asarray(self._tokens[self._starts[number] : self._starts[number + 1]])
        carrying = stored >= 0
        ids = np.where(carrying, stored, ~stored).tolist()
        return Sequence(ids, np.where(carrying, stored, NO_LOSS).tolist(), [len(ids)])


@dataclass(frozen=True)
class Prepared:
    """What a training learns from and is looked at with."""

    train: Rows
    eval: Rows
    golden: list[Example]
    canary: list[Example]
    golden_rows: Rows
    canary_rows: Rows
    samples: list[str]
    """The first examples as the model sees them, what carries loss in ⟦brackets⟧."""
    examples: int
    digest: str
    """Over every file: equal for equal rows."""


def directory_of(order: TrainOrder) -> Path:
    """Where the rows of `order` lie, or will lie."""
    return Path(order.work_dir) / "prepared" / _key(order).removeprefix("sha256:")[:16]


def prepare(order: TrainOrder, pod: Pod, base: BaseModel) -> Path:
    """Where the rows of `order` are: as an earlier attempt has left them, or made now. For one process of many.

    Raises BadInput when the data is not what was inspected, or nothing in it is to be learned.
    """
    directory = directory_of(order)
    if fault := _fault(directory, _key(order)):
        if directory.is_dir():
            log.info("prepared data in %s is not used: %s", directory.name, fault)
        corpus = read_corpus(order.data, pod)
        if corpus.digest != order.data_digest:
            raise BadInput("dataset: the data has changed since inspection: put it back, or create a new job")
        _remove_others(directory)
        with whole_directory(directory) as partial:
            _write(partial, order, corpus, base)
    else:
        log.info("the data was tokenised and packed before, and is read from the work volume")
    if order.data.log_samples:
        prepared = open_prepared(directory)
        log_samples(prepared.samples, prepared.golden)
    return directory


def open_prepared(directory: Path) -> Prepared:
    """What `prepare` has left in `directory`; read only, for as many processes as there are."""
    manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
    return Prepared(
        train=Rows(directory, "train"),
        eval=Rows(directory, "eval"),
        golden=_read_examples(directory / "golden.jsonl"),
        canary=_read_examples(directory / "canary.jsonl"),
        golden_rows=Rows(directory, "golden"),
        canary_rows=Rows(directory, "canary"),
        samples=json.loads((directory / "samples.json").read_text(encoding="utf-8")),
        examples=manifest["examples"],
        digest=combined_digest(manifest["files"]),
    )


def _key(order: TrainOrder) -> str:
    """Everything that decides what the rows are; `sha256:…`."""
    unbound = {"secret"}
    kinds = ("eval", "golden", "canary")
    data = order.data.model_dump(
        mode="json", exclude={"train": {"__all__": unbound}, "log_samples": True, **dict.fromkeys(kinds, unbound)}
    )
    recipe = order.recipe
    deciding = {
        "version": VERSION, "data": data, "dataDigest": order.data_digest, "modelDigest": order.model_digest,
        "maxLength": recipe.max_length, "packing": recipe.packing, "loss": recipe.loss, "seed": recipe.seed,
    }  # fmt: skip
    return f"sha256:{hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()}"


def _fault(directory: Path, key: str) -> str | None:
    """Why the directory cannot be used; None where it can."""
    try:
        manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"no manifest ({error})"
    if manifest.get("key") != key:
        return "it belongs to another model, data set or recipe"
    found = digests_of(directory)
    found.pop(_MANIFEST, None)
    return None if found == manifest.get("files") else "its files are not those of its manifest"


def _remove_others(directory: Path) -> None:
    """Give back the room of rows that no attempt will read again, laid out by an earlier version of the trainer."""
    others = [other for other in directory.parent.glob("*") if other != directory]
    for other in others:
        log.info("removing %s: its rows are of another recipe, or of an earlier version of the trainer", other.name)
        shutil.rmtree(other)


def _write(directory: Path, order: TrainOrder, corpus: Corpus, base: BaseModel) -> None:
    recipe = order.recipe
    tokenise = Tokenisation(base.tokenizer, corpus.formats, recipe.loss)
    limit = {"max_length": recipe.max_length, "packing": recipe.packing, "seed": recipe.seed}
    samples: list[str] = []

    def shown(sequence: Sequence) -> Sequence:
        if len(samples) < SAMPLES:
            samples.append(marked(sequence, base.tokenizer))
        return sequence

    found = ((where, example, times) for where, example, times in corpus.train.counted())
    if not _write_part(directory, "train", found, lambda example: shown(tokenise(example)), **limit):
        raise BadInput("dataset: no token carries loss: there is nothing to learn")
    _write_part(directory, "eval", corpus.eval.counted(), tokenise, **limit)
    for name, examples in (("golden", corpus.golden), ("canary", corpus.canary)):
        with (directory / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in examples)
        _write_part(directory, name, examples.counted(), answering(base.tokenizer), **limit | {"packing": False})
    (directory / "samples.json").write_text(json.dumps(samples, indent=2, ensure_ascii=False), encoding="utf-8")
    manifest = {"key": _key(order), "examples": len(corpus.train), "files": digests_of(directory)}
    (directory / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _write_part(
    directory: Path,
    part: str,
    examples: Iterable[tuple[str, Example, int]],
    tokenise: Any,
    *,
    max_length: int,
    packing: bool,
    seed: int,
) -> int:
    """Tokens of each example once, then rows of them; returns how many rows. What has nothing to learn is left out."""
    lengths, times = array("q"), array("i")
    findings = Findings()
    with (directory / f"{part}.tokens").open("wb") as file:
        pending = array("i")
        for number, (where, example, repeated) in enumerate(examples, start=1):
            try:
                sequence = cut(tokenise(example), max_length)
            except Mistake as mistake:
                findings.mistake(where, mistake)
                continue
            if number % _EVERY == 0:
                log.info("%s: %d examples tokenised", part, number)
            if sequence is None:
                continue
            lengths.append(len(sequence.ids))
            times.append(repeated)
            pending.extend(
                token if label != NO_LOSS else ~token
                for token, label in zip(sequence.ids, sequence.labels, strict=True)
            )
            if len(pending) >= _FLUSH_TOKENS:
                pending.tofile(file)
                del pending[:]
        pending.tofile(file)
    findings.refuse()
    numbers = np.repeat(np.arange(len(lengths)), np.asarray(times, np.int64))
    if packing:
        order, starts = packed(np.asarray(lengths, np.int64)[numbers], max_length, seed=seed)
        members = numbers[order]
    else:
        members, starts = numbers, np.arange(len(numbers) + 1)
    np.save(directory / f"{part}-starts.npy", np.cumsum([0, *lengths]))
    np.save(directory / f"{part}-members.npy", members.astype(np.int64))
    np.save(directory / f"{part}-rows.npy", starts.astype(np.int64))
    return len(starts) - 1


def _read_examples(path: Path) -> list[Example]:
    with path.open(encoding="utf-8", newline="\n") as lines:  # texts hold other ends of lines, such as U+2028
        return [Example(**json.loads(line)) for line in lines]
