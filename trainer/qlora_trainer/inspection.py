"""The inspect stage: whether model and data can work together, and the facts that sizing needs. Reads no weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qlora_api.exchange import Inspection, InspectOrder, TokenCounts
from qlora_trainer.data import read_corpus
from qlora_trainer.environment import Pod, log, quiet_libraries
from qlora_trainer.failures import BadInput
from qlora_trainer.inputs import MODEL, commits, download_bytes, with_inputs
from qlora_trainer.stores import open_store

#: Sequence lengths are rounded up to this, which suits the kernels.
LENGTH_STEP = 64


def inspect(order: InspectOrder, pod: Pod) -> Inspection:
    """Look at model and data. Raises BadInput for what cannot work, in the words of the spec."""
    log.info("looking at %s", order.model_uri)
    pod = with_inputs(order, pod)
    revisions = commits(pod)
    if order.output_uri:
        store = open_store("output", order.output_uri, order.output_secret, pod)
        log.info("%s can be used; %d objects are there", order.output_uri, len(store.objects()))
    corpus = read_corpus(order.data, pod)
    log.info(
        "%d training examples (%d duplicates removed), %d for evaluation, %d golden",
        len(corpus.train), corpus.duplicates, len(corpus.eval), len(corpus.golden),
    )  # fmt: skip

    # seconds to import, so only now: what is wrong with the data has been said
    from qlora_trainer.model import open_base
    from qlora_trainer.sequences import Tokenisation, cut, log_samples, pack

    quiet_libraries()
    base = open_base(Path(pod.path_of(order.model_uri, "model.uri")), order.model_uri)
    log.info(
        "%s, %.3g parameters stored as %s, sequences of up to %d tokens",
        base.architecture, base.shape.parameters, base.shape.dtype, base.shape.max_position,
    )  # fmt: skip

    tokenise = Tokenisation(base.tokenizer, corpus.format, order.loss)
    sequences = [tokenise(example) for example in corpus.train]
    lengths = np.array([len(sequence.ids) for sequence in sequences])
    max_length = _max_length(lengths, order.max_length, base.shape.max_position)
    if order.data.log_samples:
        log_samples(sequences, corpus, base.tokenizer)

    kept = cut(sequences, max_length)
    if not kept:
        raise BadInput(
            f"dataset: no token of {len(sequences)} examples carries loss ({tokenise.loss}) within {max_length} "
            "tokens: there is nothing to learn; raise dataset.maxLength or check dataset.loss"
        )
    if len(kept) < len(sequences):
        log.info(
            "%d examples have nothing to learn within %d tokens and are left out",
            len(sequences) - len(kept),
            max_length,
        )
    rows = pack(kept, max_length) if order.packing else kept
    carrying = sum(sequence.loss_tokens for sequence in kept)
    return Inspection(
        architecture=base.architecture,
        model_digest=base.digest,
        data_digest=corpus.digest,
        shape=base.shape,
        examples=len(corpus.train),
        eval_examples=len(corpus.eval),
        golden_examples=len(corpus.golden),
        tokens=TokenCounts(
            p50=int(np.percentile(lengths, 50, method="inverted_cdf")),
            p95=int(np.percentile(lengths, 95, method="inverted_cdf")),
            max=int(lengths.max()),
            total=int(lengths.sum()),
        ),
        max_length=max_length,
        sequences=len(rows),
        loss=tokenise.loss,
        truncated_percent=round(100 * float((lengths > max_length).mean()), 2),
        loss_token_percent=round(100 * carrying / sum(len(sequence.ids) for sequence in kept), 2),
        duplicates=corpus.duplicates,
        leakage=sum(corpus.leaked.values()),
        download_bytes=download_bytes(pod),
        model_revision=revisions.pop(MODEL, None),
        data_revisions=revisions,
    )


def _max_length(lengths: np.ndarray, ordered: int | None, max_position: int) -> int:
    """As ordered, else what 99.5 % of the examples fit into, rounded up; never more than the model was built for."""
    if ordered is not None:
        if ordered > max_position:
            raise BadInput(
                f"dataset.maxLength: {ordered} is more than the {max_position} tokens the model was built for"
            )
        return ordered
    fitting = int(np.percentile(lengths, 99.5, method="inverted_cdf"))
    return min(-(-fitting // LENGTH_STEP) * LENGTH_STEP, max_position)
