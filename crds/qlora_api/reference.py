"""`docs/reference.md`, made from the models: every field, what it takes, and whether this version does it.

`python -m qlora_api.reference` writes it; `--check` only says whether the file there is current.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from qlora_api.schema import COLUMNS, Schema, bounds_of, default_of, structural, write_or_check
from qlora_api.support import NOT_YET, OnlySchemes, limit_on
from qlora_api.v1alpha1 import (
    API_VERSION,
    DURATION_PATTERN,
    KIND,
    NAME_MAX,
    QUANTITY_PATTERN,
    URI_PATTERN,
    ConditionType,
    JobSpec,
    JobStatus,
    Phase,
)

REFERENCE_FILE = Path(__file__).resolve().parents[2] / "docs" / "reference.md"

NAMED_PATTERNS = {URI_PATTERN: "address", DURATION_PATTERN: "duration", QUANTITY_PATTERN: "quantity"}

INTRODUCTION = f"""\
# {KIND}, field by field

Made from the models by `python -m qlora_api.reference`. The API server knows the same: `kubectl explain qj.spec`.

- `apiVersion: {API_VERSION}`, `kind: {KIND}`, short name `qj`, category `ml`.
- `metadata.name`: a DNS label that begins with a letter, at most {NAME_MAX} characters.
- Absent and without a default means: decided for you. What was decided stands in `status.plan.recipe`.
- *address*: `hf://owner/name`, `s3://bucket/path`, `oci://registry/name` or `pvc://claim/path`.
  *duration*: `30s`, `15m`, `1h30m`, `7d`. *quantity*: `200Gi`.
- *required* inside an optional part: once that part is there.
- *In this version* says what is built. A job that sets a field to what is not built yet fails at once and says so.
"""


class Row(NamedTuple):
    """One field: its path below the section, and its schema."""

    path: str
    node: Schema
    required: bool


def rows(node: Schema, path: str = "") -> Iterator[Row]:
    """All leaves below an object, in order; `[]` after the name of a list of objects."""
    for name, child in node["properties"].items():
        here = f"{path}.{name}".lstrip(".")
        inner = child.get("items", child)
        if "properties" in inner:
            yield from rows(inner, f"{here}[]" if "items" in child else here)
        else:
            yield Row(here, child, name in node.get("required", ()))


def kind_of(node: Schema) -> str:
    """What a field holds: a type, or the values it may have."""
    if "items" in node:
        return f"list of {kind_of(node['items'])}"
    if isinstance(node.get("additionalProperties"), dict):
        return "map of strings"
    if "enum" in node:
        return " \\| ".join(f"`{value}`" for value in node["enum"])
    if node.get("format") == "date-time":
        return "time"
    return NAMED_PATTERNS.get(node.get("pattern", "")) or node["type"]


def support_for(path: str) -> str:
    """What of a field of the spec this version does."""
    limit = limit_on(path)
    if limit is None:
        return "yes"
    if limit is NOT_YET:
        return "not yet"
    works = [f"{scheme}://" for scheme in limit.examples] if isinstance(limit, OnlySchemes) else limit.values
    return ", ".join(f"`{value}`" for value in works)


def table(heading: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    heading = list(heading)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heading, ["---"] * len(heading), *lines)) + "\n"


def spec_table(found: Iterable[Row], section: str) -> str:
    """The fields of one part of the spec."""
    return table(
        ("Field", "Type", "Default", "Bounds", "Meaning", "In this version"),
        (
            (
                f"`{row.path}`",
                kind_of(row.node),
                "required" if row.required else f"`{default_of(row.node)}`" if default_of(row.node) else "",
                bounds_of(row.node),
                row.node["description"],
                support_for(f"{section}.{row.path}".lstrip(".")),
            )
            for row in found
        ),
    )


def rules_of(node: Schema, path: str) -> Iterator[str]:
    """The rules that span fields, of an object and of all below it, with their place."""
    for rule in node.get("x-kubernetes-validations", ()):
        yield f"- `{path}`: {rule['message']}."
    for name, child in node.get("properties", {}).items():
        yield from rules_of(child.get("items", child), f"{path}.{name}{'[]' if 'items' in child else ''}")


def spec_reference() -> str:
    """The chapter on the spec."""
    spec = structural(JobSpec)
    alone = {name: node for name, node in spec["properties"].items() if "properties" not in node}
    chapters = []
    for name, node in spec["properties"].items():
        if name in alone:
            continue
        need = " Required." if name in spec["required"] else ""
        chapters.append(f"\n### spec.{name}\n\n{node['description']}{need}\n\n")
        chapters.append(spec_table(rows(node), name))
        if rules := list(rules_of(node, f"spec.{name}")):
            chapters.append("\nRules:\n" + "\n".join(rules) + "\n")
    top = spec_table((Row(name, node, name in spec["required"]) for name, node in alone.items()), "")
    across = "\n".join(f"- {rule['message']}." for rule in spec["x-kubernetes-validations"])
    return f"\n## spec\n\n{spec['description']}\n\n{top}\nRules across its parts:\n{across}\n" + "".join(chapters)


def status_reference() -> str:
    """The chapter on the status."""
    fields = table(
        ("Field", "Type", "Meaning"),
        ((f"`{row.path}`", kind_of(row.node), row.node.get("description", "")) for row in rows(structural(JobStatus))),
    )
    columns = ", ".join(f"{c['name']} (`{c['jsonPath']}`{', wide' if c.get('priority') else ''})" for c in COLUMNS)
    return (
        f"\n## status\n\nWritten by the operator.\n\n{fields}\n"
        f"Phases: {', '.join(Phase)}.\n\nConditions: {', '.join(ConditionType)}.\n\n"
        f"Columns of `kubectl get`: {columns}.\n"
    )


def reference() -> str:
    """The whole page."""
    return INTRODUCTION + spec_reference() + status_reference()


def main() -> int:
    """Write the page, or with `--check` compare it."""
    return write_or_check(REFERENCE_FILE, reference(), command="python -m qlora_api.reference")


if __name__ == "__main__":
    sys.exit(main())
