from __future__ import annotations

import random

import pytest

from qlora_trainer.duplicates import SIMILAR, near
from qlora_trainer.formats import Example


def said(text: str, *, system: str = "") -> tuple[str, Example]:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    return text[:10], Example(
        "messages", {"messages": [*([{"role": "system", "content": system}] if system else []), *turns]}
    )


def words(seed: int, count: int) -> list[str]:
    return [f"w{random.Random(seed * 1000 + n).randrange(10**6)}" for n in range(count)]


@pytest.mark.parametrize(("changed", "found"), [(0, True), (1, True), (2, True), (12, False), (60, False)])
def test_examples_with_few_other_words_are_near(changed: int, found: bool) -> None:
    """Of 60 words, each that is changed touches three runs: 2 leave a similarity of 0.82, 12 one of 0.25."""
    text = words(1, 60)
    other = [f"x{n}" if n % (60 // max(1, changed)) == 0 and n // (60 // max(1, changed)) < changed else w
             for n, w in enumerate(text)]  # fmt: skip
    repeated, leaked = near([said(" ".join(text))], [said(" ".join(other).upper())])
    assert (repeated, bool(leaked)) == ([], found)


def test_of_several_that_are_alike_all_but_the_first_count() -> None:
    text = " ".join(words(2, 50))
    repeated, _ = near([said(f"{n} {text}") for n in range(4)] + [said(" ".join(words(3, 50)))], [])
    assert [where[0] for where in repeated] == ["1", "2", "3"]


def test_a_system_message_that_all_share_makes_no_neighbours() -> None:
    shared = " ".join(words(4, 500))
    assert near([said(" ".join(words(n, 8)), system=shared) for n in range(5, 15)], []) == ([], [])


def test_short_examples_are_compared_by_what_they_have() -> None:
    assert near([said("a carp?"), said("a trout?")], [said("A  CARP?")]) == ([], ["A  CARP?"])


def test_the_estimate_finds_what_the_true_similarity_finds() -> None:
    """Against the sets themselves: all pairs well above the bound are found, none well below it."""
    found = {True: 0, False: 0}
    for seed in range(60):
        text, changed = words(seed, 80), seed % 20
        other = [f"x{n}" if n < changed else word for n, word in enumerate(text)]
        runs = [{tuple(part[n : n + 3]) for n in range(len(part) - 2)} for part in ([*text, "yes"], [*other, "yes"])]
        true = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
        _, leaked = near([said(" ".join(text))], [said(" ".join(other))])
        if abs(true - SIMILAR) > 0.12:
            assert bool(leaked) == (true > SIMILAR), true
            found[bool(leaked)] += 1
    assert min(found.values()) > 5
