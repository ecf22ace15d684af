"""A training as the memory it allocates, in order: loading, and steps of forward, loss, backward and optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from qlora_api.heads import tile_rows
from qlora_operator.sizing.layers import ATTENTION, Layers
from qlora_operator.sizing.tensors import Into, Storage, Tape, Tensor, Trace
from qlora_operator.sizing.training import Experts, Linear, Training

MIB = 1024**2
#: cuBLAS' workspace, one for the forward thread and one for autograd's (torch's default :4096:2:16:8).
WORKSPACE_BYTES = int(8.125 * MIB)
#: Tokens and words of the vocabulary per tile of TRL's fused head and loss (1.16).
TILE_ROWS, TILE_COLUMNS = 4096, 32768

#: Activation checkpoints on the GPU while the others wait in host memory: one is used, one is on its way.
IN_FLIGHT = 2

#: Tensors of a weight's shape in fp32 that HQQ's solver has in hand at once beside the weight (hqq 0.2.8).
SOLVER_TERMS = 7

WEIGHTS = "base weights"
EXPERTS = "experts, not in 4 bits"
SCALES = "quantisation scales"
EMBEDDINGS = "embeddings, head and norms"
ADAPTER = "adapter weights"
GRADIENTS = "adapter gradients"
OPTIMIZER = "optimizer state"
UPDATES = "optimizer step"
CHECKPOINTS = "activation checkpoints"
LOGITS = "logits and loss"
WORKSPACE = "workspaces"
GATHERED = "gathered weights"
LOADING = "loading"


@dataclass(frozen=True)
class Peak:
    """The most that was held in one part of a step, and what it was."""

    bytes: int
    items: dict[str, int]


class Rank:
    """The memory of one rank: what stays resident, and `step` to walk through one micro-batch."""

    def __init__(self, training: Training, trace: Trace) -> None:
        self.training, self.trace = training, trace
        self.layers = Layers(training, trace)
        self.rows = training.tokens * training.decoder.hidden_size
        self._weights = self._load()
        self._adapters = [
            trace.new(-(-weights * training.adapter_bytes // training.gpus), ADAPTER)
            for linear in (*training.decoder.linears * training.decoder.layers, *training.decoder.unlike)
            for weights in training.adapter_weights(linear)
        ]
        self._workspaces = [trace.new(WORKSPACE_BYTES, WORKSPACE) for _ in range(2)]  # with the first products
        self._state: list[Storage] = []
        #: Embedding or head, as FSDP has it whole.
        self._table: Storage | None = None

    # --- loading ---

    def _load(self) -> list[Storage]:
        """The frozen base, weight after weight.

        transformers allocates the size of the whole at first and gives it back (caching_allocator_warmup).
        """
        training, decoder, trace = self.training, self.training.decoder, self.trace
        share = training.gpus
        at_first = 1 if training.loads_whole else share
        compute, quantised = training.compute_bytes, training.method == "qlora"
        other = [decoder.embedding_weights, *[decoder.other_weights] * decoder.layers, decoder.hidden_size]
        if not decoder.tied_embeddings:
            other.append(decoder.embedding_weights)
        if quantised and share == 1:
            packed = decoder.layers * decoder.linear_weights + sum(linear.all_weights for linear in decoder.unlike)
            trace.new(packed // 2 + sum(other) * compute, LOADING)
        weights, unquantised = [], [trace.new(other[0] * compute // share, EMBEDDINGS)]
        weights += self._load_experts()
        for number, size in enumerate(other[1 : decoder.layers + 1]):
            for linear in (*decoder.linears, *(() if number else decoder.unlike)):
                if not linear.copies:
                    continue
                if quantised:
                    whole = trace.new(linear.weights * compute, LOADING)
                    weights.append(trace.new(linear.all_weights // 2 // at_first, WEIGHTS))
                    weights += [trace.new(linear.copies * scale, SCALES) for scale in self.scale_bytes(linear)]
                    del whole
                else:
                    weights.append(trace.new(linear.all_weights * compute // share, WEIGHTS))
            unquantised.append(trace.new(size * compute // share, EMBEDDINGS))
        unquantised += [trace.new(size * compute // share, EMBEDDINGS) for size in other[decoder.layers + 1 :]]
        if training.stream_bytes != compute:  # PEFT's k-bit preparation replaces them one by one
            for index, size in enumerate(other):
                unquantised[index] = trace.new(size * training.stream_bytes // share, EMBEDDINGS)
            trace.release_cache()
        if quantised and at_first != share:
            for index, storage in enumerate(weights):
                if storage.purpose == WEIGHTS:
                    weights[index] = trace.new(storage.bytes // share, WEIGHTS)
        if training.offload == "parameters":  # scales are no parameters: they stay
            return [storage for storage in weights if storage.purpose == SCALES]
        return [*weights, *unquantised]

    def _load_experts(self) -> list[Storage]:
        """The routed experts of all layers, also of those that are not walked: a tensor each for all of a layer's."""
        training, experts = self.training, self.training.decoder.experts
        if not experts:
            return []
        loaded: list[Storage] = []
        packed = training.method == "qlora" and experts.quantized
        purpose = EXPERTS if training.method == "qlora" and not packed else WEIGHTS
        for linear in (experts.up, experts.down) * experts.layers:
            size = self._dealt_out(experts) * linear.weights
            held = size // 2 if packed else size * training.compute_bytes
            loaded.append(self.trace.new(held // training.gpus, purpose))
            if packed:
                *scales, table = self.scale_bytes(linear)
                loaded += [self.trace.new(experts.number * scale, SCALES) for scale in scales]
                loaded.append(self.trace.new(table, SCALES))
        return loaded

    def _dealt_out(self, experts: Experts) -> int:
        """How many experts ranks hold together: those of 16 bits are dealt out whole, and FSDP2 pads the last part."""
        gpus = self.training.gpus
        if self.training.method == "qlora" and experts.quantized:
            return experts.number
        return -(-experts.number // gpus) * gpus

    def scale_bytes(self, linear: Linear) -> tuple[int, ...]:
        """Bytes of the 4-bit scale factors of one layer, whole on every rank.

        One fp32 per 64 weights (0.0625 B/weight); double quantisation stores them as 8-bit with one fp32 per 256 of
        them (0.0159 B/weight). QLoRA, Dettmers et al. 2023, section 3. The table of the 16 values is the third.
        HQQ has a scale and a zero point per 64 weights, both in the compute type (0.0625 B/weight in 16 bits).
        """
        blocks = -(-linear.weights // 64)
        if self.training.half_quadratic:
            return (self.training.compute_bytes * blocks,) * 2
        if self.training.double_quant:
            return blocks, 4 * -(-blocks // 256), 64
        return 4 * blocks, 64

    def solve(self) -> Peak:
        """The most that is held while HQQ quantises the largest layer, counted as if it were the last to be loaded.

        The weight as it was read; in fp32 itself, its codes, what they stand for, what is left, and four terms of that.
        """
        decoder = self.training.decoder
        largest = max((linear.weights for linear in (*decoder.linears, *decoder.unlike)), default=0)
        self.trace.watch_from_here()
        held = [self.trace.new(self.training.compute_bytes * largest, LOADING)]
        terms = SOLVER_TERMS + (self.training.compute_bytes != 4)
        held += [self.trace.new(4 * largest, LOADING) for _ in range(terms)]
        peak = Peak(self.trace.peak_bytes, self.trace.at_peak)
        del held
        return peak

    def start(self) -> Peak:
        """The most that is held while LoftQ makes good layer after layer, of which the largest is walked.

        The weight in fp32 and what is left of it after quantisation, and their difference while both are there.
        """
        adapted = [linear for linear in self.training.decoder.linears if linear.name in self.training.adapted]
        largest = max((linear.weights for linear in adapted), default=0)
        self.trace.watch_from_here()
        held = [self.trace.new(4 * largest, LOADING) for _ in range(3)]
        peak = Peak(self.trace.peak_bytes, self.trace.at_peak)
        del held
        return peak

    def step(self, marks: dict[str, Peak] | None = None) -> None:
        """One micro-batch forward and backward, and the optimizer's step; the peak of each part goes into `marks`."""
        training, decoder, trace = self.training, self.training.decoder, self.trace
        gradients = self._accumulated()
        held = len(gradients)
        rows, stream = self.rows, training.stream_bytes

        def mark(part: str) -> None:
            if marks is not None:
                marks[part] = Peak(trace.peak_bytes, trace.at_peak)
                trace.watch_from_here()

        trace.watch_from_here()
        self._table = self._gathered_table()
        x = trace.new(rows * stream, CHECKPOINTS)
        if not decoder.tied_embeddings:
            self._table = None
        mask = self._mask()
        tables = trace.new(2 * training.max_length * decoder.head_dim * stream, ATTENTION)
        checkpoints: list[Storage | None] = []
        tapes = []
        for _ in range(decoder.layers):
            gathered = self._gathered_layers()
            tape = Tape(trace, checkpointed=training.gradient_checkpointing, gradients=gradients)
            if training.gradient_checkpointing:
                checkpoints.append(x)
                if training.offload == "activations" and len(checkpoints) > IN_FLIGHT:
                    checkpoints[-1 - IN_FLIGHT] = None
            start = tape.tensor(x, rows, stream)
            del x
            out = self.layers.layer(tape, start, mask)
            tapes.append((tape, start.key, out.key))
            x = out.storage
            if training.gradient_checkpointing:
                x.hold_as(CHECKPOINTS)
            del out, start, gathered
        last_output = [x]  # handed over: the loss lets go of it as soon as its norm has
        del x
        kept, gradient = self._loss(last_output, mark)
        for number in reversed(range(decoder.layers)):
            gathered = self._gathered_layers()
            tape, first, last = tapes.pop()
            if training.gradient_checkpointing:
                checkpoint = checkpoints.pop() or trace.new(rows * stream, CHECKPOINTS)
                if checkpoints:  # the next one is fetched meanwhile, if it waits in host memory
                    checkpoints[-1] = checkpoints[-1] or trace.new(rows * stream, CHECKPOINTS)
                tape.again = partial(self._again, checkpoint, mask)
                del checkpoint
            flowing = {last: gradient}
            del gradient
            tape.backward(flowing)
            gradient = flowing.pop(first)
            del flowing, gathered, tape
            if training.accumulates:
                del gradients[held:]  # added to those that are there
            elif training.gpus > 1:
                self._reduce_scattered(gradients)
            if number in (decoder.layers - 1, 0):
                mark("loss and backward of the last layer" if number else "backward of the first layer")
        self._table = None
        del gradient, kept, mask, tables
        self.make_optimizer_state()
        updates = self._per_trained_weight(training.update_bytes, UPDATES)
        del updates
        mark("optimizer")

    def _again(self, checkpoint: Storage, mask: Storage | None, tape: Tape) -> None:
        self.layers.layer(tape, tape.tensor(checkpoint, self.rows, self.training.stream_bytes), mask)

    def make_optimizer_state(self) -> None:
        """What the optimizer keeps from its first step on."""
        if not self._state:
            self._state = self._per_trained_weight(self.training.state_bytes, OPTIMIZER)

    def _per_trained_weight(self, size_bytes: float, purpose: str) -> list[Storage]:
        """So many bytes for each weight of the adapters, one piece for each tensor."""
        ratio = size_bytes / self.training.adapter_bytes
        return [self.trace.new(int(adapter.bytes * ratio), purpose) for adapter in self._adapters]

    def _accumulated(self) -> list[Storage]:
        """The gradients of the micro-batches before this one."""
        if not self.training.accumulates:
            return []
        return [self.trace.new(adapter.bytes, GRADIENTS) for adapter in self._adapters]

    def _mask(self) -> Storage | None:
        training = self.training
        if training.attention != "eager" and not training.masked:
            return None
        itemsize = training.stream_bytes if training.attention == "eager" else 1
        return self.trace.new(training.masks * training.pairs * itemsize, ATTENTION)

    @property
    def _gathers(self) -> bool:
        """Whether a layer's weights are only whole on the GPU while it is at work."""
        return self.training.gpus > 1 or self.training.offload == "parameters"

    @property
    def _table_bytes(self) -> int:
        """Of the embedding or the head, where it is whole only while it is at work."""
        return self.training.decoder.embedding_weights * self.training.stream_bytes if self._gathers else 0

    def _gathered_table(self) -> Storage | None:
        return self.trace.new(self._table_bytes, GATHERED, stream=1) if self._gathers else None

    def _gathered_layers(self) -> list[Storage]:
        """The layer at work and the one that is fetched meanwhile, whole; from host memory, its shard before that."""
        training, decoder = self.training, self.training.decoder
        if not self._gathers:
            return []
        bits = 4 if training.method == "qlora" else 8 * training.compute_bytes
        linear = decoder.gathered_weights * bits // 8
        if decoder.experts:
            each = decoder.experts.up.weights + decoder.experts.down.weights
            weights = self._dealt_out(decoder.experts) * each
            linear += weights * (bits if decoder.experts.quantized else 8 * training.compute_bytes) // 8
        frozen = linear + decoder.other_weights * training.stream_bytes
        adapter = sum(sum(training.adapter_weights(linear)) for linear in decoder.linears) * training.adapter_bytes
        shared = training.gpus > 1
        whole = [self.trace.new(frozen + adapter * shared, GATHERED, stream=1) for _ in range(2)]
        if shared and training.offload == "parameters":
            whole.append(self.trace.new(frozen // training.gpus, GATHERED, stream=1))
        return whole

    def _reduce_scattered(self, gradients: list[Storage]) -> None:
        """Leave this rank's share of the layer's gradients, which come whole out of its backward."""
        decoder = self.training.decoder
        of_one_layer = sum(len(self.training.adapter_weights(linear)) for linear in decoder.linears)
        for index in range(len(gradients) - of_one_layer, len(gradients)):
            gradients[index] = self.trace.new(gradients[index].bytes // self.training.gpus, GRADIENTS)

    def _loss(self, last_output: list[Storage], mark: Callable[[str], None]) -> tuple[Storage | None, Storage]:
        """Last norm, head and cross-entropy, forwards and backwards; the gradient of the last layer's output."""
        training, decoder, trace = self.training, self.training.decoder, self.trace
        tape = Tape(trace)
        start = tape.tensor(last_output.pop(), self.rows, training.stream_bytes)
        first = start.key
        hidden = self.layers.norm(tape, start)
        del start
        if training.autocast:
            hidden = self.layers.cast(tape, hidden, training.compute_bytes, LOGITS)
        tied = decoder.tied_embeddings
        if training.loss == "tiles":
            return None, self._loss_in_tiles(tape, hidden, mark).pop(first)
        if training.loss == "trl":
            return None, self._loss_in_trls_tiles(tape, hidden, mark).pop(first)
        elements = training.tokens * decoder.vocab_size
        unpacked = decoder.embedding_weights * training.compute_bytes if hidden.itemsize != training.stream_bytes else 0
        head = trace.new(unpacked, LOGITS) if unpacked else None
        # in the forward FSDP2 keeps what the last gather came in beside the weights that it made of it
        into = Into(hidden.key, hidden.elements * hidden.itemsize, (self._table_bytes,) if self._gathers else ())
        logits = tape.op(LOGITS, elements, hidden.itemsize, [into], scratch=0 if tied else 2 * self._table_bytes)
        if tied:  # whole from the first use to the last of the forward, and again from its first in the backward
            self._table = None
        if not training.keeps_logits:  # else the loss is computed by the model, which has them in hand meanwhile
            del hidden
        if decoder.family.caps_logits:
            logits = self.layers.capped(tape, logits, LOGITS)
        kept = logits.storage if training.keeps_logits else None
        wide = self.layers.cast(tape, logits, 4, LOGITS)
        last = wide.key
        del logits
        probabilities = trace.new(4 * elements, LOGITS)  # log_softmax, which its backward needs
        del wide
        hidden = None
        mark("forward")
        chosen = trace.new(4 * elements, LOGITS)  # the gradient of the chosen tokens' probabilities
        gradients = {last: trace.new(4 * elements, LOGITS)}
        del chosen, probabilities
        tape.backward(gradients)
        if tied:
            self._table = self._gathered_table()
        del head
        return kept, gradients.pop(first)

    def _loss_in_tiles(self, tape: Tape, hidden: Tensor, mark: Callable[[str], None]) -> dict[int, Storage]:
        """As our trainer's `fused_loss.py`: what waits for the backward is the gradient of the hidden states, so that
        the head is not needed again."""
        training, decoder, trace = self.training, self.training.decoder, self.trace
        size, narrow = hidden.elements * hidden.itemsize, hidden.itemsize
        rows = min(training.tokens, tile_rows(decoder.vocab_size))
        values = rows * decoder.vocab_size
        chosen = tape.op(LOGITS, hidden.elements, narrow, [Into(hidden.key, size)])
        # FSDP2 keeps what the last gather came in beside the weights that it made of it
        gathered = [] if decoder.tied_embeddings else [self._gathered_table(), self._gathered_table()]
        gradient = trace.new(size, LOGITS)
        tile = trace.new(values * narrow, LOGITS)
        bent = tile if decoder.family.caps_logits else None
        if bent:
            tile = trace.new(values * narrow, LOGITS)
        wide = tile if narrow == 4 else trace.new(values * 4, LOGITS)
        del tile
        delta = wide if narrow == 4 else trace.new(values * narrow, LOGITS)
        del wide
        unbent = trace.new(values * narrow, LOGITS) if bent else None
        del delta, unbent, bent, gathered, hidden
        self._table = None
        mark("forward")
        gradients = {chosen.key: gradient}
        del chosen, gradient
        scaled = trace.new(4 * rows * decoder.hidden_size, LOGITS) if narrow != 4 else None
        del scaled
        tape.backward(gradients)
        return gradients

    def _loss_in_trls_tiles(self, tape: Tape, hidden: Tensor, mark: Callable[[str], None]) -> dict[int, Storage]:
        """TRL's ChunkedLogProbFunction: tiles of logits in the compute type, the gradient added up in fp32."""
        training, trace = self.training, self.trace
        weights = None if training.decoder.tied_embeddings else self._gathered_table()
        tile_bytes = min(training.tokens, TILE_ROWS) * TILE_COLUMNS * hidden.itemsize
        size = hidden.elements * hidden.itemsize
        chosen = tape.op(LOGITS, hidden.elements, hidden.itemsize, [Into(hidden.key, size)])
        tile = trace.new(tile_bytes, LOGITS)
        del tile, hidden
        mark("forward")
        wide, tile = trace.new(chosen.elements * 4, LOGITS), trace.new(tile_bytes, LOGITS)
        gradients = {chosen.key: trace.new(size, LOGITS)}
        del wide, tile, chosen
        tape.backward(gradients)
        del weights
        return gradients
