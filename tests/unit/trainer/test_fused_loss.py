"""The loss in tiles, beside torch's own cross-entropy of the model's own logits."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qlora_api import heads
from qlora_api.heads import HEADS, ROWS_OF_A_BLOCK, TILE_BYTES, tile_rows
from qlora_operator.sizing.families import FAMILIES
from qlora_trainer.evaluation import mean_loss, summed_loss
from qlora_trainer.failures import BadInput
from qlora_trainer.fused_loss import AfterHead, fuse_head, is_fused, tiled_loss
from qlora_trainer.sequences import NO_LOSS, Sequence, collate
from qlora_trainer.training import train
from tests.unit.families import CONFIGS

from .conftest import Place

CPU = torch.device("cpu")
#: Families whose blocks sizing does not know, with what follows their heads.
BEYOND: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3},
    "gpt_neox": {},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "granite": {"logits_scaling": 8.0},
    "granitemoe": {"logits_scaling": 6.0, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
    "stablelm": {},
    "starcoder2": {},
}
MODELS = CONFIGS | {name: {**CONFIGS["llama"], "model_type": name, **own} for name, own in BEYOND.items()}
MODELS |= {
    "gemma2, low cap": {**CONFIGS["gemma2"], "final_logit_softcapping": 0.5},
    "gemma2, no cap": {**CONFIGS["gemma2"], "final_logit_softcapping": None},
    "gemma3, capped": {**CONFIGS["gemma3"], "final_logit_softcapping": 0.5},
}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of few tokens."""
    monkeypatch.setattr(heads, "TILE_BYTES", 1)
    monkeypatch.setattr(heads, "ROWS_OF_A_BLOCK", 7)


def test_the_families_that_are_known_are_compared():
    assert {config["model_type"] for config in MODELS.values()} == set(HEADS)
    assert set(FAMILIES) <= set(HEADS)


def row(*lengths: int, vocab: int = 500, without_loss: int = 3) -> Sequence:
    dice = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(3, vocab, (sum(lengths),), generator=dice).tolist()
    labels = [NO_LOSS] * without_loss + ids[without_loss:]
    return Sequence(ids, labels, list(lengths))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", MODELS)
def test_every_familys_loss_and_gradient_are_those_of_its_own_logits(name: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**MODELS[name])
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    head = model.get_output_embeddings()
    with torch.no_grad():  # far from zero, so that caps and scales show
        head.weight.mul_(20)
        if head.bias is not None:
            head.bias.normal_()
    model.requires_grad_(False)
    learning = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))[-1]
    for weight in learning.parameters():
        weight.requires_grad_(weight.dim() > 1)
    batch = collate([row(9, 8), row(12)], pad=0)
    found: list[tuple[float, list[torch.Tensor]]] = []
    for fused in (False, True):
        if fused:
            fuse_head(model)
        assert is_fused(model) == fused
        model.zero_grad()
        loss = summed_loss(model, batch, CPU)
        loss.backward()
        gradients = [weight.grad for weight in learning.parameters() if weight.grad is not None]
        found.append((float(loss.detach()), gradients))
    (plain, plains), (tiled, tiles) = found
    assert tiled == pytest.approx(plain, rel=1e-6)
    assert len(plains) == len(tiles) > 0
    for ours, theirs in zip(tiles, plains, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()))


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, after: AfterHead
) -> torch.Tensor:
    """As the models have it."""
    logits = linear(hidden, weight, bias) * after.scale
    if after.cap is not None:
        logits = torch.tanh(logits / after.cap) * after.cap
    return cross_entropy(logits.float(), labels, reduction="sum")


@settings(max_examples=40)
@given(
    tokens=st.integers(0, 40),
    width=st.sampled_from([1, 8, 24]),
    vocab=st.integers(1, 70),
    rows=st.integers(1, 45),
    after=st.builds(AfterHead, st.sampled_from([1.0, 0.25, 3.0]), st.sampled_from([None, 1.5, 30.0])),
    biased=st.booleans(),
    times=st.floats(1e-4, 100.0),
    seed=st.integers(0, 2**31),
)
def test_any_shape_in_any_tiles_gives_autograds_gradient(
    tokens: int, width: int, vocab: int, rows: int, after: AfterHead, biased: bool, times: float, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(vocab, width)
    bias = torch.randn(vocab) if biased else None
    labels = torch.randint(0, vocab, (tokens,))
    start = 3 * torch.randn(tokens, width)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "TILE_BYTES", 1)
        patch.setattr(heads, "ROWS_OF_A_BLOCK", rows)
        for way, dtype in ((reference, torch.float64), (tiled_loss, torch.float32)):
            hidden = start.to(dtype, copy=True).requires_grad_()
            ends = weight.to(dtype), None if bias is None else bias.to(dtype)
            loss = way(hidden, *ends, labels, after)
            (loss * times).backward()
            assert hidden.grad is not None
            results.append((loss.double(), hidden.grad.double()))
    (loss, gradient), (tiled, of_tiles) = results
    torch.testing.assert_close(tiled, loss, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(of_tiles, gradient, rtol=1e-4, atol=1e-5 * times * max(1.0, after.scale) * width)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("after", [AfterHead(), AfterHead(0.25), AfterHead(cap=5.0)])
def test_narrow_types_are_as_near_to_the_truth_as_autograd(dtype: torch.dtype, after: AfterHead) -> None:
    """The loss is that of the same narrow logits; the gradient is little further from fp64's than autograd's own: it is
    rounded once more, when the loss' own gradient comes (measured: 0.0024 against 0.0021 in bfloat16).

    fp16 as the loop has it: the loss per token, times a scaler's first scale.
    """
    torch.manual_seed(0)
    start, weight = torch.randn(50, 32).to(dtype), torch.randn(3000, 32).to(dtype) / 4
    labels = torch.randint(0, 3000, (50,))
    factor = 1024 / 50

    def taken(way: Any, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
        hidden = start.to(dtype, copy=True).requires_grad_()
        loss = way(hidden, weight.to(dtype), None, labels, after)
        (loss * factor).backward()
        assert hidden.grad is not None
        return float(loss.detach()), hidden.grad.double()

    (_, truth), (loss, plain), (tiled, ours) = (
        taken(reference, torch.float64), taken(reference, dtype), taken(tiled_loss, dtype)
    )  # fmt: skip
    assert tiled == pytest.approx(loss, rel=1e-6)
    off, allowed = ((gradient - truth).norm() / truth.norm() for gradient in (ours, plain))
    assert off < 1.3 * allowed
    # nor is all of it off the same way, as it would be by a factor in a narrow type
    assert float((ours * truth).sum() / (truth * truth).sum()) == pytest.approx(1, abs=5e-4)


def test_the_gradient_of_a_loss_is_taken_once() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = tiled_loss(hidden, torch.randn(5, 4), None, torch.tensor([0, 1, 2]), AfterHead())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up by its first backward"):
        loss.backward()


@pytest.mark.parametrize("vocab", [1, 384, 32_000, 128_256, 256_000, 1_000_000])
def test_a_tile_is_bounded_in_bytes_and_whole_blocks(vocab: int) -> None:
    rows = tile_rows(vocab)
    assert rows % ROWS_OF_A_BLOCK == 0 < rows
    assert 4 * vocab * rows <= TILE_BYTES or rows == ROWS_OF_A_BLOCK
    assert 4 * vocab * (rows + ROWS_OF_A_BLOCK) > TILE_BYTES


class Largest(TorchDispatchMode):
    """The most values of tensors as wide as the vocabulary, but the head itself, that were alive at once."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.vocab, self.width = vocab, width
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.shape[-1:] == (self.vocab,) and leaf.shape[0] != self.width:
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes() // 4
            weakref.finalize(storage, self.alive.pop, key, None)
            self.most = max(self.most, sum(self.alive.values()))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("learns", [True, False])
def test_no_logits_of_all_tokens_exist_at_any_moment(learns: bool) -> None:
    """Forward and backward, and evaluation: a tile of 7 tokens at the most, of 157 that carry loss."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**CONFIGS["llama"], "vocab_size": 500, "tie_word_embeddings": True})
    model: Any = LlamaForCausalLM(config)
    model.requires_grad_(False)
    model.model.layers[0].requires_grad_(learns)
    rows = [row(80), row(83)]
    most = {}
    for fused in (False, True):
        if fused:
            fuse_head(model)
        with Largest(500, config.hidden_size) as seen:
            if learns:
                summed_loss(model, collate(rows, pad=0), CPU).backward()
            else:
                mean_loss(model, rows, 2, CPU, pad=0, flat=False)
        most[fused] = seen.most
        assert not seen.alive
    assert most[True] <= 7 * 500
    assert most[False] >= 157 * 500, "whole logits would not be seen"


def test_what_a_fused_head_says_and_writes_is_as_it_was() -> None:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**CONFIGS["llama"])).eval().requires_grad_(False)
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False), list(model.state_dict())
    fuse_head(model)
    with torch.no_grad():
        summed_loss(model, collate([row(9)], pad=0), CPU)
    after = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False), list(model.state_dict())
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert before[2] == after[2]


def test_heads_whose_loss_would_be_another_are_refused() -> None:
    model: Any = LlamaForCausalLM(LlamaConfig(**CONFIGS["llama"]))
    with pytest.raises(BadInput, match="the output head is no frozen linear layer"):
        fuse_head(model)
    model.requires_grad_(False)
    model.config.model_type = "from_tomorrow"
    with pytest.raises(BadInput, match="what from_tomorrow models do to the product of their head is not known"):
        fuse_head(model)


@pytest.mark.parametrize("packing", [True, False])
def test_a_training_in_tiles_has_the_losses_of_one_with_whole_logits(place: Place, packing: bool) -> None:
    """And so has what is held out. Sums of fp32 come out in another order: measured 2e-7 in 6 steps."""
    found = {}
    for fused in (False, True):
        recipe = {"packing": packing, "max_steps": 6}
        order = place.train_order(recipe=recipe, fused_loss=fused, work_dir=str(place.root / f"work-{fused}"))
        result = train(order, place.pod)
        found[fused] = result
    assert found[True].train_loss == pytest.approx(found[False].train_loss, rel=1e-6)
    assert found[True].adapter_digest != found[False].adapter_digest, "the same was run twice"
