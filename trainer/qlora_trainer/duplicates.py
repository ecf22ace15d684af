"""Examples that are nearly the same, by MinHash: estimated Jaccard similarity of their three-word runs.

Broder 1997, "On the resemblance and containment of documents"; found through bands of hashes (locality-sensitive
hashing), then confirmed by the whole signature. System messages are left out: many examples share one.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from itertools import islice

import numpy as np
from datasketch import MinHash, MinHashLSH

from qlora_trainer.formats import Example

#: So many training examples are compared with one another, the first ones: 0.12 GiB and 23 s of a CPU, measured
#: with 10,000 of 150 words.
COMPARED_MAX = 50_000
#: From this similarity on two examples count as nearly the same.
SIMILAR = 0.8
_RUN_WORDS = 3
#: 16 bands of 8 hashes: of pairs that are 0.8 alike 95 % are found, of pairs that are 0.5 alike 6 % are looked at.
_BANDS, _ROWS = 16, 8
_HASHES = _BANDS * _ROWS


class Neighbours:
    """The training examples seen so far, to be asked for one like another."""

    def __init__(self) -> None:
        self._index = MinHashLSH(num_perm=_HASHES, params=(_BANDS, _ROWS))
        self._signatures: dict[Hashable, np.ndarray] = {}

    def like(self, example: Example) -> bool:
        """Whether one of those seen is nearly the same."""
        return self._like(_signature(example))

    def _like(self, found: MinHash) -> bool:
        """A row is equal in as large a share of hashes as the two examples are alike."""
        return any(
            float(np.mean(self._signatures[number] == _values(found))) >= SIMILAR for number in self._index.query(found)
        )

    def add(self, example: Example) -> bool:
        """Take `example` in; returns whether one like it was there."""
        found = _signature(example)
        there = self._like(found)
        self._index.insert(len(self._signatures), found, check_duplication=False)
        self._signatures[len(self._signatures)] = _values(found)
        return there


def _signature(example: Example) -> MinHash:
    words = example.words(without_system=True)
    runs = {" ".join(words[start : start + _RUN_WORDS]) for start in range(max(1, len(words) - _RUN_WORDS + 1))}
    found = MinHash(num_perm=_HASHES, seed=1)
    found.update_batch([run.encode() for run in runs])
    return found


def _values(found: MinHash) -> np.ndarray:
    return np.asarray(found.hashvalues, dtype=np.uint32)


def near(train: Iterable[tuple[str, Example]], held_out: Iterable[tuple[str, Example]]) -> tuple[list[str], list[str]]:
    """Places of the training examples that have one like them before, and of held-out ones that have one in training.

    Looks at the first `COMPARED_MAX` of each.
    """
    seen = Neighbours()
    repeated = [where for where, example in islice(train, COMPARED_MAX) if seen.add(example)]
    leaked = [where for where, example in islice(held_out, COMPARED_MAX) if seen.like(example)]
    return repeated, leaked
