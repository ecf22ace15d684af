"""A decoder's layer as the memory it allocates, operation by operation.

Written to be read beside the code it stands for: transformers' Llama (RMSNorm, rotary embedding, grouped-query
attention, SwiGLU MLP), PEFT's LoRA layers, bitsandbytes' 4-bit products. One PyTorch operation is one `op` here; what
autograd keeps for it is in `saves`, what its backward allocates in `Into`.
"""

from __future__ import annotations

from collections.abc import Sequence

from qlora_api.exchange import EXPERTS_AT_ONCE_BYTES
from qlora_operator.sizing.tensors import Into, Storage, Tape, Tensor, Trace
from qlora_operator.sizing.training import Experts, Latent, Linear, Training

ATTENTION = "attention"
MLP = "MLP"
NORM = "norms and residuals"


class Layers:
    """The operations of one training, on tensors of `trace`."""

    def __init__(self, training: Training, trace: Trace) -> None:
        self.training, self.trace = training, trace

    def cast(self, tape: Tape, x: Tensor, itemsize: int, purpose: str) -> Tensor:
        if x.itemsize == itemsize:
            return x
        return tape.op(purpose, x.elements, itemsize, [Into(x.key, x.elements * x.itemsize)])

    def _frozen(self, tape: Tape, x: Tensor, linear: Linear, purpose: str) -> Tensor:
        """A product with a frozen weight, which keeps nothing; one of 4 bits is dequantised forwards and backwards."""
        training, compute = self.training, self.training.compute_bytes
        tokens, incoming = training.tokens, x.itemsize
        if training.method == "qlora" or training.autocast:
            x = self.cast(tape, x, compute, purpose)
        unpacked = linear.weights * compute if training.method == "qlora" else 0
        size, out_size = (tokens * width * x.itemsize for width in (linear.inputs, linear.outputs))
        # HQQ has codes, codes less zero point and their multiple in hand before the product; and it keeps its input
        before, out_before = (max(0, 2 * unpacked - made) * training.half_quadratic for made in (size, out_size))
        scratch = tuple(part for part in (unpacked, before) if part)
        into = Into(x.key, size, scratch=scratch)
        saves = [x] if training.half_quadratic else []
        out = tape.op(purpose, tokens * linear.outputs, x.itemsize, [into], scratch=unpacked + out_before, saves=saves)
        if training.method == "qlora":
            out = self.cast(tape, out, incoming, purpose)
        return out

    def _linear(self, tape: Tape, x: Tensor, linear: Linear, purpose: str) -> Tensor:
        """W·x, and on an adapted layer + s·B·A·dropout(x)."""
        training = self.training
        result = self._frozen(tape, x, linear, purpose)
        if linear.name not in training.adapted:
            return result
        tokens, itemsize = training.tokens, result.itemsize
        bitsandbytes = training.method == "qlora" and not training.half_quadratic
        if bitsandbytes:  # PEFT copies the result before it adds to it
            result = tape.op(purpose, result.elements, itemsize, [Into(result.key, None)])
        if not training.autocast:
            x = self.cast(tape, x, training.adapter_bytes, purpose)
        _in_hand = x  # PEFT's variable, until the layer returns
        if training.dropout:
            mask = tape.tensor(self.trace.new(x.elements, purpose), x.elements, 1)
            x = tape.op(purpose, x.elements, x.itemsize, [Into(x.key, x.elements * x.itemsize)], saves=[mask])
            del mask
        if training.autocast:
            x = self.cast(tape, x, training.compute_bytes, purpose)
        size = x.itemsize
        first, second, *third = (weights * training.adapter_bytes for weights in training.adapter_weights(linear))
        if third:
            total = self._dora(tape, x, result, linear, (first, second, *third), purpose)
            return self.cast(tape, total, itemsize, purpose)
        into = Into(x.key, tokens * linear.inputs * size)
        down = tape.op(purpose, tokens * training.rank, size, [into], saves=[x], weights=[first])
        del x
        into = Into(down.key, tokens * training.rank * size)
        up = tape.op(purpose, tokens * linear.outputs, size, [into], saves=[down], weights=[second])
        del down
        scaled = tape.op(purpose, up.elements, size, [Into(up.key, up.elements * size)])
        del up
        if not training.autocast and bitsandbytes:
            scaled = self.cast(tape, scaled, itemsize, purpose)
        total = self._added(tape, result, scaled, purpose)
        del result, scaled
        return total if training.autocast else self.cast(tape, total, itemsize, purpose)

    def _dora(
        self, tape: Tape, x: Tensor, result: Tensor, linear: Linear, gradients: Sequence[int], purpose: str
    ) -> Tensor:
        """W·x + (m/‖W + s·B·A‖ - 1)·W·x + m/‖W + s·B·A‖·s·B·A·x, all in the adapter's type (PEFT's DoraLinearLayer).

        B·A is made of a unit matrix by the two layers, and W is whole beside it until the layer returns. With dropout,
        W meets x once more and waits for its gradient.
        """
        training, size = self.training, x.itemsize
        tokens, whole, rank = training.tokens, linear.weights * size, training.rank
        outputs = linear.outputs * size
        unit = [self.trace.new(count * size, purpose) for count in (linear.inputs**2, linear.inputs * rank)]
        _product = self.trace.new(whole, purpose)
        if tape.checkpointed:
            del unit  # nothing is kept for a backward that recomputes
        packed = (
            self.trace.new(linear.weights * training.compute_bytes, purpose) if training.method == "qlora" else None
        )
        weight = packed
        if training.compute_bytes != size:
            weight = self.trace.new(whole, purpose)
        del packed
        scaled = self.trace.new(whole, purpose)
        both = self.trace.new(whole, purpose)
        del scaled, both
        down_bytes, up_bytes, magnitude_bytes = gradients
        norm = tape.tensor(self.trace.new(outputs, purpose), linear.outputs, size)
        ratio = tape.op(purpose, linear.outputs, size, [], saves=[norm], weights=[magnitude_bytes])
        del norm
        into = Into(x.key, tokens * linear.inputs * size)
        down = tape.op(purpose, tokens * rank, size, [into], saves=[x], weights=[down_bytes])
        up = tape.op(
            purpose, tokens * linear.outputs, size, [Into(down.key, tokens * rank * size)], saves=[down],
            weights=[up_bytes],
        )  # fmt: skip
        del down
        rows = up.elements * size
        direct = result
        if training.dropout:
            kept = [tape.tensor(weight, linear.weights, size)] if weight else []
            direct = tape.op(purpose, up.elements, size, [into], saves=kept)
            del kept
        less = tape.tensor(self.trace.new(outputs, purpose), linear.outputs, size)
        narrow = direct.elements * direct.itemsize
        wide_first = (rows,) if direct.itemsize != size else ()
        first = tape.op(
            purpose, up.elements, size,
            [Into(direct.key, narrow, scratch=wide_first), Into(ratio.key, outputs, scratch=(rows,))],
            saves=[less, direct],
        )  # fmt: skip
        second = tape.op(
            purpose, up.elements, size, [Into(up.key, rows), Into(ratio.key, outputs, scratch=(rows,))],
            saves=[ratio, up],
        )  # fmt: skip
        turned = tape.op(purpose, up.elements, size, [Into(second.key, rows)])
        del second
        added = self._added(tape, first, turned, purpose)
        del first, turned, up, direct, less, ratio, weight, _product
        return self._added(tape, result, added, purpose)

    def norm(self, tape: Tape, x: Tensor, *, heads: int = 1) -> Tensor:
        """weight * (x * rsqrt(mean(x²) + ε)), computed in fp32; of each token, or of each of its `heads`."""
        rows, tokens = x.elements, self.training.tokens * heads
        stream, family = x.itemsize, self.training.decoder.family
        if family.layer_norms:
            return self._layer_norm(tape, x, tokens)
        x = self.cast(tape, x, 4, NORM)
        squares = tape.op(NORM, rows, 4, [Into(x.key, 4 * rows, scratch=(4 * rows, 4 * rows))], saves=[x])
        mean = tape.op(NORM, tokens, 4, [Into(squares.key, 4 * rows)])
        del squares
        rsqrt = tape.op(NORM, tokens, 4, [Into(mean.key, 4 * tokens)], saves_output=True)
        del mean
        into = [Into(x.key, 4 * rows), Into(rsqrt.key, 4 * tokens, scratch=(4 * rows,))]
        normed = tape.op(NORM, rows, 4, into, saves=[x, rsqrt])
        del x, rsqrt
        if not family.wide_norms:
            normed = self.cast(tape, normed, stream, NORM)
        weighted = tape.op(NORM, rows, normed.itemsize, [Into(normed.key, rows * normed.itemsize)])
        del normed
        return self.cast(tape, weighted, stream, NORM)

    def _layer_norm(self, tape: Tape, x: Tensor, tokens: int) -> Tensor:
        """torch's own: keeps its input, and mean and deviation of each token in fp32."""
        statistics = tape.tensor(self.trace.new(8 * tokens, NORM), 2 * tokens, 4)
        into = Into(x.key, x.elements * x.itemsize)
        return tape.op(NORM, x.elements, x.itemsize, [into], saves=[x, statistics])

    def capped(self, tape: Tape, x: Tensor, purpose: str) -> Tensor:
        """cap·tanh(x/cap): each step makes a tensor, and tanh keeps its own for the backward."""
        size = x.elements * x.itemsize
        x = tape.op(purpose, x.elements, x.itemsize, [Into(x.key, size)])
        x = tape.op(purpose, x.elements, x.itemsize, [Into(x.key, size)], saves_output=True)
        return tape.op(purpose, x.elements, x.itemsize, [Into(x.key, size)])

    def _rotated(self, tape: Tape, x: Tensor) -> Tensor:
        """x·cos + rotate_half(x)·sin."""
        size = x.elements * x.itemsize
        straight = tape.op(ATTENTION, x.elements, x.itemsize, [Into(x.key, size)])
        halves = [Into(x.key, size, scratch=(size // 2,)), Into(x.key, size)]
        turned = tape.op(ATTENTION, x.elements, x.itemsize, halves, scratch=size // 2)
        turned = tape.op(ATTENTION, x.elements, x.itemsize, [Into(turned.key, size)])
        return tape.op(ATTENTION, x.elements, x.itemsize, [Into(straight.key, None), Into(turned.key, None)])

    def _copied(self, tape: Tape, x: Tensor) -> Tensor:
        return tape.op(ATTENTION, x.elements, x.itemsize, [Into(x.key, None)])

    def _all_heads(self, tape: Tape, x: Tensor) -> Tensor:
        """Keys or values repeated for every head that shares them."""
        decoder = self.training.decoder
        if decoder.kv_heads == decoder.heads:
            return x
        whole = x.elements // decoder.kv_heads * decoder.heads
        return tape.op(ATTENTION, whole, x.itemsize, [Into(x.key, x.elements * x.itemsize)])

    def _attention(self, tape: Tape, x: Tensor, mask: Storage | None) -> tuple[Tensor, Tensor | None]:
        training, decoder = self.training, self.training.decoder
        q, k, v = self._latent(tape, x, decoder.latent) if decoder.latent else self._heads(tape, x)
        if training.attention == "eager":
            out, scores = self._eager(tape, q, k, v)
        else:
            out, scores = self._fused(tape, q, k, v, mask), None
        if decoder.attention_out:
            out = self._linear(tape, out, decoder.attention_out, ATTENTION)
        return out, scores

    def _heads(self, tape: Tape, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of each head, turned by their positions."""
        decoder = self.training.decoder
        widths = [heads * decoder.head_dim for heads in (decoder.heads, decoder.kv_heads, decoder.kv_heads)]
        if len(decoder.attention_in) == 3:
            q, k, v = (self._in_heads(tape, self._linear(tape, x, one, ATTENTION)) for one in decoder.attention_in)
        else:
            q, k, v = self._views(tape, x, widths)
        if decoder.family.head_norms:
            q, k = self.norm(tape, q, heads=decoder.heads), self.norm(tape, k, heads=decoder.kv_heads)
        return self._rotated(tape, q), self._rotated(tape, k), v

    def _latent(self, tape: Tape, x: Tensor, latent: Latent) -> tuple[Tensor, Tensor, Tensor]:
        """The same by way of latents: keys and values of all heads unfold from one, and share the turned part."""
        training, decoder = self.training, self.training.decoder
        *queries, kv_down, kv_up = decoder.attention_in
        of_heads = training.tokens * decoder.heads
        q = self._linear(tape, x, queries[0], ATTENTION)
        if len(queries) > 1:
            q = self._linear(tape, self.norm(tape, q), queries[1], ATTENTION)
        q_straight, q_turned = tape.split(ATTENTION, q, [of_heads * latent.nope, of_heads * latent.rope])
        del q
        compressed = self._linear(tape, x, kv_down, ATTENTION)
        folded, k_turned = tape.split(
            ATTENTION, compressed, [training.tokens * latent.rank, training.tokens * latent.rope]
        )
        del compressed
        folded = self.norm(tape, folded)
        q = self._joined(tape, q_straight, self._rotated(tape, q_turned))
        del q_straight, q_turned
        k_turned = self._rotated(tape, k_turned)
        unfolded = self._linear(tape, folded, kv_up, ATTENTION)
        del folded
        k_straight, v = tape.split(ATTENTION, unfolded, [of_heads * latent.nope, of_heads * latent.value])
        del unfolded
        return q, self._joined(tape, k_straight, k_turned), v

    def _joined(self, tape: Tape, straight: Tensor, turned: Tensor) -> Tensor:
        """Each head's part without positions and its part with them (or the one that all share), side by side."""
        decoder = self.training.decoder
        elements = self.training.tokens * decoder.heads * decoder.head_dim
        into = [Into(part.key, part.elements * part.itemsize) for part in (straight, turned)]
        return tape.op(ATTENTION, elements, straight.itemsize, into)

    def _in_heads(self, tape: Tape, x: Tensor) -> Tensor:
        """A view of `x` with heads before tokens; the gradients of written-out scores come so, and are copied."""
        return tape.split(ATTENTION, x, [x.elements])[0] if self.training.attention == "eager" else x

    def _views(self, tape: Tape, x: Tensor, widths: list[int]) -> list[Tensor]:
        """Queries, keys and values as parts of one product."""
        (linear,) = self.training.decoder.attention_in or (Linear("", self.training.decoder.hidden_size, sum(widths)),)
        whole = self._linear(tape, x, linear, ATTENTION)
        return tape.split(ATTENTION, whole, [self.training.tokens * width for width in widths])

    def _eager(self, tape: Tape, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Scores written out: softmax(q·kᵀ·s + mask)·v, one score per head and pair of tokens."""
        training = self.training
        keys, values = self._all_heads(tape, k), self._all_heads(tape, v)  # in hand until it returns
        itemsize = training.compute_bytes if training.autocast else q.itemsize
        # to be seen as one dimension, heads and batch want a copy, unless repeating the heads has just made one
        copied = training.micro_batch_size > 1
        shared = training.decoder.kv_heads < training.decoder.heads
        q, k = (self.cast(tape, part, itemsize, ATTENTION) for part in (q, keys))
        if copied:
            q = self._copied(tape, q)
        if copied and not shared:
            k = self._copied(tape, k)
        scores = training.decoder.heads * training.pairs
        size, rows = scores * itemsize, q.elements * itemsize
        raw = tape.op(ATTENTION, scores, itemsize, [Into(k.key, rows), Into(q.key, rows)], saves=[q, k])
        del q, k
        scaled = tape.op(ATTENTION, scores, itemsize, [Into(raw.key, size)])
        del raw
        if training.decoder.family.caps_scores:
            scaled = self.capped(tape, scaled, ATTENTION)
        masked = tape.op(ATTENTION, scores, itemsize, [Into(scaled.key, None)])
        del scaled
        # the backward of softmax multiplies gradient and output into a tensor of its own
        soft = tape.op(ATTENTION, scores, 4, [Into(masked.key, size, scratch=(4 * scores,))], saves_output=True)
        del masked
        soft = self.cast(tape, soft, itemsize, ATTENTION)
        v = self.cast(tape, values, itemsize, ATTENTION)
        if copied and not shared:
            v = self._copied(tape, v)
        into = [Into(v.key, v.elements * itemsize), Into(soft.key, size)]
        out = tape.op(ATTENTION, v.elements, itemsize, into, saves=[soft, v])
        del v
        # heads behind tokens: a copy forwards, and backwards where the product wants heads and batch as one again
        out = tape.op(ATTENTION, out.elements, itemsize, [Into(out.key, rows if copied else None)])
        return out, soft

    def _fused(self, tape: Tape, q: Tensor, k: Tensor, v: Tensor, mask: Storage | None) -> Tensor:
        """FlashAttention and torch's memory-efficient kernel: no scores, one logarithm per head and token kept.

        Dao et al. 2022. Cards before Ampere have the second only, which wants keys and values of every head; so does
        a mask.
        """
        training = self.training
        if training.attention == "flash" or training.autocast:
            q, k, v = (self.cast(tape, part, training.compute_bytes, ATTENTION) for part in (q, k, v))
        if training.expands_heads:
            k, v = self._all_heads(tape, k), self._all_heads(tape, v)
        logarithms = 4 * training.micro_batch_size * training.decoder.heads * training.max_length
        parts = [q, k, v]
        sizes = [part.elements * part.itemsize for part in parts]
        kept = tape.tensor(self.trace.new(logarithms, ATTENTION), logarithms // 4, 4)
        accumulators = 4 * sum(part.elements for part in parts) if q.itemsize < 4 else 0
        scratch = (logarithms, *((accumulators,) if accumulators else ()))
        into = [
            Into(part.key, size, scratch=scratch if part is v else ()) for part, size in zip(parts, sizes, strict=True)
        ]
        saves = [*parts, kept]
        if mask:  # made of the mask for each layer: 0 or -inf per pair of tokens
            bias = self.trace.new(training.pairs * q.itemsize, ATTENTION)
            saves.append(tape.tensor(bias, training.pairs, q.itemsize))
        elements = training.tokens * training.decoder.heads * training.decoder.value_dim
        return tape.op(ATTENTION, elements, q.itemsize, into, saves=saves, saves_output=True)

    def _mlp(self, tape: Tape, x: Tensor) -> Tensor:
        """down(act(gate(x)) * up(x)), or down(act(up(x))); or the experts', and beside them what they share."""
        decoder = self.training.decoder
        if decoder.experts:
            mixed = self._mixture(tape, x, decoder.experts)
            return self._added(tape, mixed, self._dense(tape, x), MLP) if decoder.mlp_out else mixed
        return self._dense(tape, x)

    def _dense(self, tape: Tape, x: Tensor) -> Tensor:
        decoder = self.training.decoder
        x = self._beside(tape, x)
        if not decoder.mlp_out:
            return x
        first = self._linear(tape, x, decoder.mlp_in[0], MLP)
        elements = self.training.tokens * decoder.mlp_out.inputs
        size = elements * first.itemsize
        fused = decoder.mlp_in[0].outputs == 2 * decoder.mlp_out.inputs
        gate, up = tape.split(MLP, first, [elements, elements]) if fused else (first, None)
        del first
        active = self._active(tape, gate)
        del gate
        if len(decoder.mlp_in) > 1:
            up = self._linear(tape, x, decoder.mlp_in[1], MLP)
        if up is not None:
            into = [Into(up.key, size), Into(active.key, size)]
            active = tape.op(MLP, elements, active.itemsize, into, saves=[active, up])
        del up
        return self._linear(tape, active, decoder.mlp_out, MLP)

    def _active(self, tape: Tape, x: Tensor) -> Tensor:
        """The activation: one kernel that keeps its input, or ½·x·(1 + tanh(c·(x + d·x³))) step by step."""
        size = x.elements * x.itemsize

        def step(of: Tensor, *, saves: Sequence[Tensor] = (), saves_output: bool = False) -> Tensor:
            into = [Into(of.key, size)]
            return tape.op(MLP, x.elements, x.itemsize, into, saves=saves, saves_output=saves_output)

        if not self.training.decoder.family.written_gelu:
            return step(x, saves=[x])
        half = step(x)
        inner = step(step(x, saves=[x]))
        inner = step(self._added(tape, x, inner, MLP))
        inner = step(inner, saves_output=True)
        inner = step(inner)
        into = [Into(half.key, size), Into(inner.key, size)]
        return tape.op(MLP, x.elements, x.itemsize, into, saves=[half, inner])

    def _mixture(self, tape: Tape, x: Tensor, experts: Experts) -> Tensor:
        """Each token's experts: rows sorted by expert, two products over all experts, weighted and put back in order.

        transformers' `grouped_mm`; for experts in 4 bits the trainer's own, which has less in hand. A token counts once
        for each of its experts; how they are spread does not matter.
        """
        tokens, itemsize, hidden = self.training.tokens, x.itemsize, self.training.decoder.hidden_size
        pairs = tokens * experts.per_token
        rows = pairs * hidden
        into = Into(x.key, x.elements * itemsize)
        scores = tape.op(MLP, tokens * experts.number, 4, [into], saves_output=True)
        chosen = tape.op(MLP, pairs, 4, [Into(scores.key, 4 * tokens * experts.number)])
        del scores
        order = tape.tensor(self.trace.new(2 * 8 * pairs, MLP), 2 * pairs, 8)  # there and back, as int64
        picked = tape.op(MLP, rows, itemsize, [into], saves=[order])  # in hand until the end
        inner = pairs * experts.down.inputs
        active = self._of_experts(tape, picked, experts.up, experts)
        if self._packed(experts):
            picked = None
        gated = experts.up.outputs == 2 * experts.down.inputs
        gate, up = tape.split(MLP, active, [inner, inner]) if gated else (active, None)
        active = self._active(tape, gate)
        del gate
        if up:
            into = [Into(up.key, inner * itemsize), Into(active.key, inner * itemsize)]
            active = tape.op(MLP, inner, itemsize, into, saves=[active, up])
        del up
        out = self._of_experts(tape, active, experts.down, experts)
        del active
        # what the router's weights multiply is fp32 where they are
        wide = itemsize if self.training.decoder.family.narrow_routers else 4
        size = rows * wide
        into = [Into(out.key, rows * itemsize, scratch=(size,)), Into(chosen.key, 4 * pairs, scratch=(size,))]
        weighted = tape.op(MLP, rows, wide, into, saves=[out, chosen])
        del out, chosen
        weighted = tape.op(MLP, rows, wide, [Into(weighted.key, size, scratch=(size,))], saves=[order])
        # each token's gradient is copied for each of its experts, before anything that was kept is asked for
        total = tape.op(MLP, tokens * hidden, wide, [Into(weighted.key, size)])
        del weighted, picked, order
        return self.cast(tape, total, itemsize, MLP)

    def _of_experts(self, tape: Tape, x: Tensor, linear: Linear, experts: Experts) -> Tensor:
        """A product with the weights of all experts; those of 4 bits are dequantised some at a time, scales first."""
        training = self.training
        pairs = training.tokens * experts.per_token
        size = pairs * linear.inputs * x.itemsize
        if not self._packed(experts):
            return tape.op(MLP, pairs * linear.outputs, x.itemsize, [Into(x.key, size)])
        one = linear.weights * training.compute_bytes
        weights = min(experts.number, max(1, EXPERTS_AT_ONCE_BYTES // one)) * linear.weights
        unpacked, scales = weights * training.compute_bytes, 4 * weights // 64 if training.double_quant else 0
        into = Into(x.key, size, scratch=(unpacked, scales))
        return tape.op(MLP, pairs * linear.outputs, x.itemsize, [into], scratch=unpacked + scales)

    def _packed(self, experts: Experts) -> bool:
        return self.training.method == "qlora" and experts.quantized

    def _beside(self, tape: Tape, x: Tensor) -> Tensor:
        """Layers whose role is not known: each works on `x`, and the output waits for its gradient."""
        for linear in self.training.decoder.others:
            y = self._linear(tape, x, linear, MLP)
            into = [Into(x.key, None), Into(y.key, y.elements * y.itemsize)]
            x = tape.op(MLP, x.elements, x.itemsize, into, saves=[y])
            del y
        return x

    def _added(self, tape: Tape, x: Tensor, y: Tensor, purpose: str) -> Tensor:
        wide = max(x.itemsize, y.itemsize)
        into = [Into(part.key, None if part.itemsize == wide else part.elements * part.itemsize) for part in (x, y)]
        return tape.op(purpose, x.elements, wide, into)

    def layer(self, tape: Tape, x: Tensor, mask: Storage | None) -> Tensor:
        family = self.training.decoder.family
        residual = x
        x = self.norm(tape, x)
        if family.parallel:
            attended, _scores = self._attention(tape, x, mask)
            x = self._added(tape, attended, self._mlp(tape, x), NORM)
            return self._added(tape, x, residual, NORM)
        x, _scores = self._attention(tape, x, mask)  # the layer has the scores in hand until it ends
        if family.post_norms:
            x = self.norm(tape, x)
        x = self._added(tape, residual, x, NORM)
        residual = x
        x = self.norm(tape, x)
        x = self._mlp(tape, x)
        if family.post_norms:
            x = self.norm(tape, x)
        return self._added(tape, residual, x, NORM)
