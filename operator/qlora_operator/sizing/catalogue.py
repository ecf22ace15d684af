"""Well-known models, so that planning works offline: `catalogue.json`, one entry per repository of Hugging Face's hub.

`config` has what the shape follows from, as in the repository's config.json, and `source` where that was read;
`parameters` is the published count to the last weight, which the shape must give exactly (tested); `gated` says whether
the weights are given only to those who accept a licence.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path

from qlora_api.exchange import ModelShape
from qlora_operator.sizing.config import read_shape, shape_of_config
from qlora_operator.sizing.directory import read_directory


@dataclass(frozen=True)
class KnownModel:
    """A model of the catalogue."""

    repository: str
    parameters: int
    gated: bool
    source: str
    shape: ModelShape


@cache
def catalogue() -> dict[str, KnownModel]:
    """Every model of the catalogue, by repository."""
    entries = json.loads(files("qlora_operator.sizing").joinpath("catalogue.json").read_text(encoding="utf-8"))
    known = [
        KnownModel(e["repository"], e["parameters"], e["gated"], e["source"], shape_of_config(e["config"]))
        for e in entries
    ]
    return {model.repository: model for model in known}


def shape_of_model(name: str) -> ModelShape:
    """The shape of a model of the catalogue (its owner may be left out), or of the directory or config.json at a path.

    Raises ValueError saying what to give instead.
    """
    path = Path(name)
    if path.is_dir() or path.suffix == ".json":
        try:
            return read_directory(path) if path.is_dir() else read_shape(path)
        except OSError as error:
            raise ValueError(f"{path}: {error}") from error
    names = {full.lower(): model for full, model in catalogue().items()}
    names |= {full.rsplit("/", 1)[1]: model for full, model in names.items()}
    if found := names.get(name.removeprefix("hf://").lower()):
        return found.shape
    near = get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    hint = f" (near: {names[near[0]].repository})" if near else ""
    raise ValueError(f"{name} is not in the catalogue{hint}: give the path of its config.json or directory instead")
