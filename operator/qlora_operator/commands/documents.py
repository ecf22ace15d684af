"""Kubernetes objects in files: YAML or JSON, one or several, as `kubectl get -o yaml` and people write them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qlora_operator.commands.refusals import BadInput

STDIN = "-"


class Found(NamedTuple):
    """An object, and where it was found, for messages."""

    where: str
    content: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.content.get("kind", ""))


def objects(path: str) -> list[Found]:
    """The objects in the file at `path` (`-` is stdin); the items of a list are told apart.

    Raises BadInput, naming the file and the line, when it cannot be read or holds something else.
    """
    name = "stdin" if path == STDIN else path
    documents = _documents(name, path)
    if not documents:
        raise BadInput(f"{name}: is empty")
    found = list(_told_apart(name, documents))
    if len(found) == 1:
        return [Found(name, found[0].content)]
    return found


def one_document(path: str) -> dict[str, Any]:
    """The mapping in a file that holds nothing else, such as a chart's values; empty, if it is. Raises BadInput as
    `objects` does."""
    documents = _documents(path, path) or [{}]
    if len(documents) > 1 or not isinstance(documents[0], dict):
        raise BadInput(f"{path}: is no mapping of names to values")
    return documents[0]


def _documents(name: str, path: str) -> list[Any]:
    try:
        text = sys.stdin.read() if path == STDIN else Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{name}: is not UTF-8 text: {error.reason} at byte {error.start}") from error
    return [each for each in _parsed(name, text) if each is not None]


def _told_apart(name: str, documents: list[Any]) -> Iterator[Found]:
    number = 0
    for document in documents:
        many = isinstance(document, dict) and str(document.get("kind", "")).endswith("List") and "items" in document
        for content in (document["items"] or ()) if many else (document,):
            number += 1
            where = f"{name}, object {number}"
            if not isinstance(content, dict):
                raise BadInput(f"{where}: is no Kubernetes object, which begins with apiVersion and kind")
            yield Found(where, content)


def _parsed(name: str, text: str) -> list[Any]:
    if text.lstrip().startswith("{"):  # many times faster than YAML, which a list of a thousand nodes shows
        try:
            return [json.loads(text)]
        except json.JSONDecodeError:
            pass  # flow style YAML begins so too, and the YAML parser's complaint names the line as well
    import yaml

    try:
        return list(yaml.load_all(text, Loader=_loader()))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f" line {mark.line + 1}" if mark else ""
        what = "" if isinstance(error, yaml.constructor.ConstructorError) else "is not YAML: "
        raise BadInput(f"{name}{at}: {what}{error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{name}: is not YAML: {' '.join(str(error).split())}") from error


def _loader() -> Any:
    """YAML's safe loader that refuses a key which is there twice, as the API server does; the last would win."""
    import yaml

    safe: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(safe):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"{key.value} is there twice", key.start_mark
                        )
                    seen.add(key.value)
            return super().construct_mapping(node, deep=deep)

    # Dates stay text: no field of a Kubernetes object is a date, and annotations often look like one.
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in safe.yaml_implicit_resolvers.items()
    }
    return Loader


def as_text(document: Any, output: str) -> str:
    """A document for machines, as JSON or YAML; a list is one array, or one YAML document per item."""
    if output == "json":
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    import yaml

    many = document if isinstance(document, list) else [document]
    return yaml.safe_dump_all(many, sort_keys=False, allow_unicode=True, width=120)
