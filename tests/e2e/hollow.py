"""Base models of any size that take no room: what inspection reads of one is true, and the weights are a hole."""

from __future__ import annotations

import json
import math
import shutil
import struct
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from examples.quickstart.upload import base_model


def write(place: Path, repository: str) -> None:
    """The catalogue's model `repository` as a directory in `place`, with the quickstart's tokenizer.

    Names and shapes of the weights are those that transformers gives a model of that configuration. The file is as
    long as its header promises (810 GB for the largest), and has no block on the disk behind it.
    """
    place.mkdir()
    for source in base_model().iterdir():
        if source.name.startswith(("tokenizer", "chat_template")):
            shutil.copyfile(source, place / source.name)
    settings = _configs()[repository]
    (place / "config.json").write_text(json.dumps(settings))
    with (place / "model.safetensors").open("wb") as file:
        header, length = _header(settings)
        file.write(header)
        file.truncate(len(header) + length)


def _header(settings: dict[str, Any]) -> tuple[bytes, int]:
    """A safetensors header, and the bytes that it promises to follow."""
    # seconds to import, and only few tests need them
    from transformers import AutoConfig

    from qlora_trainer.model import empty_model

    entries: dict[str, Any] = {}
    end = 0
    for name, parameter in empty_model(AutoConfig.for_model(**settings)).named_parameters():
        start, end = end, end + 2 * math.prod(parameter.shape)
        entries[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, end


@cache
def _configs() -> dict[str, dict[str, Any]]:
    """The settings of every model of the catalogue, by repository."""
    entries = json.loads(files("qlora_operator.sizing").joinpath("catalogue.json").read_text(encoding="utf-8"))
    return {entry["repository"]: entry["config"] for entry in entries}
