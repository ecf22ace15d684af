"""Rows of files as examples: JSONL, JSON, Parquet and CSV, each row in one of the formats that people write.

Rows are read one after the other; the largest thing held is a row, or a row group of Parquet.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlora_api.findings import FindingCode

#: How users write a source.
Format = Literal["messages", "prompt-completion", "instruction", "sharegpt", "text"]
#: What an example is once it is read: a chat is a chat, whoever's keys it was written with.
Kind = Literal["messages", "prompt-completion", "instruction", "text"]
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
ROLES = ("system", "user", "assistant", "tool")
#: After which roles a role may stand (None: at the beginning).
_MAY_FOLLOW: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
#: Who speaks in ShareGPT's words, which differ from data set to data set.
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
#: Of a JSON list so much is looked at in search of the end of an item; larger items are taken for broken.
_ITEM_MAX_CHARS = 64 << 20
_CHUNK_CHARS = 1 << 20
_BETWEEN_ITEMS = re.compile(r"[ \t\r\n,]*")
_PARQUET_ROWS = 256


class Mistake(ValueError):
    """What is wrong with a row, in words for the one who wrote it."""

    def __init__(self, code: FindingCode, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Example:
    """One example. `content` is its JSON value, reduced to the keys that are used."""

    format: Kind
    content: dict[str, Any]

    @property
    def key(self) -> bytes:
        """Equal for equal examples, and for no others; 32 bytes."""
        text = json.dumps(self.content, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).digest()

    @property
    def normalised(self) -> bytes:
        """Equal for examples that say the same but for case and white space, in whichever format; 32 bytes."""
        return hashlib.sha256(" ".join(self.words()).encode()).digest()

    def words(self, *, without_system: bool = False) -> list[str]:
        """What is said, in lower case; `without_system` leaves out what many examples may share."""
        content = self.content
        if self.format == "messages":
            parts = [
                json.dumps(message.get("tool_calls")) if message.get("content") is None else message["content"]
                for message in content["messages"]
                if not (without_system and message["role"] == "system")
            ]
        else:
            parts = [
                content.get(key) or "" for key in ("instruction", "input", "prompt", "completion", "output", "text")
            ]
        return [word for part in parts for word in part.casefold().split()]

    @property
    def expected(self) -> str:
        """The answer that is asked for: the last message, the completion or the output; a text asks for none."""
        if self.format == "messages":
            return self.content["messages"][-1].get("content") or ""
        return self.content.get("completion") or self.content.get("output") or ""

    def as_chat(self) -> Example:
        """An instruction as the chat that it is: the input stands below the instruction."""
        content = self.content
        asked = f"{content['instruction']}\n\n{content['input']}" if "input" in content else content["instruction"]
        system = [{"role": "system", "content": content["system"]}] if "system" in content else []
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": content["output"]}]
        return Example("messages", {"messages": [*system, *turns]})

    def as_prompt(self) -> Example:
        """An instruction for models without a chat template: the prompt of Stanford Alpaca, to the letter.

        https://github.com/tatsu-lab/stanford_alpaca#data-release
        """
        content = self.content
        beside = ", paired with an input that provides further context" if "input" in content else ""
        opening = content.get("system") or (
            f"Below is an instruction that describes a task{beside}. "
            "Write a response that appropriately completes the request."
        )
        given = f"### Input:\n{content['input']}\n\n" if "input" in content else ""
        prompt = f"{opening}\n\n### Instruction:\n{content['instruction']}\n\n{given}### Response:\n"
        return Example("prompt-completion", {"prompt": prompt, "completion": content["output"]})


# --- files to rows ---


def rows_of(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row of a file with its place, such as `line 3`; a row that cannot be read is a Mistake instead.

    The name's ending says how the file is written; any but those of `DATA_SUFFIXES` is taken for JSONL.
    """
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.suffix == ".csv":
        return _csv_rows(path)
    if path.suffix == ".json" and holds_a_list(path):
        return _list_items(path)
    return _lines(path)


def holds_a_list(path: Path) -> bool:
    """Whether a JSON file is one list; many that are called .json have an example a line instead."""
    with path.open("rb") as file:
        while start := file.read(4096).lstrip(b" \t\r\n\xef\xbb\xbf"):
            return start.startswith(b"[")
    return False


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"line {number}", row_of_line(line)


def row_of_line(line: bytes) -> Any:
    """The JSON value in a line of JSONL, or a Mistake."""
    try:
        return json.loads(line.decode("utf-8-sig").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return _not_utf8(error.start)
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")  # some of its messages end in it, some do not
        return _broken(f"not JSON: {what} at column {error.colno}; each line is one whole example")
    except RecursionError:
        return _broken("not JSON that can be read: nested too deep")
    except ValueError as error:  # whole numbers of more than 4300 digits
        return _broken(f"not JSON that can be read: {error}")


def _broken(text: str) -> Mistake:
    return Mistake(FindingCode.BROKEN_ROW, text)


def _not_utf8(start: int) -> Mistake:
    return _broken(f"not UTF-8 at byte {start}: save the file as UTF-8")


def _list_items(path: Path) -> Iterator[tuple[str, Any]]:
    """The items of a file that is one JSON list, by the line where each begins; a broken one ends the file."""
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig") as file:
        line, text, at, size, at_end = 1, "", 0, _CHUNK_CHARS, False
        opened = False
        while True:
            start = _BETWEEN_ITEMS.match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]  it may be empty
            line += text.count("\n", at, start)
            at = start
            if not opened and at < len(text):
                opened, at = True, at + 1
                continue
            if text[at : at + 1] == "]":
                return
            found: Any = None
            try:
                value, end = decoder.raw_decode(text, at)
                if end < len(text) or at_end:
                    yield f"line {line}", value
                    line += text.count("\n", at, end)
                    at, size = end, _CHUNK_CHARS
                    continue
            except RecursionError:
                found = _broken("not JSON that can be read: nested too deep")
            except json.JSONDecodeError as error:
                if at_end or len(text) - at > _ITEM_MAX_CHARS:
                    what = "the list does not end" if at == len(text) else error.msg.removesuffix(" at")
                    found = _broken(f"not JSON: {what}, in the item that begins here")
            except ValueError as error:
                found = _broken(f"not JSON that can be read: {error}")
            if found is None:  # the item goes on behind what was read so far
                try:
                    more = file.read(size)
                    text, at, at_end, size = text[at:] + more, 0, not more, 2 * size
                    continue
                except UnicodeDecodeError:
                    found = _broken("not UTF-8: save the file as UTF-8")
            yield f"line {line}", found
            return


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header: list[str] | None = None
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                what = (
                    "not UTF-8: save the file as UTF-8"
                    if isinstance(error, UnicodeDecodeError)
                    else f"not CSV: {error}"
                )
                yield f"line {reader.line_num + 1}", _broken(what)
                return
            if not row:
                continue
            place = f"line {reader.line_num}"
            if header is None:
                header = row
            elif len(row) != len(header):
                yield place, _broken(f"{len(row)} columns, and the header has {len(header)}")
            else:
                yield place, {name: _cell(cell) for name, cell in zip(header, row, strict=True) if cell}


def _cell(cell: str) -> Any:
    """A chat in a table is JSON in its cell."""
    if cell[:2] in ("[{", "[ ", "[\n"):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", _without_nulls(row)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        yield f"row {number + 1}", _broken(f"not Parquet that can be read: {str(error).splitlines()[0]}")


def _without_nulls(value: Any) -> Any:
    """Arrow gives every key to every message, null where one has none; chat templates ask whether a key is there."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


# --- rows to examples ---


def parse_row(row: Any, expected: Format | None) -> tuple[Example, Format, set[str]]:
    """The example in a row, the format it is written in, and its keys that are not used.

    Raises Mistake for what is wrong.
    """
    if not isinstance(row, dict):
        raise _shape(f"a JSON {_kind(row)}, not an object")
    found = _format_of(row, expected)
    example = _PARSERS[found](row)
    try:
        json.dumps(example.content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _broken("half a character (a lone surrogate), which no tokenizer takes") from error
    return example, found, {str(key) for key in row}.difference(_KEYS[found], _MAY_HAVE[found])


def parse_line(line: bytes, expected: Format | None) -> tuple[Example, set[str]]:
    """The example in one line of JSONL, and its keys that are not used. Raises Mistake for what is wrong."""
    row = row_of_line(line)
    if isinstance(row, Mistake):
        raise row
    example, _, unused = parse_row(row, expected)
    return example, unused


#: What a row must have to be of a format; the first that fits is taken where the source does not say.
_KEYS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
FORMATS: tuple[Format, ...] = tuple(_KEYS)
_MAY_HAVE: dict[Format, tuple[str, ...]] = {
    "messages": ("tools",),
    "prompt-completion": (),
    "sharegpt": ("tools", "system"),
    "instruction": ("input", "system"),
    "text": (),
}


def _format_of(row: dict[str, Any], expected: Format | None) -> Format:
    found: list[Format] = [name for name, keys in _KEYS.items() if all(key in row for key in keys)]
    if expected in found:
        return expected
    if found and not expected:
        return found[0]
    keys = ", ".join(sorted(map(str, row))) or "none"
    if found:
        raise _shape(f"format {found[0]}, but the format of the source is {expected}: use one format in a source")
    half: Format | None = next((name for name, wanted in _KEYS.items() if any(key in row for key in wanted)), None)
    if about := expected or half:
        missing = [key for key in _KEYS[about] if key not in row]
        raise _shape(f"no {' and no '.join(missing)}; keys are {keys}")
    raise _shape(f"neither {', '.join(' and '.join(wanted) for wanted in _KEYS.values())}; keys are {keys}")


def _shape(text: str) -> Mistake:
    return Mistake(FindingCode.WRONG_SHAPE, text)


def _text_of(row: dict[str, Any], key: str, *, needed: bool = True) -> str:
    value = row.get(key)
    if value is None and not needed:
        return ""
    if not isinstance(value, str):
        raise _shape(f"{key} is a {_kind(value)}, not a string")
    if needed and not value.strip():
        raise Mistake(FindingCode.EMPTY_TEXT, f"{key} is empty")
    return value


def _messages(row: dict[str, Any]) -> Example:
    _check_messages(row["messages"])
    return _chat(row["messages"], row.get("tools"))


def _chat(messages: list[dict[str, Any]], tools: Any) -> Example:
    content: dict[str, Any] = {"messages": messages}
    if tools:
        if isinstance(tools, str):  # as ShareGPT's descendants write them
            try:
                tools = json.loads(tools)
            except (ValueError, RecursionError) as error:
                raise _shape("tools is a string, and not JSON") from error
        if not isinstance(tools, list):
            raise _shape(f"tools is a {_kind(tools)}, not a list")
        content["tools"] = tools
    return Example("messages", content)


def _prompt_completion(row: dict[str, Any]) -> Example:
    return Example("prompt-completion", {key: _text_of(row, key) for key in ("prompt", "completion")})


def _instruction(row: dict[str, Any]) -> Example:
    content = {key: _text_of(row, key) for key in ("instruction", "output")}
    beside = {key: _text_of(row, key, needed=False) for key in ("input", "system")}
    return Example("instruction", content | {key: text for key, text in beside.items() if text.strip()})


def _text(row: dict[str, Any]) -> Example:
    return Example("text", {"text": _text_of(row, "text")})


def _sharegpt(row: dict[str, Any]) -> Example:
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise _shape(f"conversations is a {_kind(turns)}, not a list")
    messages = [_turn(turn, number) for number, turn in enumerate(turns)]
    if "system" in row and (system := _text_of(row, "system", needed=False)).strip():
        messages.insert(0, {"role": "system", "content": system})
    _check_messages(messages, "conversations", offset=len(turns) - len(messages))
    return _chat(messages, row.get("tools"))


def _turn(turn: Any, number: int) -> dict[str, Any]:
    where = f"conversations[{number}]"
    if not isinstance(turn, dict):
        raise _shape(f"{where} is a {_kind(turn)}, not an object")
    said, text = turn.get("from"), turn.get("value")
    if not isinstance(said, str) or said not in _SHAREGPT_ROLES:
        raise Mistake(
            FindingCode.WRONG_ROLES,
            f"{where}: from {json.dumps(said)}; those who speak are {', '.join(_SHAREGPT_ROLES)}",
        )
    if not isinstance(text, str):
        raise _shape(f"{where}: value is a {_kind(text)}, not a string")
    if said != "function_call":
        return {"role": _SHAREGPT_ROLES[said], "content": text}
    try:
        call = json.loads(text)
        called = {"name": call["name"], "arguments": call.get("arguments", {})}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _shape(f"{where}: the value of a function_call is JSON with name and arguments") from error
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": called}]}


_PARSERS: dict[Format, Callable[[dict[str, Any]], Example]] = {
    "messages": _messages,
    "prompt-completion": _prompt_completion,
    "sharegpt": _sharegpt,
    "instruction": _instruction,
    "text": _text,
}


def _check_messages(messages: Any, called: str = "messages", *, offset: int = 0) -> None:
    """Whether a chat can be learned from; `offset` leads from our numbers to those of the one who wrote it."""
    if not isinstance(messages, list):
        raise _shape(f"{called} is a {_kind(messages)}, not a list")
    if not messages:
        raise Mistake(FindingCode.EMPTY_TEXT, f"{called} is empty")
    before: str | None = None
    for number, message in enumerate(messages, start=offset):
        where = f"{called}[{number}]"
        if not isinstance(message, dict):
            raise _shape(f"{where} is a {_kind(message)}, not an object")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise Mistake(FindingCode.WRONG_ROLES, f"{where}: role {json.dumps(role)}; roles are {', '.join(ROLES)}")
        if before not in _MAY_FOLLOW[role]:
            after = f"after {before}" if before else "at the beginning"
            raise Mistake(FindingCode.WRONG_ROLES, f"{where}: {role} {after}; {_order(role)}")
        content = message.get("content")
        calls_tools = role == "assistant" and isinstance(message.get("tool_calls"), list) and message["tool_calls"]
        if content is not None and not isinstance(content, str):
            raise _shape(f"{where}: content is a {_kind(content)}, not a string")
        if not (content or "").strip() and not calls_tools:
            raise Mistake(FindingCode.EMPTY_TEXT, f"{where}: content of {role} is empty")
        before = role
    if before != "assistant":
        raise Mistake(
            FindingCode.WRONG_ROLES,
            f"the last message is of {before}, not of assistant: there is nothing to learn from it",
        )


def _order(role: str) -> str:
    allowed = [f"after {name}" if name else "at the beginning" for name in _MAY_FOLLOW[role]]
    return f"{role} stands {' or '.join(allowed)}"


def _kind(value: Any) -> str:
    names: Iterable[tuple[type | tuple[type, ...], str]] = (
        (bool, "boolean"), ((int, float), "number"), (str, "string"), (list, "list"), (dict, "object")
    )  # fmt: skip
    return next((name for kind, name in names if isinstance(value, kind)), "null")
