"""The CustomResourceDefinition, made from the models.

`python -m qlora_api.schema` writes it beside the package; `--check` only says whether the file there is current.
What a structural schema cannot say is refused here, by path, and not later by the API server.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import NullableSchema

from qlora_api.v1alpha1 import (
    GROUP,
    KIND,
    MUTABLE,
    MUTABLE_WHILE_SUSPENDED,
    NAME_MAX,
    NAME_PATTERN,
    PLURAL,
    VERSION,
    QLoRAJob,
)

CRD_FILE = Path(__file__).resolve().parent.parent / f"{GROUP}_{PLURAL}.yaml"
#: The chart carries a copy: a link would not survive packaging.
CHART_COPY = CRD_FILE.parents[1] / "charts" / "qlora-operator" / "files" / CRD_FILE.name

Schema = dict[str, Any]

DROPPED = {"title", "examples", "deprecated", "const", "readOnly", "writeOnly", "discriminator"}
#: Constraints beside a validator function keep pydantic's own names.
CONSTRAINTS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
ALLOWED = {
    "type", "format", "description", "default", "enum", "properties", "required", "items", "additionalProperties",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
    "minLength", "maxLength", "pattern", "minItems", "maxItems", "minProperties", "maxProperties",
}  # fmt: skip
#: The server drops other formats without a word; `duration` means Go's there and ISO 8601 in pydantic.
FORMATS = {"int32", "int64", "float", "double", "byte", "date", "date-time", "uuid", "uri", "ipv4", "ipv6"}

#: Of `.status.conditions` no column takes the last: their order means nothing.
COLUMNS = (
    {"name": "Phase", "type": "string", "jsonPath": ".status.phase"},
    {"name": "Progress%", "type": "integer", "jsonPath": ".status.progress.percent"},
    {"name": "GPUs", "type": "integer", "jsonPath": ".status.plan.gpus"},
    {"name": "Loss", "type": "number", "jsonPath": ".status.progress.loss"},
    {"name": "Remaining", "type": "string", "jsonPath": ".status.progress.remaining"},
    {"name": "Model", "type": "string", "jsonPath": ".spec.model.uri", "priority": 1},
    {"name": "Method", "type": "string", "jsonPath": ".status.plan.recipe.method", "priority": 1},
    {"name": "Artifact", "type": "string", "jsonPath": ".status.artifacts[0].uri", "priority": 1},
    {"name": "Step", "type": "integer", "jsonPath": ".status.progress.step", "priority": 1},
    {"name": "Steps", "type": "integer", "jsonPath": ".status.progress.steps", "priority": 1},
    {"name": "EvalLoss", "type": "number", "jsonPath": ".status.progress.evalLoss", "priority": 1},
    {"name": "Tokens/s", "type": "integer", "jsonPath": ".status.progress.tokensPerSecond", "priority": 1},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
)


class UnstructuralError(ValueError):
    """The model says something that a structural schema cannot."""


class Structural(GenerateJsonSchema):
    """No union with null and no `nullable`: the server prunes a null where a value may be left out.

    `nullable` with `enum` refuses null whatever the enum holds, and a stored null is drift for GitOps.
    """

    def nullable_schema(self, schema: NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])


def structural(model: type[BaseModel]) -> Schema:
    """The structural schema of a model. Raises UnstructuralError, with the path, where there is none."""
    schema = model.model_json_schema(by_alias=True, schema_generator=Structural, mode="validation")
    return _inlined(schema, schema.pop("$defs", {}), at="")


def _inlined(node: Schema, definitions: dict[str, Schema], at: str, within: frozenset[str] = frozenset()) -> Schema:
    """One node with its references resolved and its words translated to the structural dialect; then its children."""
    node = dict(node)
    while reference := node.pop("$ref", None):
        name = reference.rsplit("/", 1)[-1]
        if name in within:
            raise UnstructuralError(f"{at}: {name} is recursive")
        within, node = within | {name}, {**definitions[name], **node}
    if "const" in node:
        node["enum"] = [node["const"]]
    node = {CONSTRAINTS.get(key, key): value for key, value in node.items() if key not in DROPPED}
    for bound in ("Minimum", "Maximum"):
        if (limit := node.pop(f"exclusive{bound}", None)) is not None:
            node |= {bound.lower(): limit, f"exclusive{bound}": True}
    if node.get("type") == "integer":
        node.setdefault("format", "int64")
    if "description" in node:
        node["description"] = " ".join(node["description"].split())
    if "properties" in node or node.get("additionalProperties") is False:
        node.pop("additionalProperties", None)
    if "default" in node and node["default"] is None:
        del node["default"]
    elif "default" in node and "properties" in node:
        node["default"] = {}  # the server fills the leaves
    _check(node, at)
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            node[key] = _inlined(node[key], definitions, f"{at}[]", within)
    if "properties" in node:
        node["properties"] = {
            name: _inlined(child, definitions, f"{at}.{name}", within) for name, child in node["properties"].items()
        }
    return node


def _check(node: Schema, at: str) -> None:
    """Refuse what the server would refuse, or take and ignore."""
    if odd := [key for key in node if key not in ALLOWED and not key.startswith("x-kubernetes-")]:
        raise UnstructuralError(f"{at}: {', '.join(odd)}: not part of a structural schema; flatten it, or use a Rule")
    if "type" not in node:
        raise UnstructuralError(f"{at}: no type")
    if node.get("format", "int64") not in FORMATS:
        raise UnstructuralError(f"{at}: format {node['format']} is not known to the API server")


def immutability(spec: Schema) -> list[Schema]:
    """One transition rule per field of the spec, on the spec itself.

    On the parent, because a rule on an optional field is skipped when the field comes or goes. Not with `self.?x`:
    the estimated cost of that is over the budget.
    """
    return [_immutable(name, name in spec.get("required", ()) or "default" in field)
            for name, field in spec["properties"].items() if name not in MUTABLE]  # fmt: skip


def _immutable(name: str, always_there: bool) -> Schema:
    same = f"self.{name} == oldSelf.{name}"
    if not always_there:
        same = f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || {same})"
    message = f"{name} is immutable: a job is one run; create another job for another run"
    if name == "planOnly":
        same = "oldSelf.planOnly || !self.planOnly"
        message = "planOnly can only change from true to false"
    elif name in MUTABLE_WHILE_SUSPENDED:
        same = f"oldSelf.suspend || ({same})"
        message = f"{name} can change only while the job is suspended: set suspend to true first, on its own"
    return {"rule": same, "message": message, "fieldPath": f".{name}", "reason": "FieldValueForbidden"}


def default_of(node: Schema) -> str:
    """The default of a field, for people; empty if there is none, or if it lies in the fields below."""
    match node.get("default"):
        case None | dict():
            return ""
        case bool(flag):
            return str(flag).lower()
        case list(values):
            return ", ".join(map(str, values))
        case value:
            return str(value)


def bounds_of(node: Schema) -> str:
    """What a number, a list or a map is bounded by, for people; empty if by nothing worth saying."""
    if "minimum" in node and "maximum" in node:
        low = f"{'above ' if node.get('exclusiveMinimum') else ''}{_plain(node['minimum'])}"
        return f"{low} to {'below ' if node.get('exclusiveMaximum') else ''}{_plain(node['maximum'])}"
    if "maxItems" in node:
        return f"{node.get('minItems', 0)} to {node['maxItems']} items"
    if "maxProperties" in node:
        return f"at most {node['maxProperties']} entries"
    return ""


def _plain(number: float) -> str:
    return f"{number:.0f}" if number == int(number) else str(number)


def _say_bounds(node: Schema) -> None:
    """Put default and bounds into the descriptions: `kubectl explain` shows nothing else of them."""
    for child in node.get("properties", {}).values():
        facts = [f"Default: {default}." for default in [default_of(child)] if default]
        facts += [
            f"Range: {bounds}." for bounds in [bounds_of(child)] if bounds and child["type"] in ("integer", "number")
        ]
        child["description"] = " ".join([child["description"], *facts])
        _say_bounds(child.get("items", child))


def _drop_defaults(node: Schema) -> None:
    """The operator writes the status; the server is to add nothing to it."""
    node.pop("default", None)
    for child in [*node.get("properties", {}).values(), *(node[key] for key in ("items",) if key in node)]:
        _drop_defaults(child)


def crd() -> Schema:
    """The whole definition."""
    schema = structural(QLoRAJob)
    spec, status = schema["properties"]["spec"], schema["properties"]["status"]
    spec["x-kubernetes-validations"] = [*spec.get("x-kubernetes-validations", ()), *immutability(spec)]
    _say_bounds(spec)
    _drop_defaults(status)
    # kstatus calls an object that has no status Current
    status["default"] = {"observedGeneration": -1}
    for name in ("apiVersion", "kind"):
        schema["properties"][name] = {"type": "string"}
    # of the metadata a schema may restrict only name and generateName, and only the length; the rest is a rule
    schema["properties"]["metadata"] = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": NAME_MAX}},
    }
    schema["x-kubernetes-validations"] = [
        {
            "rule": f"self.metadata.name.matches('{NAME_PATTERN}')",
            "message": "metadata.name must be a DNS label that begins with a letter, such as support-bot: "
            "what is made for the job carries its name",
            "fieldPath": ".metadata.name",
        }
    ]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["qj"],
                "categories": ["ml"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": list(COLUMNS),
                    "schema": {"openAPIV3Schema": schema},
                }
            ],
        },
    }


class _Plain(yaml.SafeDumper):
    """Every part in full: the server takes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def crd_yaml() -> str:
    """The definition as the text of its file."""
    return "# Made from crds/qlora_api by `python -m qlora_api.schema`: edit the models, not this file.\n" + yaml.dump(
        crd(), Dumper=_Plain, sort_keys=False, width=120, allow_unicode=True
    )


def main() -> int:
    """Write the file and the chart's copy, or with `--check` compare them."""
    text = crd_yaml()
    return max(write_or_check(file, text, command="python -m qlora_api.schema") for file in (CRD_FILE, CHART_COPY))


def write_or_check(file: Path, text: str, *, command: str) -> int:
    """Bring a generated file up to date, or with `--check` on the command line only say that it is not: exit code 1."""
    parser = argparse.ArgumentParser(prog=command, description=f"Generate {file.name} from the models.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail when the file is not current")
    if not parser.parse_args().check:
        file.write_text(text, encoding="utf-8")
        return 0
    if file.is_file() and file.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write(f"{file} is not what the models say: run `{command}` and commit the file\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
