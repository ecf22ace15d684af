"""The quickstart's data is what its README says: small, split cleanly, balanced, and remade by its script's rules."""

import json
from collections import Counter
from pathlib import Path

import pytest

from examples.quickstart import make_data
from examples.quickstart.make_data import Definition, Example

FOLDER = Path(make_data.__file__).parent
QUESTION = "What kind of thing is this? "


@pytest.fixture(scope="module")
def train() -> list[Example]:
    return make_data.read_jsonl(FOLDER / "train.jsonl")


@pytest.fixture(scope="module")
def golden() -> list[Example]:
    return make_data.read_jsonl(FOLDER / "golden.jsonl")


@pytest.fixture(scope="module")
def plain() -> list[tuple[str, str]]:
    lines = (FOLDER / "definitions.txt").read_text(encoding="utf-8").splitlines()
    return [(word, text) for word, _wider, text in (line.split(" | ") for line in lines)]


def definition_of(example: Example) -> str:
    question = example["messages"][0]["content"]
    assert question.startswith(QUESTION)
    return question.removeprefix(QUESTION)


def label_of(example: Example) -> str:
    return example["messages"][1]["content"]


def noun(word: str, text: str, file: int = 5, number: int = 0) -> str:
    return f"{number:08} {file:02} n 01 {word} 0 001 @ {number:08} n 0000 | {text}  "


def test_the_folder_is_at_most_two_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) <= 2_000_000


def test_every_example_is_one_question_and_one_known_label(train: list[Example], golden: list[Example]) -> None:
    for example in [*train, *golden]:
        assert [message["role"] for message in example["messages"]] == ["user", "assistant"]
        assert make_data.normalise(definition_of(example))
        assert label_of(example) in make_data.LABELS.values()


def test_labels_are_balanced_as_stated(train: list[Example], golden: list[Example]) -> None:
    labels = make_data.LABELS.values()
    assert Counter(map(label_of, train)) == dict.fromkeys(labels, make_data.TRAIN_PER_LABEL)
    assert Counter(map(label_of, golden)) == dict.fromkeys(labels, make_data.GOLDEN_PER_LABEL)


def test_no_golden_definition_is_trained_on(
    train: list[Example], golden: list[Example], plain: list[tuple[str, str]]
) -> None:
    held_out = {make_data.normalise(definition_of(example)) for example in golden}
    assert len(held_out) == len(golden)
    assert held_out.isdisjoint(make_data.normalise(definition_of(example)) for example in train)
    assert held_out.isdisjoint(make_data.normalise(text) for _, text in plain)


def test_no_near_duplicate_of_a_golden_definition_is_trained_on(
    train: list[Example], golden: list[Example], plain: list[tuple[str, str]]
) -> None:
    held_out = [make_data.words_of(definition_of(example)) for example in golden]
    used = {make_data.words_of(text) for text in [*map(definition_of, train), *(text for _, text in plain)]}
    near = [words for words in used for other in held_out if make_data.similarity(words, other) >= 0.7]
    assert not near


def test_each_definition_has_one_label(train: list[Example]) -> None:
    assert len({make_data.normalise(definition_of(example)) for example in train}) == len(train)


def test_the_plain_text_gives_no_label_away(plain: list[tuple[str, str]]) -> None:
    assert all(word and text for word, text in plain)
    assert not any(QUESTION.strip() in text for _, text in plain)


def test_shuffled_labels_keep_questions_and_counts_and_tell_nothing(train: list[Example]) -> None:
    shuffled = make_data.shuffle_labels(train, seed=1)
    assert list(map(definition_of, shuffled)) == list(map(definition_of, train))
    assert Counter(map(label_of, shuffled)) == Counter(map(label_of, train))
    still_right = sum(label_of(one) == label_of(other) for one, other in zip(shuffled, train, strict=True))
    assert 0.09 < still_right / len(train) < 0.16  # one in eight by chance; five standard deviations are 0.033
    assert shuffled == make_data.shuffle_labels(train, seed=1)
    assert shuffled != make_data.shuffle_labels(train, seed=2)


def test_shuffle_labels_writes_a_file_that_reads_back(
    train: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "shuffled.jsonl"
    monkeypatch.setattr("sys.argv", ["make_data.py", "--shuffle-labels", str(out), "--seed", "3"])
    assert make_data.main() == 0
    assert make_data.read_jsonl(out) == make_data.shuffle_labels(train, seed=3)


def test_another_edition_of_the_source_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.noun").write_text(noun("eland", "a large African antelope") + "\n")
    monkeypatch.setattr("sys.argv", ["make_data.py", "--wordnet", str(tmp_path), "--out", str(tmp_path)])
    assert make_data.main() == 2
    assert "another edition" in capsys.readouterr().err
    assert not (tmp_path / "train.jsonl").exists()


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ("  1 This software and database is being provided to you", None),
        (noun("eland", 'a large African antelope; "it ran"; "they ran"'), "a large African antelope"),
        (noun("stag_beetle", "a kind of beetle; the male has jaws"), "a kind of beetle; the male has jaws"),
        (noun("Eland", "a large African antelope"), None),
        (noun("b2b", "a large African antelope"), None),
        (noun("pun", 'a play on "word" in a sentence'), None),
        (noun("gnu", "an antelope"), None),
        (noun("gnu", "an antelope " * 20), None),
    ],
)
def test_what_is_read_of_a_line(line: str, read: str | None) -> None:
    found = [definition.text for definition in make_data.read_nouns([line])]
    assert found == ([] if read is None else [read])


def test_the_split_keeps_ambiguous_and_near_golden_definitions_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_data, "GOLDEN_PER_LABEL", 1)
    monkeypatch.setattr(make_data, "TRAIN_PER_LABEL", 2)
    nouns = [
        Definition(f"w{n}", " ".join(f"{label}{n}x{k}" for k in range(6)), file, "thing")
        for file, label in make_data.LABELS.items()
        for n in range(6)
    ]
    ambiguous = [
        Definition("crab", "lives in the sea", 5, "animal"),
        Definition("crab", "Lives in the sea.", 13, "food"),
    ]
    _, golden, _ = make_data.split(nouns)
    near = [Definition("near", golden[0].text + " too", golden[0].file, "thing")]
    train, golden_again, plain = make_data.split([*nouns, *ambiguous, *near])
    assert {d.text for d in golden_again} == {d.text for d in golden}
    used = {d.text for d in [*train, *golden_again, *plain]}
    assert "lives in the sea" not in used and "Lives in the sea." not in used
    assert near[0].text not in used
    assert {d.text for d in train} <= {d.text for d in plain}


def test_too_little_source_is_an_error_that_names_the_label() -> None:
    with pytest.raises(ValueError, match=r"too few definitions for animal, .*substance"):
        make_data.split([Definition("eland", "a large African antelope", 5, "antelope")])


def test_files_are_utf8_one_json_document_a_line() -> None:
    for name in ("train.jsonl", "golden.jsonl"):
        raw = (FOLDER / name).read_bytes()
        assert raw.endswith(b"\n")
        assert all(json.loads(line.decode("utf-8")) for line in raw.split(b"\n")[:-1])
