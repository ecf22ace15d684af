"""What the memory of a training depends on: the decoder, the recipe, and the habits of the trainer that runs it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from qlora_api.exchange import ModelShape

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

#: Names of the linear layers of the attention: its inputs, in one layer or in three, and its output.
_SEPARATE = ("q_proj", "k_proj", "v_proj")
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "W_pack", "wqkv", "Wqkv")
_ATTENTION_OUT = ("o_proj", "out_proj", "wo", "dense")


@dataclass(frozen=True)
class Linear:
    """A linear layer of one block: `copies` of `outputs` × `inputs` weights (experts are copies)."""

    name: str
    inputs: int
    outputs: int
    copies: int = 1

    @property
    def weights(self) -> int:
        """Weights of one copy."""
        return self.inputs * self.outputs

    @property
    def all_weights(self) -> int:
        return self.copies * self.weights


@dataclass(frozen=True)
class Decoder:
    """A transformer whose blocks are alike: attention and an MLP, each behind a norm."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    #: Queries, keys and values, or one layer for all three; none where the names say nothing.
    attention_in: tuple[Linear, ...]
    attention_out: Linear | None
    #: The gate and what it gates, or one layer.
    mlp_in: tuple[Linear, ...]
    mlp_out: Linear | None
    #: Linear layers whose role is not known: taken to run beside the MLP, with outputs that are kept.
    others: tuple[Linear, ...]
    #: Weights of a block that are in no linear layer: norms and biases.
    other_weights: int

    @property
    def linears(self) -> tuple[Linear, ...]:
        ends = tuple(linear for linear in (self.attention_out, self.mlp_out) if linear)
        return (*self.attention_in, *self.mlp_in, *ends, *self.others)

    @property
    def linear_weights(self) -> int:
        """Weights of a block's linear layers."""
        return sum(linear.all_weights for linear in self.linears)

    @property
    def embedding_weights(self) -> int:
        return self.vocab_size * self.hidden_size


def decoder_of(shape: ModelShape) -> Decoder:
    """The blocks of `shape`, with each linear layer in its role.

    Layers of the attention are told by name. Of the others, the first that comes back to the hidden size from another
    ends the MLP, and the first two that leave it begin it. Where one of these is missing, none has a role.
    """
    linears = [
        Linear(module.name, module.in_features, module.out_features, -(-module.count // shape.layers))
        for module in shape.linear
    ]
    named = {linear.name: linear for linear in linears}
    attention_in = tuple(named[name] for name in _SEPARATE if name in named)
    if len(attention_in) < len(_SEPARATE):
        attention_in = tuple(named[name] for name in _FUSED if name in named)[:1]
    attention_out = next((named[name] for name in _ATTENTION_OUT if name in named), None)
    rest = [linear for linear in linears if linear not in (*attention_in, attention_out)]
    hidden = shape.hidden_size
    mlp_out = next((linear for linear in rest if linear.outputs == hidden != linear.inputs), None)
    mlp_in = tuple(linear for linear in rest if linear.inputs == hidden != linear.outputs)[:2]
    if not mlp_in or not mlp_out:
        mlp_in, mlp_out = (), None
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tied_embeddings else 2)
    in_linears = sum(module.in_features * module.out_features * module.count for module in shape.linear)
    return Decoder(
        layers=shape.layers,
        hidden_size=shape.hidden_size,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        tied_embeddings=shape.tied_embeddings,
        attention_in=attention_in,
        attention_out=attention_out,
        mlp_in=mlp_in,
        mlp_out=mlp_out,
        others=tuple(linear for linear in rest if linear not in (*mlp_in, mlp_out)),
        other_weights=max(0, shape.parameters - embeddings - in_linears) // shape.layers,
    )


@dataclass(frozen=True)
class Training:
    """One rank's training: everything that its memory depends on, and nothing else."""

    decoder: Decoder
    method: Literal["qlora", "lora"]
    double_quant: bool
    compute_bytes: int
    rank: int
    adapted: frozenset[str]
    dropout: bool
    max_length: int
    micro_batch_size: int
    gradient_checkpointing: bool
    attention: Literal["eager", "sdpa", "flash"]
    #: Bytes of optimizer state per trained weight.
    state_bytes: float
    #: Bytes per trained weight that the optimizer needs while it steps (torch updates all weights at once).
    update_bytes: float = 0.0
    #: Bytes per weight of the adapter, its gradient and its arithmetic.
    adapter_bytes: int = 4
    #: Norms and embeddings in fp32 under qlora, and the residual stream with them (PEFT's k-bit preparation).
    norm_embed_fp32: bool = False
    #: Matrix products in the compute type whatever their inputs are (torch.autocast).
    autocast: bool = False
    #: Whether the logits outlive the loss, as the output of the model in the caller's hands.
    keeps_logits: bool = False
    #: Cross-entropy in tiles of the head's product, so that the logits are never whole (TRL's `loss_type="nll"`).
    fused_loss: bool = False
    #: Tokens that must not see one another are kept apart by a mask: packed examples, or padding.
    masked: bool = False
    #: Several micro-batches per step: all but the first begin with the gradients of those before.
    accumulates: bool = False
    #: Keys and values are repeated for each head that shares them before the attention kernel.
    expands_heads: bool = False
    #: The base is quantised whole on each GPU before it is shared out; else layer by layer.
    loads_whole: bool = False
    #: GPUs that share the weights (FSDP).
    gpus: int = 1
    #: What waits in host memory until it is needed: activation checkpoints, or the frozen base.
    offload: Literal["none", "activations", "parameters"] = "none"

    @property
    def tokens(self) -> int:
        """Tokens per micro-batch."""
        return self.micro_batch_size * self.max_length

    @property
    def pairs(self) -> int:
        """Pairs of tokens of the same sequence in a micro-batch."""
        return self.micro_batch_size * self.max_length**2

    @property
    def stream_bytes(self) -> int:
        """Bytes per value of the residual stream, norms and embeddings."""
        return 4 if self.norm_embed_fp32 and self.method == "qlora" and not self.autocast else self.compute_bytes

    def adapter_weights(self, linear: Linear) -> tuple[int, ...]:
        """Weights of the two factors of the adapter on `linear`, none if it has none. LoRA, Hu et al. 2021, 4.1."""
        if linear.name not in self.adapted:
            return ()
        return linear.copies * self.rank * linear.inputs, linear.copies * self.rank * linear.outputs


def with_layers(training: Training, layers: int) -> Training:
    """The same training of a decoder with so many of the layers."""
    return replace(training, decoder=replace(training.decoder, layers=layers))
