"""The data of a job: its sources read row by row, checked, deduplicated, split, weighted, compared. No tokens here.

Data may be larger than memory: it is read once to know which examples there are, and again whenever they are needed. Of
an example some 60 bytes are kept (220 at the peak, measured with 300,000).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qlora_api.exchange import (
    CANARY_FIELD,
    EVAL_FIELD,
    FINDING_PLACE_MAX,
    FINDINGS_REPORTED,
    GOLDEN_FIELD,
    DataOrder,
    DataSource,
    Finding,
    train_field,
)
from qlora_api.findings import FINDINGS, FindingCode
from qlora_trainer.artifacts import combined_digest, file_digest
from qlora_trainer.environment import Pod, log
from qlora_trainer.failures import BadInput
from qlora_trainer.formats import (
    DATA_SUFFIXES,
    FORMATS,
    Example,
    Format,
    Kind,
    Mistake,
    holds_a_list,
    parse_row,
    rows_of,
)

EVAL, GOLDEN, CANARY = EVAL_FIELD, GOLDEN_FIELD, CANARY_FIELD
#: So many mistakes are named at once; nobody wants to hear of them one by one.
_MISTAKES_NAMED = 5
_KEYS_NAMED = 20
_KEY_BYTES = 16


class Findings:
    """What was found wrong so far, by kind: how often, and where first."""

    def __init__(self) -> None:
        self._found: dict[FindingCode, Finding] = {}
        self._sentences: list[str] = []

    def add(self, code: FindingCode, where: str | None = None, count: int = 1) -> None:
        """Another finding of the kind, or `count` of them of which the first is at `where`."""
        before = self._found.get(code)
        where = where and where.removeprefix("dataset.")
        if where and len(where) > FINDING_PLACE_MAX:
            where = f"…{where[1 - FINDING_PLACE_MAX :]}"
        self._found[code] = Finding(
            severity=FINDINGS[code].severity,
            code=code,
            count=count + (before.count if before else 0),
            example=before.example if before else where,
        )

    def mistake(self, where: str, mistake: Mistake) -> None:
        """A row that ends the job, in the words for the one who wrote it."""
        self.add(mistake.code, where)
        if len(self._sentences) < _MISTAKES_NAMED:
            self._sentences.append(f"{where}: {mistake}")

    def refuse(self) -> None:
        """Raises BadInput with the first few mistakes and how many there are, where there is one."""
        if not self._sentences:
            return
        failing = [finding for finding in self._found.values() if finding.severity == "fails"]
        more = sum(finding.count for finding in failing) - len(self._sentences)
        counts = ", ".join(f"{finding.code} {finding.count}" for finding in failing)
        raise BadInput("\n".join([*self._sentences, *([f"and {more} more; in all {counts}"] if more else [])]))

    def reported(self) -> list[Finding]:
        """For the status: the gravest kinds first."""
        return [self._found[code] for code in FINDINGS if code in self._found][:FINDINGS_REPORTED]


@dataclass(frozen=True)
class File:
    """A file of examples: what the user calls it, and in which format the file's source is."""

    path: Path
    where: str
    format: Format | None

    def examples(self) -> Iterator[tuple[str, Example | Mistake]]:
        """Each example, or what is wrong with it, and where it stands (`line 3`)."""
        return ((place, found if isinstance(found, Mistake) else found[0]) for place, found in self.parsed())

    def parsed(self) -> Iterator[tuple[str, tuple[Example, Format, set[str]] | Mistake]]:
        """As `examples`, with each example's format and the keys of its row that are not used.

        The first example decides on the format where the source does not say.
        """
        expected = self.format
        for place, row in rows_of(self.path):
            if isinstance(row, Mistake):
                yield place, row
                continue
            try:
                example, expected, unused = parse_row(row, expected)
            except Mistake as mistake:
                yield place, mistake
            else:
                yield place, (example, expected, unused)


@dataclass(frozen=True)
class Examples:
    """Examples in files, read anew each time; `times` says how often each of them is meant, in order."""

    files: list[File]
    keys: np.ndarray
    times: np.ndarray

    def __len__(self) -> int:
        return int(self.times.sum())

    def __iter__(self) -> Iterator[Example]:
        for _, example, times in self.counted():
            for _ in range(times):
                yield example

    def spread(self, count: int) -> np.ndarray:
        """Which `count` of the different ones to look at closer: by hash, so from everywhere and always the same."""
        halves = _halves(self.keys[self.times > 0])
        hashes = halves[:, 0] ^ halves[:, 1]  # each by itself has chosen already: what is held out, what counts in part
        chosen = np.zeros(len(hashes), bool)
        chosen[np.argsort(hashes, kind="stable")[:count]] = True
        return chosen

    def placed(self) -> Iterator[tuple[str, Example]]:
        """Each example once, with its place."""
        return ((where, example) for where, example, _ in self.counted())

    def counted(self) -> Iterator[tuple[str, Example, int]]:
        """Each example once, with its place and how often it is meant. Raises BadInput when a file has changed."""
        numbered = zip(self.keys, self.times, strict=True)
        for file in self.files:
            for place, found in file.examples():
                key, times = next(numbered, (None, 0))
                # numpy leaves out zeros at the end of a string of bytes
                if isinstance(found, Mistake) or key is None or found.key[:_KEY_BYTES].rstrip(b"\0") != key:
                    raise BadInput(f"{file.where} {place}: the file was changed while it was read")
                if times:
                    yield f"{file.where} {place}", found, int(times)
        if next(numbered, None) is not None:
            raise BadInput(f"{self.files[-1].where}: the file was changed while it was read")


@dataclass
class Corpus:
    """The data of a job, ready to be tokenised."""

    train: Examples
    eval: Examples
    golden: Examples
    canary: Examples
    digest: str
    formats: frozenset[Kind]
    """What training examples are."""
    duplicates: int
    per_source: list[int]
    """How many different examples each training source gives; they stand one after the other in `train`."""
    leaked: dict[str, int] = field(default_factory=dict)
    leaks: frozenset[bytes] = frozenset()
    """Which examples, by their normalised text, are both trained on and held out."""
    findings: Findings = field(default_factory=Findings)


@dataclass
class _Read:
    """What is kept of the examples of a source."""

    files: list[File]
    keys: bytearray = field(default_factory=bytearray)
    normalised: bytearray = field(default_factory=bytearray)
    numbers: array[int] = field(default_factory=lambda: array("q"))
    in_file: array[int] = field(default_factory=lambda: array("i"))
    kinds: set[Kind] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.numbers)

    def key_array(self) -> np.ndarray:
        return np.frombuffer(self.keys, dtype=f"S{_KEY_BYTES}")

    def normalised_array(self) -> np.ndarray:
        return np.frombuffer(self.normalised, dtype=f"S{_KEY_BYTES}")

    def examples(self) -> Examples:
        """All of them, once."""
        return Examples(self.files, self.key_array(), np.ones(len(self), np.int32))

    def place(self, number: int) -> str:
        """Where the example stands."""
        file = self.files[self.in_file[number]]
        return f"{file.where} {'row' if file.path.suffix == '.parquet' else 'line'} {self.numbers[number]}"


def read_corpus(data: DataOrder, pod: Pod) -> Corpus:
    """Read everything in `data`: remove duplicates, split, weigh, look for leakage.

    The split goes by each example's own hash, before any processing, so that it stays the same when data is added.
    Raises BadInput naming source, line and mistake.
    """
    digests: dict[str, str] = {}
    findings = Findings()
    named = named_sources(data)
    read = {where: _read(source, where, pod, digests, findings) for where, source in named}
    findings.refuse()
    sources = [read[where] for where, source in named if where not in (EVAL, GOLDEN, CANARY)]

    keys = np.concatenate([source.key_array() for source in sources])
    _, first = np.unique(keys, return_index=True)
    kept = np.zeros(len(keys), bool)
    kept[first] = True
    duplicates = len(keys) - len(first)
    if duplicates:
        findings.add(FindingCode.DUPLICATES, _place(sources, int(np.argmin(kept))), duplicates)
    halves = _halves(keys)
    held_out = np.zeros(len(keys), bool)
    if data.eval_fraction:
        held_out = kept & (halves[:, 0] < np.uint64(min(int(data.eval_fraction * 2**64), 2**64 - 1)))
        if not held_out.any():
            log.info("evalFraction %s of %d examples left none for evaluation", data.eval_fraction, len(first))
    kept &= ~held_out
    if not kept.any():
        raise BadInput(f"dataset.evalFraction: {data.eval_fraction} leaves no example to train on")
    times = np.zeros(len(keys), np.int32)
    start, per_source = 0, []
    for source, order in zip(sources, data.train, strict=True):
        here = slice(start, start + len(source))
        times[here] = _times(kept[here], halves[here, 1], order.weight)
        per_source.append(int(np.count_nonzero(times[here])))
        start = here.stop

    files = [file for source in sources for file in source.files]
    corpus = Corpus(
        train=Examples(files, keys, times),
        eval=Examples(files, keys, held_out.astype(np.int32)),
        golden=read.get(GOLDEN, _Read([])).examples(),
        canary=read.get(CANARY, _Read([])).examples(),
        digest=combined_digest(digests),
        formats=frozenset(kind for source in sources for kind in source.kinds),
        duplicates=duplicates,
        per_source=per_source,
        findings=findings,
    )
    if EVAL in read:
        corpus.eval = read[EVAL].examples()
    known = np.unique(np.concatenate([source.normalised_array() for source in sources])[times > 0])
    split = np.flatnonzero(held_out)
    sets = {"eval": (sources, split)} if data.eval_fraction else {}
    sets |= {
        name: ([read[where]], np.arange(len(read[where])))
        for name, where in (("eval", EVAL), ("golden", GOLDEN), ("canary", CANARY))
        if where in read
    }
    leaks: set[bytes] = set()
    for name, (of, chosen) in sets.items():
        normalised = np.concatenate([source.normalised_array() for source in of])[chosen]
        also = np.isin(normalised, known)
        if normalised.size:
            corpus.leaked[name] = int(also.sum())
        if also.any():
            findings.add(FindingCode.LEAKED, _place(of, int(chosen[np.argmax(also)])), int(also.sum()))
            leaks.update(bytes(value).ljust(_KEY_BYTES, b"\0") for value in normalised[also])
            log.info("LEAKAGE: %d %s examples are also training examples; their score says little", also.sum(), name)
    corpus.leaks = frozenset(leaks)
    return corpus


def _halves(keys: np.ndarray) -> np.ndarray:
    """Each key as two numbers."""
    return np.frombuffer(keys.tobytes(), dtype=">u8").reshape(-1, 2)


def leak_key(example: Example) -> bytes:
    """What `Corpus.leaks` knows an example by."""
    return example.normalised[:_KEY_BYTES]


def _place(sources: list[_Read], number: int) -> str:
    for source in sources:
        if number < len(source):
            return source.place(number)
        number -= len(source)
    raise IndexError(number)


def _times(kept: np.ndarray, order: np.ndarray, weight: float | None) -> np.ndarray:
    """How often each example occurs in an epoch: `weight` times, its fraction as that share of them, by hash."""
    if weight is None:
        return kept.astype(np.int32)
    whole, here = int(weight), np.flatnonzero(kept)
    times = np.where(kept, whole, 0).astype(np.int32)
    chosen = round((weight - whole) * len(here))
    if not whole and len(here):
        chosen = max(1, chosen)
    times[here[np.argsort(order[here], kind="stable")[:chosen]]] += 1
    return times


def named_sources(data: DataOrder) -> list[tuple[str, DataSource]]:
    """Every source of `data`, with the field of the spec that names it."""
    held_out = [(EVAL, data.eval), (GOLDEN, data.golden), (CANARY, data.canary)]
    train = [(train_field(number), source) for number, source in enumerate(data.train)]
    return train + [(where, source) for where, source in held_out if source]


def _files(source: DataSource, where: str, pod: Pod) -> list[Path]:
    path = pod.path_of(source.uri, where)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise BadInput(f"{where}: {source.uri} does not exist{_listing(path.parent)}")
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix in DATA_SUFFIXES and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and (file.suffix != ".json" or holds_a_list(file))  # others say something about the data or the model
    ]  # fmt: skip
    if not files:
        kinds = ", ".join(f"*{suffix}" for suffix in DATA_SUFFIXES)
        raise BadInput(f"{where}: {source.uri} is a directory without data files ({kinds}){_listing(path)}")
    return files


def _read(source: DataSource, where: str, pod: Pod, digests: dict[str, str], findings: Findings) -> _Read:
    """What is kept of one source, a file or a directory of such; adds the files' digests to `digests`."""
    paths = _files(source, where, pod)
    if source.format is not None and source.format not in FORMATS:
        raise BadInput(f"{where}: format {source.format!r} is not known; formats are {', '.join(FORMATS)}")
    expected: Format | None = next((known for known in FORMATS if known == source.format), None)
    kept = _Read([])
    ignored: set[str] = set()
    mistakes = 0
    top = pod.path_of(source.uri, where)
    for path in paths:
        name = path.name if path == top else path.relative_to(top).as_posix()
        digests[f"{where}/{name}"] = file_digest(path)
        file = File(path, where if len(paths) == 1 else f"{where} {name}", expected)
        kept.files.append(file)
        for place, found in file.parsed():
            if isinstance(found, Mistake):
                findings.mistake(f"{file.where} {place}", found)
                mistakes += 1
                continue
            example, expected, unused = found
            if where == GOLDEN and example.format == "text":
                said = Mistake(FindingCode.WRONG_SHAPE, "a text asks for no answer: golden examples have one")
                findings.mistake(f"{file.where} {place}", said)
                mistakes += 1
                continue
            kept.keys += example.key[:_KEY_BYTES]
            kept.normalised += example.normalised[:_KEY_BYTES]
            kept.numbers.append(int(place.rpartition(" ")[2]))
            kept.in_file.append(len(kept.files) - 1)
            kept.kinds.add(example.format)
            if len(ignored) < _KEYS_NAMED:
                ignored |= unused
    if not len(kept) and not mistakes:
        what = "each line of a JSONL file is one" if paths[0].suffix == ".jsonl" else "each row or item is one"
        raise BadInput(f"{where}: {source.uri} has no examples; {what}")
    if ignored:
        log.info("%s: these keys are not used: %s", where, ", ".join(sorted(ignored)))
    return kept


def read_file(path: Path) -> list[Example]:
    """All examples of a file. Raises BadInput with the first few mistakes."""
    findings, examples = Findings(), []
    for place, found in File(path, str(path), None).examples():
        if isinstance(found, Mistake):
            findings.mistake(f"{path} {place}", found)
        else:
            examples.append(found)
    findings.refuse()
    return examples


def _listing(directory: Path) -> str:
    if not directory.is_dir():
        return ": its directory does not exist either; check the claim's name and the path"
    found = sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
    return f"; there is {', '.join(found[:8])}" if found else "; its directory is empty"
