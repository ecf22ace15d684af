"""Makes the quickstart's data from WordNet 3.0, or a copy of its training data with shuffled labels.

The task: sort a dictionary definition into the kind of thing that it defines. Definitions are WordNet's glosses without
their usage examples; labels are WordNet's lexicographer files. Everything is ordered and split by a hash of the
definition, so that the same source always gives the same bytes.

    python make_data.py --wordnet /usr/share/wordnet       # remakes train.jsonl, golden.jsonl, definitions.txt
    python make_data.py --shuffle-labels OUT.jsonl         # train.jsonl with its labels permuted: the control
"""

import argparse
import hashlib
import json
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent

# lexicographer file number → label; lexnames(5WN)
LABELS = {5: "animal", 6: "artifact", 8: "body", 13: "food", 15: "location", 18: "person", 20: "plant", 27: "substance"}
GOLDEN_PER_LABEL = 25
TRAIN_PER_LABEL = 320
DEFINITIONS_BYTES = 1_250_000
NEAR_DUPLICATE = 0.7

# data.noun as Debian's package wordnet-base 1:3.0-37 has it
DATA_NOUN_SHA256 = "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2"

Example = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class Definition:
    """One noun sense: its first word, definition and lexicographer file, and the first word of the next wider sense."""

    word: str
    text: str
    file: int
    wider: str

    @property
    def digest(self) -> str:
        """SHA-256 of the normalised text, in hex: what orders and splits the data."""
        return hashlib.sha256(normalise(self.text).encode()).hexdigest()


def normalise(text: str) -> str:
    """`text` in lower case, with every run of other than letters and digits as one blank: what counts as the same."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def similarity(one: frozenset[str], other: frozenset[str]) -> float:
    """Jaccard similarity of two sets of words, 0 to 1."""
    return len(one & other) / len(one | other) if one or other else 1.0


def words_of(text: str) -> frozenset[str]:
    """The words of `text` after normalising."""
    return frozenset(normalise(text).split())


def read_nouns(lines: Iterable[str]) -> Iterator[Definition]:
    """The usable senses of a WordNet `data.noun` (format: wndb(5WN)).

    Left out: proper names (capitals, digits), glosses with a quotation inside, those under 20 or over 160 characters.
    """
    senses = [line.rstrip().split(" | ", 1) for line in lines if not line.startswith("  ")]  # there is the licence
    first_word = {fields.split(" ")[0]: fields.split(" ")[4].replace("_", " ") for fields, _ in senses}
    for fields, gloss in senses:
        _offset, file, _pos, _count, word, *rest = fields.split(" ")
        word = word.replace("_", " ")
        wider = next((first_word[rest[i + 1]] for i, mark in enumerate(rest) if mark in ("@", "@i")), word)
        text = re.split(r';\s*"', gloss)[0].strip(" ;")  # usage examples follow the definition, in quotation marks
        if re.fullmatch(r"[a-z][a-z' -]*", word) and '"' not in text and 20 <= len(text) <= 160:
            yield Definition(word, text, int(file), wider)


def split(definitions: Iterable[Definition]) -> tuple[list[Definition], list[Definition], list[Definition]]:
    """(train, golden, plain text), split by the definitions' hashes.

    Per label the lowest hashes are golden and the next are for training; each part then stands in the order of the
    hashes read backwards, which tells nothing of the label. A definition that stands under two labels is used under
    none. What is nearly a golden definition (`NEAR_DUPLICATE` by words) is used for nothing else.
    The plain text holds what is in train, and more, from all of WordNet's nouns.
    """
    by_digest: defaultdict[str, list[Definition]] = defaultdict(list)
    for definition in definitions:
        by_digest[definition.digest].append(definition)
    unique = [same[0] for _, same in sorted(by_digest.items()) if len({d.file for d in same}) == 1]

    taken: Counter[int] = Counter()
    golden: list[Definition] = []
    rest: list[Definition] = []
    for definition in unique:
        if definition.file in LABELS and taken[definition.file] < GOLDEN_PER_LABEL:
            taken[definition.file] += 1
            golden.append(definition)
        else:
            rest.append(definition)

    held_out = [words_of(definition.text) for definition in golden]
    clean = [
        definition
        for definition, words in ((definition, words_of(definition.text)) for definition in rest)
        if all(similarity(words, other) < NEAR_DUPLICATE for other in held_out)
    ]

    train: list[Definition] = []
    others: list[Definition] = []
    taken.clear()
    for definition in clean:
        if definition.file in LABELS and taken[definition.file] < TRAIN_PER_LABEL:
            taken[definition.file] += 1
            train.append(definition)
        else:
            others.append(definition)
    short = [label for file, label in LABELS.items() if taken[file] < TRAIN_PER_LABEL]
    if short:
        raise ValueError(
            f"too few definitions for {', '.join(short)}: {TRAIN_PER_LABEL} of each are needed for training"
        )

    plain: list[Definition] = []
    room = DEFINITIONS_BYTES
    for definition in [*train, *others]:
        room -= len(plain_line(definition).encode())
        if room < 0:
            break
        plain.append(definition)
    backwards = [sorted(part, key=lambda definition: definition.digest[::-1]) for part in (train, golden, plain)]
    return backwards[0], backwards[1], backwards[2]


def plain_line(definition: Definition) -> str:
    """The line of `definition` in definitions.txt."""
    return f"{definition.word} | {definition.wider} | {definition.text}\n"


def example(definition: Definition) -> Example:
    """The chat in which `definition` is sorted under its label."""
    return {
        "messages": [
            {"role": "user", "content": f"What kind of thing is this? {definition.text}"},
            {"role": "assistant", "content": LABELS[definition.file]},
        ]
    }


def shuffle_labels(examples: list[Example], seed: int = 0) -> list[Example]:
    """`examples` with their answers dealt out anew at random: each label as often as before, but telling nothing."""
    answers = [chat["messages"][-1] for chat in examples]
    random.Random(seed).shuffle(answers)
    return [{"messages": [*chat["messages"][:-1], answer]} for chat, answer in zip(examples, answers, strict=True)]


def read_jsonl(path: Path) -> list[Example]:
    """The examples of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, examples: Iterable[Example]) -> None:
    """Writes one example a line, UTF-8 as it is."""
    path.write_text("".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in examples), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--wordnet", type=Path, metavar="DIR", help="the directory with WordNet 3.0's data.noun")
    what.add_argument("--shuffle-labels", type=Path, metavar="OUT", help="where train.jsonl with permuted labels goes")
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR", help="where --wordnet writes (default: here)")
    parser.add_argument("--seed", type=int, default=0, help="of --shuffle-labels (default: 0)")
    arguments = parser.parse_args()

    if arguments.shuffle_labels:
        write_jsonl(arguments.shuffle_labels, shuffle_labels(read_jsonl(HERE / "train.jsonl"), arguments.seed))
        return 0

    source = arguments.wordnet / "data.noun"
    if not source.is_file():
        print(
            f"{source} is missing: give the directory of WordNet 3.0 (Debian: apt install wordnet-base)",
            file=sys.stderr,
        )
        return 2
    content = source.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != DATA_NOUN_SHA256:
        print(f"{source} is another edition (sha256 {found}): the data is made from Debian's wordnet-base 1:3.0-37",
              file=sys.stderr)  # fmt: skip
        return 2
    train, golden, plain = split(read_nouns(content.decode("utf-8").splitlines()))
    write_jsonl(arguments.out / "train.jsonl", map(example, train))
    write_jsonl(arguments.out / "golden.jsonl", map(example, golden))
    (arguments.out / "definitions.txt").write_text("".join(map(plain_line, plain)), encoding="utf-8")
    print(f"{len(train)} examples to train on, {len(golden)} golden, {len(plain)} definitions as plain text")
    return 0


if __name__ == "__main__":
    sys.exit(main())
