"""Examples as users write them: read, checked, deduplicated, split, compared. No tokens here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qlora_api.exchange import EVAL_FIELD, GOLDEN_FIELD, DataOrder, DataSource, train_field
from qlora_trainer.artifacts import combined_digest, file_digest
from qlora_trainer.environment import Pod, log
from qlora_trainer.failures import BadInput

Format = Literal["messages", "prompt-completion"]
FORMATS: tuple[Format, ...] = ("messages", "prompt-completion")
ROLES = ("system", "user", "assistant", "tool")
#: After which roles a role may stand (None: at the beginning).
_MAY_FOLLOW: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
EVAL, GOLDEN = EVAL_FIELD, GOLDEN_FIELD
#: What a directory's files of examples are called.
DATA_SUFFIXES = (".jsonl",)
#: So many mistakes are named at once; nobody wants to hear of them one by one.
_MISTAKES_NAMED = 5


@dataclass(frozen=True)
class Example:
    """One example. `content` is its JSON value, reduced to the keys that are used."""

    format: Format
    content: dict[str, Any]

    @property
    def key(self) -> bytes:
        """Equal for equal examples, and for no others."""
        text = json.dumps(self.content, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()

    @property
    def normalised(self) -> bytes:
        """Equal for examples that say the same but for case and white space, in whichever format."""
        if self.format == "messages":
            parts = [str(message.get("content") or "") for message in self.content["messages"]]
        else:
            parts = [self.content["prompt"], self.content["completion"]]
        text = "\n".join(" ".join(part.split()).casefold() for part in parts)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()

    @property
    def expected(self) -> str:
        """The answer that is asked for: the last message, or the completion."""
        if self.format == "messages":
            return self.content["messages"][-1].get("content") or ""
        return self.content["completion"]


@dataclass
class Corpus:
    """The data of a job, ready to be tokenised."""

    train: list[Example]
    eval: list[Example]
    golden: list[Example]
    digest: str
    duplicates: int
    leaked: dict[str, int] = field(default_factory=dict)

    @property
    def format(self) -> Format:
        """The one format of all training examples."""
        return self.train[0].format


def read_corpus(data: DataOrder, pod: Pod) -> Corpus:
    """Read everything in `data`: remove duplicates, split, look for leakage.

    The split goes by each example's own hash, before any processing, so that it stays the same when data is added.
    Raises BadInput naming source, line and mistake.
    """
    digests: dict[str, str] = {}
    read: list[Example] = []
    held_out: list[Example] = []
    golden: list[Example] = []
    for where, source in named_sources(data):
        into = {EVAL: held_out, GOLDEN: golden}.get(where, read)
        into += read_source(source, where, pod, digests)

    formats = sorted({example.format for example in (*read, *held_out)})
    if len(formats) > 1:
        raise BadInput(f"dataset: sources of different formats ({' and '.join(formats)}): write all of them in one")

    train = list({example.key: example for example in reversed(read)}.values())[::-1]
    duplicates = len(read) - len(train)
    if data.eval_fraction:
        threshold = int(data.eval_fraction * 2**64)
        chosen = [int.from_bytes(example.key[:8], "big") < threshold for example in train]
        held_out = [example for example, out in zip(train, chosen, strict=True) if out]
        train = [example for example, out in zip(train, chosen, strict=True) if not out]
        if not held_out:
            log.info("evalFraction %s of %d examples left none for evaluation", data.eval_fraction, len(train))
    if not train:
        raise BadInput(f"dataset.evalFraction: {data.eval_fraction} leaves no example to train on")

    known = {example.normalised for example in train}
    leaked = {
        name: sum(example.normalised in known for example in examples)
        for name, examples in (("eval", held_out), ("golden", golden))
        if examples
    }
    for name, count in leaked.items():
        if count:
            log.info("LEAKAGE: %d %s examples are also training examples; their score says little", count, name)
    return Corpus(train, held_out, golden, combined_digest(digests), duplicates, leaked)


def named_sources(data: DataOrder) -> list[tuple[str, DataSource]]:
    """Every source of `data`, with the field of the spec that names it."""
    held_out = [(EVAL, data.eval), (GOLDEN, data.golden)]
    train = [(train_field(number), source) for number, source in enumerate(data.train)]
    return train + [(where, source) for where, source in held_out if source]


def read_source(source: DataSource, where: str, pod: Pod, digests: dict[str, str]) -> list[Example]:
    """Every example of one source, a JSONL file or a directory of such; adds the files' digests to `digests`."""
    path = pod.path_of(source.uri, where)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith(DATA_SUFFIXES))
        if not files:
            raise BadInput(f"{where}: {source.uri} is a directory without *.jsonl files{_listing(path)}")
    elif path.is_file():
        files = [path]
    else:
        raise BadInput(f"{where}: {source.uri} does not exist{_listing(path.parent)}")
    if source.format is not None and source.format not in FORMATS:
        raise BadInput(f"{where}: format {source.format!r} is not supported yet; formats are {', '.join(FORMATS)}")
    expected: Format | None = next((known for known in FORMATS if known == source.format), None)

    examples: list[Example] = []
    ignored: set[str] = set()
    for file in files:
        digests[f"{where}/{file.name}"] = file_digest(file)
        found, unused = read_file(file, expected, where if len(files) == 1 else f"{where} {file.name}")
        examples += found
        ignored |= unused
        expected = found[0].format if found else expected
    if not examples:
        raise BadInput(f"{where}: {source.uri} has no examples; each line of a JSONL file is one")
    if ignored:
        log.info("%s: these keys are not used: %s", where, ", ".join(sorted(ignored)))
    return examples


def read_file(path: Path, expected: Format | None, where: str) -> tuple[list[Example], set[str]]:
    """The examples of a JSONL file, and the keys in it that are not used.

    Raises BadInput with the first few mistakes, each with its line; `where` is what the user calls the file.
    """
    examples: list[Example] = []
    mistakes: list[str] = []
    ignored: set[str] = set()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                example, unused = parse_line(line, expected)
            except ValueError as error:
                mistakes.append(f"{where} line {number}: {error}")
                if len(mistakes) > _MISTAKES_NAMED:
                    break
                continue
            expected = example.format
            examples.append(example)
            ignored |= unused
    if len(mistakes) > _MISTAKES_NAMED:
        mistakes[_MISTAKES_NAMED:] = ["and more"]
    if mistakes:
        raise BadInput("\n".join(mistakes))
    return examples, ignored


def _listing(directory: Path) -> str:
    if not directory.is_dir():
        return ": its directory does not exist either; check the claim's name and the path"
    found = sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
    return f"; there is {', '.join(found[:8])}" if found else "; its directory is empty"


def parse_line(line: bytes, expected: Format | None) -> tuple[Example, set[str]]:
    """The example in one line of JSONL, and its keys that are not used.

    Raises ValueError with what is wrong, in words for the one who wrote it.
    """
    try:
        row = json.loads(line.decode("utf-8-sig").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}: save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")  # some of its messages end in it, some do not
        raise ValueError(f"not JSON: {what} at column {error.colno}; each line is one whole example") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: nested too deep") from error
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {_kind(row)}, not an object")
    found = _format_of(row, expected)
    if found == "messages":
        _check_messages(row["messages"])
        content: dict[str, Any] = {"messages": row["messages"]}
        if row.get("tools"):
            if not isinstance(row["tools"], list):
                raise ValueError(f"tools is a {_kind(row['tools'])}, not a list")
            content["tools"] = row["tools"]
    else:
        for key in ("prompt", "completion"):
            if not isinstance(row[key], str):
                raise ValueError(f"{key} is a {_kind(row[key])}, not a string")
            if not row[key].strip():
                raise ValueError(f"{key} is empty")
        content = {"prompt": row["prompt"], "completion": row["completion"]}
    return Example(found, content), set(row) - set(content)


def _format_of(row: dict[str, Any], expected: Format | None) -> Format:
    found: list[Format] = []
    if "messages" in row:
        found.append("messages")
    if "prompt" in row and "completion" in row:
        found.append("prompt-completion")
    if expected in found:
        return expected
    if found and not expected:
        return found[0]
    keys = ", ".join(sorted(row)) or "none"
    if found:
        raise ValueError(f"format {found[0]}, but the format of the source is {expected}: use one format in a source")
    if expected == "messages":
        raise ValueError(f"no messages; keys are {keys}")
    missing = [key for key in ("prompt", "completion") if key not in row]
    if expected or len(missing) == 1:
        raise ValueError(f"no {' and no '.join(missing)}; keys are {keys}")
    raise ValueError(f"neither messages nor prompt and completion; keys are {keys}")


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list):
        raise ValueError(f"messages is a {_kind(messages)}, not a list")
    if not messages:
        raise ValueError("messages is empty")
    before: str | None = None
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{number}] is a {_kind(message)}, not an object")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"messages[{number}]: role {json.dumps(role)}; roles are {', '.join(ROLES)}")
        if before not in _MAY_FOLLOW[role]:
            after = f"after {before}" if before else "at the beginning"
            raise ValueError(f"messages[{number}]: {role} {after}; {_order(role)}")
        content = message.get("content")
        calls_tools = role == "assistant" and isinstance(message.get("tool_calls"), list) and message["tool_calls"]
        if content is not None and not isinstance(content, str):
            raise ValueError(f"messages[{number}]: content is a {_kind(content)}, not a string")
        if not (content or "").strip() and not calls_tools:
            raise ValueError(f"messages[{number}]: content of {role} is empty")
        before = role
    if before != "assistant":
        raise ValueError(f"the last message is of {before}, not of assistant: there is nothing to learn from it")


def _order(role: str) -> str:
    allowed = [f"after {name}" if name else "at the beginning" for name in _MAY_FOLLOW[role]]
    return f"{role} stands {' or '.join(allowed)}"


def _kind(value: Any) -> str:
    names: Iterable[tuple[type | tuple[type, ...], str]] = (
        (bool, "boolean"), ((int, float), "number"), (str, "string"), (list, "list"), (dict, "object")
    )  # fmt: skip
    return next((name for kind, name in names if isinstance(value, kind)), "null")
