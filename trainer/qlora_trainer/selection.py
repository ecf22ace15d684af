"""Which of a training's adapters leaves: the best one at any evaluation, kept beside the checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from qlora_api.exchange import Recipe
from qlora_trainer.adapter import load_adapter
from qlora_trainer.artifacts import file_digest, whole_directory
from qlora_trainer.checkpoint import Progress
from qlora_trainer.early_stopping import has_stopped_gaining, is_gain
from qlora_trainer.environment import log
from qlora_trainer.ranks import ALONE, Ranks
from qlora_trainer.scores import higher_is_better

_ADAPTER, _RECORD = "adapter.safetensors", "selection.json"
Verdict = Literal["go on", "stop"]


class Selection:
    """Looks on at each evaluation; keeps the best adapter in `directory`, bound as the checkpoints are.

    `weights` gives the adapter whole, `figures` what is measured of it besides the evaluation loss; all `ranks` ask for
    both, and the first writes. What it decides is noted in `progress`, so that a training that is resumed decides the
    same.
    """

    def __init__(
        self,
        recipe: Recipe,
        progress: Progress,
        directory: Path,
        *,
        binding: str,
        steps_per_epoch: int,
        weights: Callable[[], dict[str, torch.Tensor]],
        figures: Callable[[], dict[str, float]] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.metric = recipe.best_metric
        self._patience = recipe.early_stopping_epochs
        self._steps_per_epoch = steps_per_epoch
        self._directory, self._binding = directory, binding
        self._weights, self._figures, self._ranks = weights, figures, ranks
        if kept := ranks.from_first(self._kept):  # it may be newer than the checkpoint that the training goes on from
            progress.best_step, progress.best_value = kept["step"], kept["value"]
        else:
            progress.best_step = progress.best_value = None

    @property
    def measures(self) -> bool:
        """Whether there is something to look at besides held-out examples."""
        return self._figures is not None

    def looked(self, progress: Progress, eval_loss: float | None) -> Verdict:
        """Note an evaluation after `progress.step`, keep the adapter if it is the best, and say whether to go on."""
        found: dict[str, float] = {"step": progress.step}
        if eval_loss is not None:
            found["evalLoss"] = eval_loss
        if self._figures:
            found |= self._figures()
        found = self._ranks.from_first(lambda: found)  # all decide by the same figures
        progress.looks.append(found)
        log.info("step %d: %s", progress.step, ", ".join(f"{n} {v:.4f}" for n, v in found.items() if n != "step"))
        if self.metric is None or (value := found.get(self.metric)) is None:
            return "go on"
        if is_gain(value, progress.best_value, higher_is_better=higher_is_better(self.metric)):
            progress.best_step, progress.best_value = progress.step, value
            self._keep(progress)
            return "go on"
        if not has_stopped_gaining(
            progress.step, progress.best_step, patience_epochs=self._patience, steps_per_epoch=self._steps_per_epoch
        ):
            return "go on"
        log.info("no gain in %s for %s epochs, since step %s: that is enough", self.metric, self._patience,
                 progress.best_step)  # fmt: skip
        return "stop"

    def put_back(self, model: Any, progress: Progress) -> int | None:
        """Give the model its best adapter; the step that it is of, None where that is the newest anyway."""
        if self.metric is None or progress.best_step in (None, progress.step):
            return None
        load_adapter(model, self._ranks.from_first(lambda: load_file(self._directory / _ADAPTER)))
        log.info("the adapter of step %d leaves: %s %.4f", progress.best_step, self.metric, progress.best_value)
        return progress.best_step

    def _keep(self, progress: Progress) -> None:
        weights = self._weights()
        if self._ranks.first:
            self._write(weights, progress)
        self._ranks.wait()

    def _write(self, weights: dict[str, torch.Tensor], progress: Progress) -> None:
        with whole_directory(self._directory) as partial:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
            save_file(tensors, partial / _ADAPTER)
            record = {
                "binding": self._binding,
                "metric": self.metric,
                "step": progress.best_step,
                "value": progress.best_value,
                "digest": file_digest(partial / _ADAPTER),
            }
            (partial / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def _kept(self) -> dict[str, Any] | None:
        """The record of the adapter that is kept; None where there is none of this training, or it is damaged."""
        try:
            record = json.loads((self._directory / _RECORD).read_text(encoding="utf-8"))
            whole = record["digest"] == file_digest(self._directory / _ADAPTER)
        except (OSError, ValueError, KeyError):
            return None
        return record if whole and record["binding"] == self._binding else None
