"""Memory of one node's host and room on the work volume, item by item, for a training on GPUs."""

from __future__ import annotations

from qlora_api.exchange import ModelShape, Recipe
from qlora_operator.sizing.memory import GIB, PYTHON_BYTES, Item, Memory, lora_parameters, our_training
from qlora_operator.sizing.training import DTYPE_BYTES, Training, decoder_of

#: A process with a GPU over one without: CUDA's libraries, and the driver's side of its context. Not measured yet.
CUDA_HOST_BYTES = 3 * GIB
#: One file of weights is mapped at a time, by all processes of a node together; published ones have at most so much.
SHARD_BYTES = 10 * GIB
#: One on the work volume; what says where examples begin is small beside them, but for examples of a few tokens.
TOKEN_BYTES = 4
#: Reports, logs and the tokenizer.
RESULT_BYTES = GIB


def host_memory(
    shape: ModelShape, recipe: Recipe, *, micro_batch_size: int, gpus_per_node: int = 1, gpus: int | None = None
) -> Memory:
    """Host memory of a node where `gpus_per_node` train and `gpus` share a model (absent: those of the node), in bytes.

    One process per GPU. Optimizers that page are counted as if all of their state had to leave the GPU, which it does
    when the GPU is full.
    """
    gpus = gpus or gpus_per_node
    training = our_training(decoder_of(shape), recipe, micro_batch_size, gpus)
    items = [
        Item("Python and libraries", gpus_per_node * (PYTHON_BYTES + CUDA_HOST_BYTES)),
        Item("mapped weights", min(SHARD_BYTES, shape.bytes_on_disk)),
        Item("loading", gpus_per_node * _largest_part(training)),
    ]
    if recipe.offload == "activations" and recipe.gradient_checkpointing:
        checkpoint = _pinned(training.tokens * shape.hidden_size * training.stream_bytes)
        items.append(Item("offloaded checkpoints", gpus_per_node * shape.layers * checkpoint))
    if recipe.offload == "parameters":
        items.append(Item("offloaded parameters", gpus_per_node * _frozen_bytes(shape, training)))
    if recipe.optimizer.startswith("paged") and gpus == 1:
        trained = _trained(shape, recipe)
        items.append(Item("paged optimizer state", gpus_per_node * int(trained * training.state_bytes)))
    return Memory(tuple(item for item in items if item.bytes))


def disk(
    shape: ModelShape, recipe: Recipe, *, download_bytes: int, checkpoints_kept: int, merged: bool, tokens: int = 0
) -> tuple[Item, ...]:
    """What the work volume holds when the most is on it.

    A checkpoint is the adapter and two fp32 moments; one more is being written while the others are kept. The merged
    model is of the type that the base is stored in. Of `tokens`, all that the data has, each takes 4 bytes.
    """
    adapter = 4 * _trained(shape, recipe)
    items = [
        Item("download", download_bytes),
        Item("prepared data", TOKEN_BYTES * tokens),
        Item("checkpoints", 3 * adapter * (checkpoints_kept + 1)),
        Item("adapter", adapter),
        Item("best adapter", 2 * adapter if recipe.best_metric else 0),  # the next is written beside it
        Item("merged model", shape.parameters * DTYPE_BYTES.get(shape.dtype, 4) if merged else 0),
        Item("results", RESULT_BYTES),
    ]
    return tuple(item for item in items if item.bytes)


def _trained(shape: ModelShape, recipe: Recipe) -> int:
    return lora_parameters(shape, rank=recipe.rank, target_modules=recipe.target_modules, dora=recipe.dora)


def _largest_part(training: Training) -> int:
    """A layer, its experts or the embedding, in the compute type: what is quantised and shared out next.

    The experts that ranks share are read a matrix at a time.
    """
    decoder = training.decoder
    layer = decoder.linear_weights + decoder.other_weights
    shared = training.gpus > 1 or training.offload == "parameters"
    experts = decoder.experts.up.weights * (1 if shared else decoder.experts.number) if decoder.experts else 0
    return max(layer, experts, decoder.embedding_weights) * training.compute_bytes


def _frozen_bytes(shape: ModelShape, training: Training) -> int:
    """One rank's share of the base without the scales, which stay on the GPU."""
    decoder, gpus = training.decoder, training.gpus
    quantised = training.method == "qlora"
    linears = sum(
        linear.copies * _pinned((linear.weights // 2 if quantised else linear.weights * training.compute_bytes) // gpus)
        for linear in decoder.linears
    )
    tables = 1 if decoder.tied_embeddings else 2
    rest = shape.parameters - decoder.layers * decoder.linear_weights - tables * decoder.embedding_weights
    experts = 0
    if decoder.experts:
        per_weight = 0.5 if quantised and decoder.experts.quantized else training.compute_bytes
        sizes = (linear.weights * decoder.experts.number for linear in (decoder.experts.up, decoder.experts.down))
        experts = decoder.experts.layers * sum(_pinned(int(size * per_weight) // gpus) for size in sizes)
        rest -= decoder.experts.layers * decoder.experts.weights
    return (
        decoder.layers * linears
        + experts
        + tables * _pinned(decoder.embedding_weights * training.stream_bytes // gpus)
        + max(0, rest) * training.stream_bytes // gpus
    )


def _pinned(size_bytes: int) -> int:
    """What page-locked memory for `size_bytes` takes: the next power of two (torch's CachingHostAllocator)."""
    return 1 << max(0, size_bytes - 1).bit_length()
