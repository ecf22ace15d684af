"""What the memory of a training depends on: the decoder, the recipe, and the habits of the trainer that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from qlora_api.exchange import LinearModule, ModelShape
from qlora_api.heads import takes_loss_in_tiles
from qlora_operator.sizing.families import FAMILIES, LLAMA, Family

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

#: Names of the linear layers of the attention: its inputs, in one layer, in three or by way of latents, and its output.
_LATENT = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
_SEPARATE = ("q_proj", "k_proj", "v_proj")
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "W_pack", "wqkv", "Wqkv")
_ATTENTION_OUT = ("o_proj", "out_proj", "wo", "dense")
#: Names of the MLP's output, for the MLP that is as wide as the residual stream.
_MLP_OUT = ("down_proj", "fc2", "c_proj", "w2", "dense_4h_to_h")


@dataclass(frozen=True)
class Linear:
    """A linear layer of one block: `copies` of `outputs` × `inputs` weights.

    No copies: not every block has it. All are walked as if they had, and its weights are counted apart.
    """

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
class Latent:
    """Multi-head latent attention (DeepSeek-V2, Liu et al. 2024, section 2.1): widths of the parts of one head.

    Queries and keys have a part with positions (`rope`), which all heads' keys share, and one without (`nope`).
    """

    rank: int
    nope: int
    rope: int
    value: int


@dataclass(frozen=True)
class Experts:
    """Routed experts: `number` in each of `layers`, of which `per_token` work on each token."""

    up: Linear
    down: Linear
    number: int
    per_token: int
    layers: int
    quantized: bool

    @property
    def weights(self) -> int:
        """Weights of one layer's."""
        return self.number * (self.up.weights + self.down.weights)


@dataclass(frozen=True)
class Decoder:
    """A transformer whose blocks are alike: attention and an MLP or experts, each behind a norm.

    Where blocks differ, all are walked as the largest kind; the weights are those of each.
    """

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
    family: Family = LLAMA
    #: What its head's product becomes is known, so that our trainer takes the loss in tiles.
    loss_in_tiles: bool = False
    #: Tokens that layers look back, where some do not look back to the start.
    sliding_window: int | None = None
    latent: Latent | None = None
    experts: Experts | None = None
    #: Linear layers that not every block has, with as many copies as there are.
    unlike: tuple[Linear, ...] = ()

    @property
    def value_dim(self) -> int:
        """Width of one head's values."""
        return self.latent.value if self.latent else self.head_dim

    @property
    def linears(self) -> tuple[Linear, ...]:
        ends = tuple(linear for linear in (self.attention_out, self.mlp_out) if linear)
        return (*self.attention_in, *self.mlp_in, *ends, *self.others)

    @property
    def linear_weights(self) -> int:
        """Weights of the linear layers that every block has."""
        return sum(linear.all_weights for linear in self.linears)

    @property
    def gathered_weights(self) -> int:
        """Weights of all linear layers of the largest kind of block."""
        return sum(max(1, linear.copies) * linear.weights for linear in self.linears)

    @property
    def embedding_weights(self) -> int:
        return self.vocab_size * self.hidden_size


def decoder_of(shape: ModelShape) -> Decoder:
    """The blocks of `shape`, with each linear layer in its role.

    Layers of the attention are told by name. Of the others, the first that comes back to the hidden size from another
    ends the MLP, and the first two that leave it begin it. Where one of these is missing, none has a role.
    """
    walked = [module for module in shape.linear if not _instead_of_experts(shape, module)]
    linears = [
        Linear(module.name, module.in_features, module.out_features, module.count // shape.layers) for module in walked
    ]
    unlike = tuple(
        Linear(module.name, module.in_features, module.out_features, left)
        for module in shape.linear
        if (left := module.count % shape.layers if module in walked else module.count)
    )
    named = {linear.name: linear for linear in linears}
    attention_out = next((named[name] for name in _ATTENTION_OUT if name in named), None)
    latent = _latent_of(named, attention_out, shape.heads)
    if latent:
        attention_in = tuple(named[name] for name in _LATENT if name in named)
    else:
        attention_in = tuple(named[name] for name in _SEPARATE if name in named)
        if len(attention_in) < len(_SEPARATE):
            attention_in = tuple(named[name] for name in _FUSED if name in named)[:1]
    rest = [linear for linear in linears if linear not in (*attention_in, attention_out)]
    hidden = shape.hidden_size
    mlp_out = next((linear for linear in rest if linear.outputs == hidden and linear.name in _MLP_OUT), None)
    mlp_out = mlp_out or next((linear for linear in rest if linear.outputs == hidden != linear.inputs), None)
    mlp_in: tuple[Linear, ...] = ()
    if mlp_out:
        widths = (mlp_out.inputs, 2 * mlp_out.inputs)
        mlp_in = tuple(x for x in rest if x.inputs == hidden and x.outputs in widths and x != mlp_out)[:2]
    if not mlp_in:
        mlp_out = None
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tied_embeddings else 2)
    counted = sum(module.in_features * module.out_features * module.count for module in shape.linear)
    counted += embeddings + sum(weights.weights for weights in shape.experts)
    return Decoder(
        layers=shape.layers,
        hidden_size=shape.hidden_size,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=latent.nope + latent.rope if latent else shape.head_dim,
        vocab_size=shape.vocab_size,
        tied_embeddings=shape.tied_embeddings,
        attention_in=attention_in,
        attention_out=attention_out,
        mlp_in=mlp_in,
        mlp_out=mlp_out,
        others=tuple(linear for linear in rest if linear not in (*mlp_in, mlp_out)),
        other_weights=max(0, shape.parameters - counted) // shape.layers,
        family=FAMILIES.get(shape.family, LLAMA),
        loss_in_tiles=takes_loss_in_tiles(shape),
        sliding_window=shape.sliding_window,
        latent=latent,
        experts=_experts_of(shape),
        unlike=unlike,
    )


def _instead_of_experts(shape: ModelShape, module: LinearModule) -> bool:
    """Whether `module` is of the MLP that some blocks of a mixture have in the experts' place."""
    blocks = shape.layers - max((weights.count for weights in shape.experts), default=shape.layers)
    return 0 < blocks == module.count and shape.intermediate_size in (module.in_features, module.out_features)


def _latent_of(named: Mapping[str, Linear], out: Linear | None, heads: int) -> Latent | None:
    down, up = named.get("kv_a_proj_with_mqa"), named.get("kv_b_proj")
    if not down or not up or not out:
        return None
    value = out.inputs // heads
    return Latent(rank=up.inputs, nope=up.outputs // heads - value, rope=down.outputs - up.inputs, value=value)


def _experts_of(shape: ModelShape) -> Experts | None:
    """The two products of routed experts; None where they are not known as such."""
    up = next((weights for weights in shape.experts if weights.in_features == shape.hidden_size), None)
    down = next((weights for weights in shape.experts if weights != up), None)
    if not up or not down:
        return None
    return Experts(
        Linear(up.name, up.in_features, up.out_features),
        Linear(down.name, down.in_features, down.out_features),
        up.experts,
        shape.experts_per_token,
        up.count,
        shape.experts_quantized,
    )


def attention_by_default(shape: ModelShape) -> str:
    """The attention kernel unless another is asked for: torch's own, which cannot cap scores."""
    return "eager" if FAMILIES.get(shape.family, LLAMA).caps_scores else "sdpa"


def adapted_by_default(shape: ModelShape) -> list[str]:
    """Names of the linear layers that get an adapter unless others are asked for.

    All, as QLoRA has it (Dettmers et al. 2023, section 4), but the attention alone in a mixture of experts: PEFT's
    adapters do not reach experts that are one tensor, and a layer they share would learn without them.
    """
    decoder = decoder_of(shape)
    ends = (decoder.attention_out,) if decoder.attention_out else ()
    if shape.experts and decoder.attention_in:
        return sorted({linear.name for linear in (*decoder.attention_in, *ends)})
    return sorted({module.name for module in shape.linear})


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
    #: Magnitudes are learned apart from directions (DoRA).
    dora: bool = False
    #: The 4 bits are HQQ's, which torch alone dequantises; else bitsandbytes'.
    half_quadratic: bool = False
    #: The adapter starts as what quantisation takes away (LoftQ).
    makes_good: bool = False
    #: Norms and embeddings in fp32 under qlora, and the residual stream with them (PEFT's k-bit preparation).
    norm_embed_fp32: bool = False
    #: Matrix products in the compute type whatever their inputs are (torch.autocast).
    autocast: bool = False
    #: Whether the logits outlive the loss, as the output of the model in the caller's hands.
    keeps_logits: bool = False
    #: From whole logits by torch's cross-entropy, or in tiles of the head's product: our trainer's (`fused_loss.py`
    #: there), or TRL's (`loss_type="nll"`).
    loss: Literal["logits", "tiles", "trl"] = "logits"
    #: Tokens that must not see one another are kept apart by a mask: packed examples, padding, or a window's end.
    masked: bool = False
    #: How many of them there are: layers that look back a window have their own.
    masks: int = 1
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
        """Weights of the two factors of the adapter on `linear`, none if it has none. LoRA, Hu et al. 2021, 4.1.

        A DoRA has a magnitude for each output beside them (Liu et al. 2024, section 4.1).
        """
        if linear.name not in self.adapted:
            return ()
        factors = linear.copies * self.rank * linear.inputs, linear.copies * self.rank * linear.outputs
        return (*factors, linear.copies * linear.outputs) if self.dora else factors


def with_layers(training: Training, layers: int) -> Training:
    """The same training of a decoder with so many of the layers."""
    return replace(training, decoder=replace(training.decoder, layers=layers))
