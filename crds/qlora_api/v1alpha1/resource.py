"""The whole resource, and what to tell the writer of one that is not right."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError

from qlora_api.v1alpha1.fields import API_VERSION, KIND, LOOKS_LIKE, NAME_MAX, NAME_PATTERN, Document, Timestamp
from qlora_api.v1alpha1.spec import JobSpec
from qlora_api.v1alpha1.status import JobStatus


class Metadata(Document):
    """Of an object's metadata, what this project reads."""

    name: str = Field(pattern=NAME_PATTERN, max_length=NAME_MAX, description="Name of the job.")
    namespace: str = "default"
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    creation_timestamp: Timestamp | None = None
    deletion_timestamp: Timestamp | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class QLoRAJob(Document):
    """One fine-tune: a base model and a data set in, a trained, merged and published model out."""

    model_config = ConfigDict(extra="forbid")

    api_version: Literal["qlora.dev/v1alpha1"] = API_VERSION
    kind: Literal["QLoRAJob"] = KIND
    metadata: Metadata
    spec: JobSpec
    status: JobStatus = Field(default=JobStatus(), description="Where the job stands.")

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """The job in a manifest or an API object; only the names that the API server takes are taken.

        Raises pydantic's ValidationError; `problems` says it in sentences.
        """
        return cls.model_validate(document, by_alias=True, by_name=False)


def problems(error: ValidationError) -> list[str]:
    """What is wrong with a document, one sentence per field: where, what, and what it should look like."""
    details = error.errors(include_url=False)
    # a list whose only item is bad counts as too short as well
    around = {detail["loc"][:depth] for detail in details for depth in range(len(detail["loc"]))}
    return [_problem(detail) for detail in details if detail["type"] != "too_short" or detail["loc"] not in around]


def _problem(detail: Any) -> str:
    where = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in detail["loc"]).lstrip(".")
    value = detail["input"]
    shown = f" (found {value!r})" if isinstance(value, str | int | float) and len(str(value)) <= 100 else ""
    match detail["type"]:
        case "missing":
            what = "required, and not there"
        case "extra_forbidden":
            what, shown = "no such field; check the spelling and the indentation", ""
        case "string_pattern_mismatch":
            pattern = detail["ctx"]["pattern"]
            what = f"must be {LOOKS_LIKE.get(pattern, f'text that matches {pattern}')}"
        case "literal_error":
            what = f"must be one of {detail['ctx']['expected']}"
        case "string_type":
            what = "must be text; put it in quotes" if isinstance(value, int | float) else "must be text"
        case "string_too_long":
            what = f"must have at most {detail['ctx']['max_length']} characters"
        case "tuple_type":
            what = "must be a list"
        case "too_short":
            what = f"must have at least {detail['ctx']['min_length']} items"
        case "too_long":
            what = f"must have at most {detail['ctx']['max_length']} items"
        case "value_error":
            what, shown = str(detail["ctx"]["error"]), ""
        case _:
            what = detail["msg"].replace("Input should", "must")
    return f"{where}: {what}{shown}"
