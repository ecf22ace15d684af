from __future__ import annotations

import random

import pytest

from qlora_trainer import duplicates
from qlora_trainer.duplicates import SIMILAR, Comparison, Found, near
from qlora_trainer.formats import Example


def said(text: str, *, system: str = "") -> tuple[str, Example]:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    return text[:10], Example(
        "messages", {"messages": [*([{"role": "system", "content": system}] if system else []), *turns]}
    )


def words(seed: int, count: int) -> list[str]:
    return [f"w{random.Random(seed * 1000 + n).randrange(10**6)}" for n in range(count)]


def compared(train: list[tuple[str, Example]], held_out: list[tuple[str, Example]]) -> Comparison:
    return near(lambda: train, lambda: held_out)


@pytest.mark.parametrize(("changed", "found"), [(0, True), (1, True), (2, True), (12, False), (60, False)])
def test_examples_with_few_other_words_are_near(changed: int, found: bool) -> None:
    """Of 60 words, each that is changed touches three runs: 2 leave a similarity of 0.82, 12 one of 0.25."""
    text = words(1, 60)
    other = [f"x{n}" if n % (60 // max(1, changed)) == 0 and n // (60 // max(1, changed)) < changed else w
             for n, w in enumerate(text)]  # fmt: skip
    seen = compared([said(" ".join(text))], [said(" ".join(other).upper())])
    assert (seen.repeated.count, bool(seen.leaked.count)) == (0, found)


def test_of_several_that_are_alike_all_but_the_first_count() -> None:
    text = " ".join(words(2, 50))
    train = [said(" ".join(words(3, 50)))] + [said(f"{n} {text}") for n in range(4)]
    assert compared(train, []).repeated == Found(3, train[2][0])


def test_a_system_message_that_all_share_makes_no_neighbours() -> None:
    shared = " ".join(words(4, 500))
    train = [said(" ".join(words(n, 8)), system=shared) for n in range(5, 15)]
    assert compared(train, train[:0]) == Comparison(Found(), Found(), Found())


def test_short_examples_are_compared_by_what_they_have() -> None:
    seen = compared([said("a carp?"), said("a trout?")], [said("A  CARP?")])
    assert seen == Comparison(Found(), Found(1, "A  CARP?"), Found())


def test_the_estimate_finds_what_the_true_similarity_finds() -> None:
    """Against the sets themselves: all pairs well above the bound are found, none well below it."""
    found = {True: 0, False: 0}
    for seed in range(60):
        text, changed = words(seed, 80), seed % 20
        other = [f"x{n}" if n < changed else word for n, word in enumerate(text)]
        runs = [{tuple(part[n : n + 3]) for n in range(len(part) - 2)} for part in ([*text, "yes"], [*other, "yes"])]
        true = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
        seen = compared([said(" ".join(text))], [said(" ".join(other))])
        if abs(true - SIMILAR) > 0.12:
            assert bool(seen.leaked.count) == (true > SIMILAR), true
            found[bool(seen.leaked.count)] += 1
    assert min(found.values()) > 5


def test_many_from_one_template_are_all_found_whichever_they_are() -> None:
    """They share bands with one another, and each is compared with a few of them only."""
    text = " ".join(words(6, 120))
    train = [said(f"{number:06} {text}") for number in range(600)]
    held_out = [said(f"{number:06} {text}") for number in range(9000, 9200)]
    assert compared(train, held_out) == Comparison(Found(599, train[1][0]), Found(200, held_out[0][0]), Found())


def test_the_whole_of_the_training_goes_past_what_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few are held in memory; what is not looked at is told."""
    monkeypatch.setattr(duplicates, "COMPARED_MAX", 20)
    monkeypatch.setattr(duplicates, "_CHUNK", 8)
    train = [said(f"{number:02} {' '.join(words(number, 30))}") for number in range(50)]
    train[49] = said("49" + train[45][1].content["messages"][0]["content"][2:])
    held_out = [said(f"xx {' '.join(words(number, 30))}") for number in range(100, 130)]
    held_out[19], held_out[20] = train[44], train[43]
    seen = compared(train, held_out)
    assert seen.repeated == Found(), "45 and 49 are alike, and neither is among the first 20"
    assert seen.leaked == Found(1, train[44][0])
    assert seen.left_out == Found(30 + 10, train[20][0])
    assert compared(train[:20], held_out).left_out == Found(10, held_out[20][0])
