"""Examples that are nearly the same, by MinHash: estimated Jaccard similarity of their three-word runs.

Broder 1997, "On the resemblance and containment of documents"; found through bands of hashes (locality-sensitive
hashing), then confirmed by the signatures. System messages are left out: many examples share one.

Of a signature one byte of each hash is kept (Li and König 2010, "b-Bit Minwise Hashing"): hashes that differ agree in
it once in 256 times, which moves a similarity of 0.8 by less than 0.001. 10,000 examples of 150 words take 1.7 s of a
CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from zlib import crc32

import numpy as np
from datasketch import MinHash

from qlora_api.findings import COMPARED_EXAMPLES
from qlora_trainer.formats import Example

#: So many training examples are compared with one another, the first ones, and so many held-out ones with all training
#: examples there are: 192 bytes of each training example (0.36 GiB), 320 of a held-out one.
COMPARED_MAX = COMPARED_EXAMPLES
#: From this similarity on two examples count as nearly the same.
SIMILAR = 0.8
_RUN_WORDS = 3
#: 16 bands of 8 hashes: of pairs that are 0.8 alike 95 % are found, of pairs that are 0.5 alike 6 % are looked at.
_BANDS, _ROWS = 16, 8
_HASHES = _BANDS * _ROWS
#: Of many examples that share a band, each is compared with so many: with all, ten thousand that were written by one
#: template would make fifty million pairs.
_NEIGHBOURS = 8
_CHUNK = 4096
_PAIRS_AT_ONCE = 1 << 15
_FIRST = MinHash(num_perm=_HASHES, seed=1, hashfunc=crc32)  # drawing its permutations takes as long as using them

Placed = Iterable[tuple[str, Example]]


@dataclass(frozen=True)
class Found:
    """How many examples, and where the first of them is."""

    count: int = 0
    first: str | None = None


@dataclass(frozen=True)
class Comparison:
    """What near duplicates there are: training examples with one like them before, held-out ones with one in training.

    `left_out` are examples that were too many to be compared.
    """

    repeated: Found
    leaked: Found
    left_out: Found


class Signatures:
    """What is kept of many examples: a hash of each band, and a byte of each hash."""

    def __init__(self, examples: Iterable[Example] = ()) -> None:
        self._bands, self._bytes = bytearray(), bytearray()
        for example in examples:
            hashes = _hashes(example)
            bands = [crc32(band.tobytes()) for band in hashes.reshape(_BANDS, _ROWS)]
            self._bands += np.array(bands, np.uint32).tobytes()
            self._bytes += hashes.astype(np.uint8).tobytes()

    def __len__(self) -> int:
        return len(self._bytes) // _HASHES

    def extend(self, other: Signatures, most: int) -> None:
        """Take in the first of `other`, until there are `most`."""
        room = most - len(self)
        self._bands += other.bands[:room].tobytes()
        self._bytes += other.bytes[:room].tobytes()

    @property
    def bands(self) -> np.ndarray:
        return np.frombuffer(self._bands, np.uint32).reshape(-1, _BANDS)

    @property
    def bytes(self) -> np.ndarray:
        return np.frombuffer(self._bytes, np.uint8).reshape(-1, _HASHES)

    def repeated(self) -> np.ndarray:
        """Which of them have one like them before. Of many that share a band, the nearest and the first are asked."""
        found, place = np.zeros(len(self), bool), np.arange(len(self))
        for band in self.bands.T:
            order = np.argsort(band, kind="stable")
            begins = np.ones(len(self), bool)
            begins[1:] = np.diff(band[order]) != 0
            first = np.maximum.accumulate(np.where(begins, place, 0))
            for distance in range(1, _NEIGHBOURS + 1):
                later = np.flatnonzero(place - first >= distance)
                before = later - distance if distance < _NEIGHBOURS else first[later]
                _mark(found, order[later], self.bytes, order[before], self.bytes)
        return found


class Index:
    """Signatures to be found by their bands, and which of them have been found to be like another example."""

    def __init__(self, signatures: Signatures) -> None:
        self._bytes = signatures.bytes
        self._orders = [np.argsort(band, kind="stable").astype(np.uint32) for band in signatures.bands.T]
        self._bands = [band[order] for band, order in zip(signatures.bands.T, self._orders, strict=True)]
        self.found = np.zeros(len(signatures), bool)
        self._asked = 0

    def compare(self, others: Signatures) -> None:
        """Note those that one of `others` is like. Of many that share a band, each of the others is held to a few."""
        numbers = np.arange(len(others)) + self._asked
        self._asked += len(others)
        for band, known, order in zip(others.bands.T, self._bands, self._orders, strict=True):
            begin, end = (np.searchsorted(known, band, side) for side in ("left", "right"))
            there = end - begin
            for distance in range(_NEIGHBOURS):
                asking = np.flatnonzero(there > distance)
                # the next one begins where this one ended, so that all have their turn
                turn = (numbers[asking] * _NEIGHBOURS + distance) % there[asking]
                turn = np.where(there[asking] > _NEIGHBOURS, turn, distance)
                _mark(self.found, order[begin[asking] + turn], self._bytes, asking, others.bytes)


def _mark(found: np.ndarray, ours: np.ndarray, of_ours: np.ndarray, theirs: np.ndarray, of_theirs: np.ndarray) -> None:
    """Set in `found` which of `ours` are like the one of `theirs` beside them."""
    fresh = np.flatnonzero(~found[ours])
    for start in range(0, len(fresh), _PAIRS_AT_ONCE):
        pairs = fresh[start : start + _PAIRS_AT_ONCE]
        same = (of_ours[ours[pairs]] == of_theirs[theirs[pairs]]).mean(axis=1)
        found[ours[pairs[same >= SIMILAR]]] = True


def _hashes(example: Example) -> np.ndarray:
    words = example.words(without_system=True)
    runs = {" ".join(words[start : start + _RUN_WORDS]) for start in range(max(1, len(words) - _RUN_WORDS + 1))}
    found = _FIRST.copy()
    found.update_batch([run.encode() for run in runs])
    return np.asarray(found.hashvalues, np.uint32)


def near(train: Callable[[], Placed], held_out: Callable[[], Placed]) -> Comparison:
    """Which examples are nearly the same, of the first `COMPARED_MAX` of both; each is read once, and to find a place.

    All training examples go past the held-out ones, for those that are held in memory are the held-out.
    """
    apart = iter(held_out())
    index = Index(Signatures(example for _, example in islice(apart, COMPARED_MAX)))
    not_held = sum(1 for _ in apart)
    seen, count = Signatures(), 0
    examples = (example for _, example in train())
    while chunk := Signatures(islice(examples, _CHUNK)):
        count += len(chunk)
        index.compare(chunk)
        seen.extend(chunk, COMPARED_MAX)
    left = count - len(seen)
    first = _place(train, len(seen)) if left else _place(held_out, COMPARED_MAX) if not_held else None
    return Comparison(_found(seen.repeated(), train), _found(index.found, held_out), Found(left + not_held, first))


def _found(which: np.ndarray, of: Callable[[], Placed]) -> Found:
    count = int(which.sum())
    return Found(count, _place(of, int(np.argmax(which)))) if count else Found()


def _place(of: Callable[[], Placed], number: int) -> str:
    return next(islice(of(), number, None))[0]
