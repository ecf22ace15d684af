"""Model FLOPs utilisation: the work that learning takes, beside what the device could do in that time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from qlora_api.exchange import ModelShape
from qlora_trainer.sequences import Sequence


@dataclass(frozen=True)
class Work:
    """What an optimizer step takes by the model's arithmetic, however it is computed."""

    shape: ModelShape
    adapter_parameters: int
    peak: float | None = None  # FLOPs per second; None: not known, and neither is the utilisation

    def flops(self, sequences: list[Sequence]) -> float:
        """FLOPs of a step over `sequences`: those that the result needs, none for recomputed activations.

        The count of PaLM (Chowdhery et al. 2022, appendix B) with what is frozen left out: per token, 2 FLOPs a weight
        forward and 2 backward to the activations; the 2 for a weight's own gradient (Kaplan et al. 2020, table 1)
        only for the adapter. That is 2/3 of a full fine-tune, as Schulman et al. 2025 ("LoRA Without Regret") count it.
        Attention takes 12·heads·width·length per token and layer, not halved for causality, as in PaLM; `length` is the
        example's own, for packed examples do not see one another. The output head counts where there is loss:
        nowhere else is it needed.
        """
        per_token, per_loss_token, per_pair = self._rates
        tokens = sum(len(sequence.ids) for sequence in sequences)
        loss_tokens = sum(sequence.loss_tokens for sequence in sequences)
        pairs = sum(length * length for sequence in sequences for length in sequence.lengths)
        return tokens * per_token + loss_tokens * per_loss_token + pairs * per_pair

    @cached_property
    def _rates(self) -> tuple[float, float, float]:
        """FLOPs per token, per token that carries loss, and per pair of tokens of an example."""
        shape = self.shape
        linear = sum(module.in_features * module.out_features * module.count for module in shape.linear)
        # of routed experts, those that work on a token
        linear += sum(weights.weights // weights.experts for weights in shape.experts) * shape.experts_per_token
        return (
            4.0 * linear + 6.0 * self.adapter_parameters,
            4.0 * shape.vocab_size * shape.hidden_size,
            12.0 * shape.layers * shape.heads * shape.head_dim,
        )

    def mfu(self, flops: float, seconds: float) -> float | None:
        """Share of the device's peak that `flops` in `seconds` are."""
        return flops / seconds / self.peak if self.peak and seconds else None
