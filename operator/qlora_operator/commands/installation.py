"""What an installation of the operator decides of its jobs' plans, read from the chart's values."""

from __future__ import annotations

from typing import get_args

from pydantic import Field, ValidationError

from qlora_api.v1alpha1 import BackEnd, problems
from qlora_api.v1alpha1.fields import Document
from qlora_api.v1alpha1.spec import Toleration
from qlora_operator.commands.documents import one_document
from qlora_operator.commands.refusals import BadInput
from qlora_operator.planner import Installation

#: Where nothing is said of the installation, nothing is refused for its sake.
UNKNOWN = Installation(amd_image=True, mirror=True, back_ends=frozenset(get_args(BackEnd)))


class Trainer(Document):
    """Of the trainer's values, those that a plan depends on."""

    amd_image: str = ""
    back_ends: tuple[BackEnd, ...] = ()


class Values(Document):
    """Of the chart's values, those that a plan depends on."""

    tolerations: tuple[Toleration, ...] = ()
    gpu_prices: dict[str, float] = Field(default_factory=dict)
    stage_env: dict[str, str] = Field(default_factory=dict)
    trainer: Trainer = Trainer()


def installation_of(path: str | None) -> Installation:
    """The installation whose values are in a file (`helm get values RELEASE --all -o yaml`), or one that is not known.

    Raises BadInput with a sentence for each value that is wrong.
    """
    if path is None:
        return UNKNOWN
    try:
        values = Values.model_validate(one_document(path), by_alias=True, by_name=False)
    except ValidationError as error:
        raise BadInput(*(f"{path}: {sentence}" for sentence in problems(error))) from error
    return Installation(
        tolerations=tuple(toleration.to_api() for toleration in values.tolerations),
        prices=values.gpu_prices,
        amd_image=bool(values.trainer.amd_image),
        mirror="HF_ENDPOINT" in values.stage_env,
        back_ends=frozenset(values.trainer.back_ends),
    )
