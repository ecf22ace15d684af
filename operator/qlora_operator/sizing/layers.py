"""A decoder's layer as the memory it allocates, operation by operation.

Written to be read beside the code it stands for: transformers' Llama (RMSNorm, rotary embedding, grouped-query
attention, SwiGLU MLP), PEFT's LoRA layers, bitsandbytes' 4-bit products. One PyTorch operation is one `op` here; what
autograd keeps for it is in `saves`, what its backward allocates in `Into`.
"""

from __future__ import annotations

from qlora_operator.sizing.tensors import Into, Storage, Tape, Tensor, Trace
from qlora_operator.sizing.training import Linear, Training

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
        into = Into(x.key, tokens * linear.inputs * x.itemsize, scratch=(unpacked,) if unpacked else ())
        out = tape.op(purpose, tokens * linear.outputs, x.itemsize, [into], scratch=unpacked)
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
        if training.method == "qlora":  # PEFT copies the result before it adds to it
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
        first, second = (weights * training.adapter_bytes for weights in training.adapter_weights(linear))
        into = Into(x.key, tokens * linear.inputs * size)
        down = tape.op(purpose, tokens * training.rank, size, [into], saves=[x], weights=[first])
        del x
        into = Into(down.key, tokens * training.rank * size)
        up = tape.op(purpose, tokens * linear.outputs, size, [into], saves=[down], weights=[second])
        del down
        scaled = tape.op(purpose, up.elements, size, [Into(up.key, up.elements * size)])
        del up
        if not training.autocast and training.method == "qlora":
            scaled = self.cast(tape, scaled, itemsize, purpose)
        total = self._added(tape, result, scaled, purpose)
        del result, scaled
        return total if training.autocast else self.cast(tape, total, itemsize, purpose)

    def norm(self, tape: Tape, x: Tensor) -> Tensor:
        """weight * (x * rsqrt(mean(x²) + ε)), computed in fp32."""
        rows, tokens = x.elements, self.training.tokens
        stream = x.itemsize
        x = self.cast(tape, x, 4, NORM)
        squares = tape.op(NORM, rows, 4, [Into(x.key, 4 * rows, scratch=(4 * rows, 4 * rows))], saves=[x])
        mean = tape.op(NORM, tokens, 4, [Into(squares.key, 4 * rows)])
        del squares
        rsqrt = tape.op(NORM, tokens, 4, [Into(mean.key, 4 * tokens)], saves_output=True)
        del mean
        into = [Into(x.key, 4 * rows), Into(rsqrt.key, 4 * tokens, scratch=(4 * rows,))]
        normed = tape.op(NORM, rows, 4, into, saves=[x, rsqrt])
        del x, rsqrt
        normed = self.cast(tape, normed, stream, NORM)
        return tape.op(NORM, rows, stream, [Into(normed.key, rows * stream)])

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
        whole = self.training.tokens * self.training.decoder.heads * self.training.decoder.head_dim
        if x.elements == whole:
            return x
        return tape.op(ATTENTION, whole, x.itemsize, [Into(x.key, x.elements * x.itemsize)])

    def _attention(self, tape: Tape, x: Tensor, mask: Storage | None) -> tuple[Tensor, Tensor | None]:
        training, decoder = self.training, self.training.decoder
        widths = [heads * decoder.head_dim for heads in (decoder.heads, decoder.kv_heads, decoder.kv_heads)]
        if len(decoder.attention_in) == 3:
            q, k, v = (self._in_heads(tape, self._linear(tape, x, one, ATTENTION)) for one in decoder.attention_in)
        else:
            q, k, v = self._views(tape, x, widths)
        q, k = self._rotated(tape, q), self._rotated(tape, k)
        if training.attention == "eager":
            out, scores = self._eager(tape, q, k, v)
        else:
            out, scores = self._fused(tape, q, k, v, mask), None
        if decoder.attention_out:
            out = self._linear(tape, out, decoder.attention_out, ATTENTION)
        return out, scores

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
        masked = tape.op(ATTENTION, scores, itemsize, [Into(scaled.key, None)])
        del scaled
        # the backward of softmax multiplies gradient and output into a tensor of its own
        soft = tape.op(ATTENTION, scores, 4, [Into(masked.key, size, scratch=(4 * scores,))], saves_output=True)
        del masked
        soft = self.cast(tape, soft, itemsize, ATTENTION)
        v = self.cast(tape, values, itemsize, ATTENTION)
        if copied and not shared:
            v = self._copied(tape, v)
        out = tape.op(ATTENTION, v.elements, itemsize, [Into(v.key, rows), Into(soft.key, size)], saves=[soft, v])
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
        return tape.op(ATTENTION, q.elements, q.itemsize, into, saves=saves, saves_output=True)

    def _mlp(self, tape: Tape, x: Tensor) -> Tensor:
        """down(act(gate(x)) * up(x)), or down(act(up(x)))."""
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
        active = tape.op(MLP, elements, gate.itemsize, [Into(gate.key, size)], saves=[gate])
        del gate
        if len(decoder.mlp_in) > 1:
            up = self._linear(tape, x, decoder.mlp_in[1], MLP)
        if up is not None:
            into = [Into(up.key, size), Into(active.key, size)]
            active = tape.op(MLP, elements, active.itemsize, into, saves=[active, up])
        del up
        return self._linear(tape, active, decoder.mlp_out, MLP)

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
        residual = x
        x = self.norm(tape, x)
        x, _scores = self._attention(tape, x, mask)  # the layer has the scores in hand until it ends
        x = self._added(tape, residual, x, NORM)
        residual = x
        x = self.norm(tape, x)
        x = self._mlp(tape, x)
        return self._added(tape, residual, x, NORM)
