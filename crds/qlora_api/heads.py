"""What becomes of the output head's product, family by family, and whether its loss is taken in tiles of tokens.

The operator sizes by it and the trainer computes by it: what is planned and what is run is decided here.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_api.exchange import ModelShape

#: fp32 logits of one tile, in bytes. The head's weight is read once for each tile, so a tile needs more tokens than a
#: GPU does FLOPs in the time of reading a byte (H100: 295), or the product waits for memory. 512 MiB are 1024 tokens of
#: Llama 3's 128,256 words and 512 of Gemma's 256,000, and less than a layer of a large model takes in its backward.
TILE_BYTES = 512 * 1024**2
#: Matrix products on GPUs are cut into blocks of so many rows.
ROWS_OF_A_BLOCK = 128


@dataclass(frozen=True)
class Head:
    """Settings of config.json by which a family turns its head's product into logits, in this order; "": it does not.

    `cap`: c·tanh(x/c), unless it is null.
    """

    times: str = ""
    over: str = ""
    cap: str = ""


_PLAIN = Head()
_GRANITE = Head(over="logits_scaling")
_COHERE = Head(times="logit_scale")
_GEMMA = Head(cap="final_logit_softcapping")
#: By config.json's `model_type`, as transformers 5.23 has them. Of others nothing is known.
HEADS: dict[str, Head] = {
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "deepseek_v2": _PLAIN,
    "deepseek_v3": _PLAIN,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt_neox": _PLAIN,
    "gpt_oss": _PLAIN,
    "granite": _GRANITE,
    "granitemoe": _GRANITE,
    "llama": _PLAIN,
    "mistral": _PLAIN,
    "mixtral": _PLAIN,
    "olmo2": _PLAIN,
    "olmoe": _PLAIN,
    "phi": _PLAIN,
    "phi3": _PLAIN,
    "qwen2": _PLAIN,
    "qwen2_moe": _PLAIN,
    "qwen3": _PLAIN,
    "qwen3_moe": _PLAIN,
    "stablelm": _PLAIN,
    "starcoder2": _PLAIN,
}


def takes_loss_in_tiles(shape: ModelShape) -> bool:
    """Whether a training of `shape` computes its loss tile by tile, so that the logits never exist at once.

    Its head is never adapted: it is not among the linear layers that a recipe may name.
    """
    return shape.family in HEADS


def tile_rows(vocab_size: int) -> int:
    """Tokens whose logits exist at once."""
    return max(1, TILE_BYTES // (4 * vocab_size * ROWS_OF_A_BLOCK)) * ROWS_OF_A_BLOCK
