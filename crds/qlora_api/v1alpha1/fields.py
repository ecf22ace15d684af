"""The resource's name, the types that its fields are made of, and the base classes of its parts."""

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    Strict,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic.config import JsonDict
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

GROUP = "qlora.dev"
VERSION = "v1alpha1"
API_VERSION: Final = "qlora.dev/v1alpha1"
KIND: Final = "QLoRAJob"
PLURAL = "qlorajobs"
NAME_MAX = 40  # the children carry the name: `<job>-publish-<artifact>-<attempt>` stays within a label's 63 characters

#: Optional leading dot, then anything but a dot or slash: no empty, `.` or `..` component, without look-around.
URI_PATTERN = r"^((hf|s3|oci)://[^/.\s][^/\s]*|pvc://[a-z0-9]([-.a-z0-9]*[a-z0-9])?)(/\.?[^/.\s][^/\s]*)+$"
DURATION_PATTERN = r"^([1-9][0-9]{0,5}d)?([1-9][0-9]{0,5}h)?([1-9][0-9]{0,5}m)?([1-9][0-9]{0,5}s)?$"
QUANTITY_PATTERN = r"^[1-9][0-9]{0,14}(\.[0-9]{1,3})?(k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"
NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
OBJECT_NAME_PATTERN = r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$"
LABEL_VALUE_PATTERN = r"^([A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?)?$"
WORD_PATTERN = r"^\S+$"
ENDPOINT_PATTERN = r"^https?://[^\s/]+(/\S*)?$"

#: What a value that fails its pattern should have looked like, for people.
LOOKS_LIKE = {
    URI_PATTERN: "hf://owner/name, s3://bucket/path, oci://registry/name or pvc://claim/path",
    DURATION_PATTERN: "a duration such as 15m, 1h30m or 7d",
    QUANTITY_PATTERN: "a quantity such as 200Gi",
    NAME_PATTERN: "a DNS label: a lower-case letter, then lower-case letters, digits and '-'",
    OBJECT_NAME_PATTERN: "the name of a Kubernetes object: lower-case letters, digits, '-' and '.'",
    LABEL_VALUE_PATTERN: "the value of a label: at most 63 letters, digits, '-', '_' and '.'",
    WORD_PATTERN: "text without spaces",
    ENDPOINT_PATTERN: "https://host/path",
}

SECONDS_PER_UNIT = {"d": 86400, "h": 3600, "m": 60, "s": 1}
BYTES_PER_UNIT = {"": 1} | {
    prefix + suffix: factor**power
    for suffix, factor, prefixes in (("", 1000, "kMGTPE"), ("i", 1024, "KMGTPE"))
    for power, prefix in enumerate(prefixes, start=1)
}


def duration_seconds(duration: str) -> int:
    """Seconds in a duration of the resource, such as `1h30m` (checked against its pattern before)."""
    return sum(int(n) * SECONDS_PER_UNIT[unit] for n, unit in re.findall(r"([0-9]+)([dhms])", duration))


def quantity_bytes(quantity: str) -> int:
    """Bytes in a quantity of the resource, such as `200Gi` (checked against its pattern before)."""
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", quantity).groups()  # pyright: ignore[reportOptionalMemberAccess]
    whole, _, thousandths = number.partition(".")
    return (int(whole) * 1000 + int(thousandths.ljust(3, "0"))) * BYTES_PER_UNIT[unit] // 1000


def camel(name: str) -> str:
    """The name of a field in YAML: `max_gpus` is `maxGPUs`."""
    return to_camel(name).replace("Gpu", "GPU")


def _yaml_1_2_float(value: Any) -> Any:
    """PyYAML follows YAML 1.1 and reads `2e-4` as text; the API server reads a number."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+", value):
        return float(value)
    return value


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if repeated := sorted({str(value) for value in values if values.count(value) > 1}):
        raise ValueError(f"{', '.join(repeated)}: listed twice")
    return values


def _whole_seconds(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(microsecond=0)


# The server takes no "16" for 16; neither may the command line.
Integer = Annotated[int, Strict()]
Number = Annotated[float, Strict(), BeforeValidator(_yaml_1_2_float)]
Flag = Annotated[bool, Strict()]
Uri = Annotated[str, Field(pattern=URI_PATTERN, max_length=1024)]
Duration = Annotated[str, Field(pattern=DURATION_PATTERN, min_length=2, max_length=32)]
Quantity = Annotated[str, Field(pattern=QUANTITY_PATTERN, max_length=24)]
ObjectName = Annotated[str, Field(pattern=OBJECT_NAME_PATTERN, max_length=253)]
Word = Annotated[str, Field(pattern=WORD_PATTERN, max_length=253)]
LabelValue = Annotated[str, Field(pattern=LABEL_VALUE_PATTERN, max_length=63)]
Annotation = Annotated[str, Field(max_length=4096)]
Distinct = AfterValidator(_distinct)
AS_SET: JsonDict = {"x-kubernetes-list-type": "set"}

#: A moment in UTC, whole seconds, as Kubernetes writes it.
Timestamp = Annotated[
    datetime, AfterValidator(_whole_seconds), PlainSerializer(lambda moment: moment.strftime("%Y-%m-%dT%H:%M:%SZ"))
]

DataFormat = Literal["messages", "prompt-completion", "instruction", "sharegpt", "text"]
Loss = Literal["assistant", "completion", "all"]
Method = Literal["qlora", "lora"]
QuantType = Literal["nf4", "fp4", "hqq"]
#: What the trainer's image has only where it was built with it.
BackEnd = Literal["hqq"]
ComputeDtype = Literal["bfloat16", "float16", "float32"]
AdapterInit = Literal["default", "gaussian", "loftq"]
Schedule = Literal["cosine", "linear", "constant"]
Optimizer = Literal["paged_adamw_8bit", "adamw_8bit", "adamw_torch", "adamw_torch_fused"]
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]
Offload = Literal["none", "activations", "parameters"]
Metric = Literal["exactMatch", "tokenF1", "rougeL", "jsonSchema", "perplexity"]
GateMetric = Literal[
    "exactMatch", "tokenF1", "rougeL", "jsonSchema", "perplexity", "judge", "evalLoss",
    "canary.exactMatch", "canary.tokenF1", "canary.rougeL", "canary.perplexity",
]  # fmt: skip
BestMetric = Literal["evalLoss", "exactMatch", "tokenF1", "rougeL"]
Accelerator = Literal["nvidia", "amd", "cpu"]
Allocation = Literal["devicePlugin", "dra"]
Retain = Literal["Delete", "OnFailure", "Keep"]
OutputFormat = Literal[
    "adapter", "merged", "fp8", "awq", "gptq",
    "gguf:BF16", "gguf:F16", "gguf:Q8_0", "gguf:Q5_1", "gguf:Q5_0", "gguf:Q4_1", "gguf:Q4_0",
]  # fmt: skip
MergeBase = Literal["dequantized", "original"]
OnOutOfMemory = Literal["halveMicroBatch", "fail"]
ConditionStatus = Literal["True", "False", "Unknown"]


class Rule(NamedTuple):
    """One rule that spans fields: `cel` for the API server, `holds` for the command line, one `message` for both."""

    cel: str
    holds: Callable[[Any], bool]
    message: str


def at_most_one(*fields: str) -> Rule:
    """Of these optional fields (snake_case), at most one is set."""
    names = [camel(field) for field in fields]
    return Rule(
        cel=" + ".join(f"(has(self.{name}) ? 1 : 0)" for name in names) + " <= 1",
        holds=lambda model: sum(getattr(model, field) is not None for field in fields) <= 1,
        message=f"{' and '.join(names)} exclude each other: set one of them or none",
    )


def exactly_one(*fields: str) -> Rule:
    """Of these optional fields (snake_case), exactly one is set."""
    names = [camel(field) for field in fields]
    return Rule(
        cel=" + ".join(f"(has(self.{name}) ? 1 : 0)" for name in names) + " == 1",
        holds=lambda model: sum(getattr(model, field) is not None for field in fields) == 1,
        message=f"set exactly one of {', '.join(names)}",
    )


class Document(BaseModel):
    """A part of the resource: snake_case in Python, camelCase in YAML, never changed once read."""

    model_config = ConfigDict(alias_generator=camel, populate_by_name=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        """The API server prunes a null where none is allowed, then fills the default."""
        if isinstance(data, Mapping):
            return {key: value for key, value in data.items() if value is not None}
        return data

    def to_api(self) -> dict[str, Any]:
        """As the API server holds it: camelCase, defaults filled, absent where nothing is set."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class SpecPart(Document):
    """A part of what users write: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")
    rules: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _obey_rules(self) -> Self:
        if broken := [rule.message for rule in self.rules if not rule.holds(self)]:
            raise ValueError("; ".join(broken))
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        if cls.rules:
            handler.resolve_ref_schema(schema)["x-kubernetes-validations"] = [
                {"rule": rule.cel, "message": rule.message} for rule in cls.rules
            ]
        return schema
