"""What families of decoders have in their blocks beside, or instead of, what Llama has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """How the blocks of a family work, as transformers builds them; the default is Llama."""

    #: Norms behind attention and MLP too, before their outputs join the residual stream.
    post_norms: bool = False
    #: Queries and keys are normed, head by head.
    head_norms: bool = False
    #: The norm multiplies with its weight in fp32 (Gemma).
    wide_norms: bool = False
    #: torch's LayerNorm, one kernel, instead of RMSNorm.
    layer_norms: bool = False
    #: Attention and MLP side by side behind one norm.
    parallel: bool = False
    #: GELU by way of tanh, written out operation by operation instead of one kernel.
    written_gelu: bool = False
    #: cap·tanh(x/cap) over the logits, and over the scores, which torch's fused attention cannot do.
    caps_logits: bool = False
    caps_scores: bool = False
    #: Some layers look back a window, others to the start: two masks.
    alternates: bool = False
    #: The weights that a router gives its experts are in the compute type, else in fp32.
    narrow_routers: bool = False


LLAMA = Family()
#: By config.json's `model_type`.
FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": Family(head_norms=True),
    "gemma2": Family(post_norms=True, wide_norms=True, caps_logits=True, caps_scores=True, alternates=True),
    "gemma3_text": Family(post_norms=True, head_norms=True, wide_norms=True, alternates=True),
    "phi3": LLAMA,
    "phi": Family(layer_norms=True, parallel=True, written_gelu=True),
    "mixtral": LLAMA,
    "qwen3_moe": Family(head_norms=True, narrow_routers=True),
    "deepseek_v2": LLAMA,
    "deepseek_v3": LLAMA,
}
