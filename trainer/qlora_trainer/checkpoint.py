"""Checkpoints of a training: written whole or not at all, found again by the attempt that follows.

They lie in `<root>/<binding>/step-…`. A training that is bound to something else (other data, another recipe) does not
go on from them, nor begins anew beside them: it is refused, with what differs. Random states are not in them, for every
step seeds its own (see training.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qlora_api.exchange import binding_of
from qlora_trainer.artifacts import digests_of, whole_directory
from qlora_trainer.environment import log
from qlora_trainer.failures import BadInput

_MANIFEST, _ADAPTER, _OPTIMIZER, _PROGRESS = "manifest.json", "adapter.safetensors", "optimizer.pt", "progress.json"


@dataclass
class Progress:
    """How far a training is, over all attempts."""

    step: int = 0
    tokens: int = 0
    pads: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    eval_losses: list[tuple[int, float]] = field(default_factory=list)
    #: What each evaluation has found, by name; its step is one of the names.
    looks: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None
    best_value: float | None = None
    stopped_early: bool = False

    @property
    def padding(self) -> float:
        """Share of pad tokens in what went through the model."""
        return self.pads / (self.tokens + self.pads) if self.pads else 0.0


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a training goes on from."""

    progress: Progress
    adapter: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one training, bound to the facts `bound` (see `TrainOrder`); the newest `keep` are kept.

    Raises BadInput when there are none of this training but those of another one.
    """

    def __init__(self, root: Path, bound: Mapping[str, Any], keep: int) -> None:
        self.binding = binding_of(bound)
        self.bound = dict(bound)
        self.directory = root / self.binding.removeprefix("sha256:")[:16]
        self.keep = keep
        for left in self.directory.glob(".step-*"):  # by those who were killed
            shutil.rmtree(left, ignore_errors=True)
        if not self._found():
            _refuse_others(root, self.bound)

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint and remove the oldest beyond `keep`."""
        target = self._at(checkpoint.progress.step)
        with whole_directory(target) as partial:
            self._write(checkpoint, partial)
        for old in self._found()[self.keep :]:
            shutil.rmtree(old)
        return target

    def save_alone(self, checkpoint: Checkpoint) -> bool:
        """Write a checkpoint that other processes would write too, and remove none; whether this one has: the first
        that comes does, for the volume has room for one."""
        target = self._at(checkpoint.progress.step)
        if target.exists():
            return False
        try:
            target.with_name(f".{target.name}.claim").mkdir(parents=True)
        except FileExistsError:
            return False
        with whole_directory(target) as partial:
            self._write(checkpoint, partial)
        return True

    def _at(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _write(self, checkpoint: Checkpoint, partial: Path) -> None:
        save_file({name: tensor.cpu().contiguous() for name, tensor in checkpoint.adapter.items()}, partial / _ADAPTER)
        states = {"optimizer": checkpoint.optimizer, "scaler": checkpoint.scaler}
        with (partial / _OPTIMIZER).open("wb") as file:  # opened here, for then it says itself that there is no room
            torch.save(states, file)
        (partial / _PROGRESS).write_text(json.dumps(asdict(checkpoint.progress)), encoding="utf-8")
        manifest = {"binding": self.binding, "bound": self.bound, "files": digests_of(partial)}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")

    def _found(self) -> list[Path]:
        """Newest first."""
        return sorted(self.directory.glob("step-*"), reverse=True) if self.directory.is_dir() else []

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole and bound to this training; what is not is named in the log."""
        for path in self._found():
            if fault := self._fault(path):
                log.info("checkpoint %s is not used: %s", path.name, fault)
                continue
            progress = Progress(**json.loads((path / _PROGRESS).read_text(encoding="utf-8")))
            progress.eval_losses = [(step, loss) for step, loss in progress.eval_losses]
            states = torch.load(path / _OPTIMIZER, map_location="cpu", weights_only=True)
            return Checkpoint(progress, load_file(path / _ADAPTER), states["optimizer"], states["scaler"])
        return None

    def _fault(self, path: Path) -> str | None:
        try:
            manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"no manifest ({error})"
        if manifest.get("binding") != self.binding:
            return "it belongs to another model, data set or recipe"
        found = digests_of(path)
        found.pop(_MANIFEST, None)
        return None if found == manifest.get("files") else "its files are not those of its manifest"


def _refuse_others(root: Path, bound: Mapping[str, Any]) -> None:
    """Raises BadInput when `root` holds checkpoints that can only be of other facts than `bound`.

    Those of an older version do not say of what they are: they are left alone, and the training begins anew.
    """
    said = []
    for manifest in sorted(root.glob(f"*/step-*/{_MANIFEST}")):
        try:
            said.append(json.loads(manifest.read_text(encoding="utf-8"))["bound"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.info("checkpoint %s is not used: it does not say of what training it is (%s)", manifest.parent, error)
    if not said:
        return
    what = "; ".join(differences(said[-1], bound))
    raise BadInput(
        f"the checkpoints in {root} are of another training: {what}. Put that back, or begin anew: apply the job under "
        "another name, or remove the checkpoints"
    )


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """What of `theirs` is not so in `ours`, fact by fact; digests by their beginnings."""

    def said(facts: Mapping[str, Any], name: str) -> str:
        value = facts.get(name, "the default")
        return value[:19] if isinstance(value, str) and value.startswith("sha256:") else str(value)

    names = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    return [f"{name} {said(theirs, name)} → {said(ours, name)}" for name in names]
