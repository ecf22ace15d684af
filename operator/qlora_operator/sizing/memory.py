"""Memory of one training process on one GPU, item by item: the closed formula.

For a decoder of L layers and hidden size h, T tokens per micro-batch, checkpointing every layer. Sources per
item are in the docstrings. Compared with measurements in tests/unit/operator/test_sizing.py; what it does not model
(fused kernels, several GPUs) is refused before it gets here.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_api.exchange import ModelShape, Recipe

GIB = 1024**3

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: Bytes of optimizer state per trained weight: two moments, in fp32 or in 8 bit with their scales.
OPTIMIZER_BYTES = {
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "paged_adamw_32bit": 8.0,
    "adamw_8bit": 2.03,
    "adamw_bnb_8bit": 2.03,
    "paged_adamw_8bit": 2.03,
}
#: cuBLAS workspaces and the allocator's rounding, once per process (measured: a reserved floor of 0.3 GiB on a T4).
WORKSPACE_BYTES = int(0.3 * GIB)
#: The driver's context, outside the allocator: 0.3 GiB on a T4, up to 0.6 on Hopper.
CUDA_CONTEXT_BYTES = int(0.6 * GIB)
#: Reserved but unused between blocks: the allocator keeps what steps of different shapes left behind.
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Item:
    """One line of the memory plan."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Memory:
    """The plan: what is resident, what a step adds, and what the process costs by itself."""

    items: tuple[Item, ...]

    @property
    def total_bytes(self) -> int:
        return sum(item.bytes for item in self.items)


def linear_parameters(shape: ModelShape) -> int:
    """Weights in the blocks' linear layers: what is quantised."""
    return sum(m.in_features * m.out_features * m.count for m in shape.linear)


def lora_parameters(shape: ModelShape, *, rank: int, target_modules: list[str]) -> int:
    """Weights of the adapter: r·(in + out) per adapted linear layer. LoRA, Hu et al. 2021, section 4.1."""
    return sum(rank * (m.in_features + m.out_features) * m.count for m in shape.linear if m.name in target_modules)


def absmax_bytes(parameters: int, *, double_quant: bool) -> int:
    """Bytes of 4-bit scale factors for `parameters` weights.

    One fp32 per 64 weights (0.0625 B/weight); double quantisation stores them as 8-bit with one fp32 per 256 of
    them (0.0159 B/weight). QLoRA, Dettmers et al. 2023, section 3.
    """
    blocks = -(-parameters // 64)
    return blocks + 4 * -(-blocks // 256) if double_quant else 4 * blocks


def training_memory(shape: ModelShape, recipe: Recipe, *, micro_batch_size: int, gpu: bool = True) -> Memory:
    """Peak memory of training `shape` by `recipe` with `micro_batch_size` sequences at a time, in bytes.

    `gpu=False` gives the process' resident memory on a CPU: no context, and bf16 work is done in fp32.
    """
    compute = DTYPE_BYTES[recipe.compute_dtype]
    linear = linear_parameters(shape)
    other = shape.parameters - linear
    adapter = lora_parameters(shape, rank=recipe.rank, target_modules=recipe.target_modules)
    tokens = micro_batch_size * recipe.max_length
    if recipe.method == "qlora":
        base = [
            Item("base weights, 4 bit", -(-linear // 2)),
            Item("quantisation scales", absmax_bytes(linear, double_quant=recipe.double_quant)),
            Item("base weights, not quantised", other * compute),
            Item("largest layer, dequantised", dequantised_bytes(shape, compute)),
        ]
    else:
        base = [Item("base weights", shape.parameters * compute)]
    work = [
        Item("adapter weights and gradients, fp32", 8 * adapter),
        Item("optimizer state", int(OPTIMIZER_BYTES.get(recipe.optimizer, 8.0) * adapter)),
        Item("activations", activation_bytes(shape, recipe, tokens=tokens, compute=compute)),
        Item("logits and loss", logits_bytes(shape, tokens=tokens, compute=compute)),
    ]
    items = [*base, *work]
    fragmentation = int(FRAGMENTATION * sum(item.bytes for item in items))
    items.append(Item("fragmentation", fragmentation))
    if gpu:
        items += [Item("workspaces", WORKSPACE_BYTES), Item("CUDA context", CUDA_CONTEXT_BYTES)]
    else:
        items.append(Item("Python and libraries", GIB))
    return Memory(tuple(item for item in items if item.bytes))


def dequantised_bytes(shape: ModelShape, compute: int) -> int:
    """One layer's weight in the compute type, twice: bitsandbytes dequantises for each product above 1536 tokens."""
    return 2 * compute * max((m.in_features * m.out_features for m in shape.linear), default=0)


def activation_bytes(shape: ModelShape, recipe: Recipe, *, tokens: int, compute: int) -> int:
    """What forward keeps for backward, for `tokens` tokens.

    With checkpointing: each layer's input (h) once, and one layer in full while it is recomputed. Without: all
    layers in full. A layer in full, per token: residuals and norms (8h: two of them in fp32), q, k, v and the attention
    output, gate, up, their product and its input (4·intermediate), and per adapted linear layer its dropped-out input
    in the adapter's fp32 with its rank-sized product. Attention scores are counted for `eager` only:
    12 bytes per score (measured: 10 to 15 on a T4). After Korthikanti et al. 2022, section 4, for gated MLPs and GQA.
    """
    h = shape.hidden_size
    q = shape.heads * shape.head_dim
    kv = shape.kv_heads * shape.head_dim
    per_layer = {m.name: m for m in shape.linear if m.name in recipe.target_modules}
    adapted = sum(4 * m.in_features + 4 * recipe.rank for m in per_layer.values())
    layer = compute * (8 * h + 2 * q + 2 * kv + 4 * shape.intermediate_size) + adapted
    if recipe.attention == "eager":
        layer += 12 * shape.heads * recipe.max_length
    if recipe.gradient_checkpointing:
        return tokens * (shape.layers * h * compute + layer)
    return tokens * shape.layers * layer


def logits_bytes(shape: ModelShape, *, tokens: int, compute: int) -> int:
    """Logits in the compute type, their fp32 copy, its softmax and gradient: `tokens` × vocabulary."""
    return tokens * shape.vocab_size * (compute + 12)
