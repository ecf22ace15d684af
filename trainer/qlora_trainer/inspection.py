"""The inspect stage: whether model and data can work together, and the facts that sizing needs. Reads no weights.

Examples are tokenised and forgotten: what is kept of them are lengths, and where loss lies. What is found in the data
fails the job or warns, by the table of `qlora_api.findings`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_api.exchange import Inspection, InspectOrder, SourceShare, TokenCounts, succeeded, train_field
from qlora_api.findings import ENOUGH_EVAL_EXAMPLES, FindingCode
from qlora_trainer.data import Corpus, leak_key, read_corpus
from qlora_trainer.environment import Pod, log, quiet_libraries
from qlora_trainer.failures import BadInput
from qlora_trainer.formats import Example, Mistake
from qlora_trainer.inputs import MODEL, commits, download_bytes, with_inputs
from qlora_trainer.scores import schema as answer_schema
from qlora_trainer.stores import open_store

if TYPE_CHECKING:
    from qlora_trainer.sequences import Extents, Tokenisation

#: Sequence lengths are rounded up to this, which suits the kernels.
LENGTH_STEP = 64
#: So many examples, or such a share of them if that is more, are rendered once more to see whether they survive it: of
#: all, it would take one and a half times as long as tokenising them (8.0 s to 5.2 s per 10,000 of 173 tokens).
ROUND_TRIPS, ROUND_TRIPS_SHARE = 2000, 0.02
#: So many held-out examples are tried with the tokenizer; all are, by train.
HELD_OUT_TRIED = 256
_EVERY = 100_000


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
    near_duplicates = _compare(corpus)

    if order.answer_schema is not None:
        answer_schema(order.answer_schema)

    # seconds to import, so only now: what is wrong with the data has been said
    from qlora_trainer.model import open_base
    from qlora_trainer.sequences import Tokenisation, packed

    quiet_libraries()
    base = open_base(Path(pod.path_of(order.model_uri, "model.uri")), order.model_uri)
    log.info(
        "%s, %.3g parameters stored as %s, sequences of up to %d tokens",
        base.architecture, base.shape.parameters, base.shape.dtype, base.shape.max_position,
    )  # fmt: skip

    tokenise = Tokenisation(base.tokenizer, corpus.formats, order.loss)
    extents, longest = _extents(corpus, tokenise, show=order.data.log_samples)
    _try_held_out(corpus, tokenise)
    corpus.findings.refuse()
    lengths = extents.lengths
    max_length = _max_length(lengths, order.max_length, base.shape.max_position)

    carrying = extents.loss_tokens(max_length)
    kept = np.minimum(lengths, max_length)[carrying > 0]
    if not kept.size:
        raise BadInput(
            f"dataset: no token of {len(lengths)} examples carries loss ({tokenise.loss}) within {max_length} "
            "tokens: there is nothing to learn; raise dataset.maxLength or check dataset.loss"
        )
    sources = _shares(corpus, extents, max_length)
    truncated = lengths > max_length
    if truncated.any():
        corpus.findings.add(FindingCode.TRUNCATED, f"{longest[1]}: {longest[0]} tokens", int(truncated.sum()))
    if left_out := len(lengths) - len(kept):
        corpus.findings.add(FindingCode.LEFT_OUT, None, left_out)
        log.info("%d examples have nothing to learn within %d tokens and are left out", left_out, max_length)
    if len(corpus.eval) < ENOUGH_EVAL_EXAMPLES:
        corpus.findings.add(FindingCode.FEW_EVAL_EXAMPLES, None, len(corpus.eval))
    findings = corpus.findings.reported()
    for finding in findings:
        log.info(
            "%s: %s %d%s", finding.severity, finding.code, finding.count, f", {finding.example}" * bool(finding.example)
        )
    found = Inspection(
        architecture=base.architecture,
        model_digest=base.digest,
        data_digest=corpus.digest,
        shape=base.shape,
        examples=len(corpus.train),
        eval_examples=len(corpus.eval),
        golden_examples=len(corpus.golden),
        canary_examples=len(corpus.canary),
        tokens=TokenCounts(
            p50=int(np.percentile(lengths, 50, method="inverted_cdf")),
            p95=int(np.percentile(lengths, 95, method="inverted_cdf")),
            max=int(lengths.max()),
            total=int(lengths.sum()),
        ),
        max_length=max_length,
        sequences=len(packed(kept, max_length)[1]) - 1 if order.packing else len(kept),
        loss=tokenise.loss,
        truncated_percent=round(100 * float(truncated.mean()), 2),
        loss_token_percent=round(100 * int(carrying.sum()) / int(kept.sum()), 2),
        duplicates=corpus.duplicates,
        leakage=sum(corpus.leaked.values()),
        near_duplicates=near_duplicates,
        sources=sources,
        findings=findings,
        download_bytes=download_bytes(pod),
        model_revision=revisions.pop(MODEL, None),
        data_revisions=revisions,
    )
    return that_fits(order, found)


def that_fits(order: InspectOrder, found: Inspection) -> Inspection:
    """`found` as a termination message can hold it: places of findings go first, then the least grave findings, and
    at last the sources' shares.

    All of them are in the log.
    """
    while True:
        try:
            succeeded(order, found).fitted()
            return found
        except ValueError:
            findings = list(found.findings)
            placed = [number for number, finding in enumerate(findings) if finding.example]
            if placed:
                findings[placed[-1]] = findings[placed[-1]].model_copy(update={"example": None})
            elif findings:
                findings.pop()
            elif found.sources:
                found = found.model_copy(update={"sources": []})
            else:
                raise
            found = found.model_copy(update={"findings": findings})


def _compare(corpus: Corpus) -> int:
    """How many training examples are nearly the same as an earlier one; notes those, and held-out ones that are."""
    from qlora_trainer.duplicates import near

    def apart() -> Iterator[tuple[str, Example]]:
        for of in (corpus.golden, corpus.canary, corpus.eval):
            yield from ((where, example) for where, example in of.placed() if leak_key(example) not in corpus.leaks)

    compared = near(corpus.train.placed, apart)
    for code, found in (
        (FindingCode.NEAR_DUPLICATES, compared.repeated),
        (FindingCode.NEARLY_LEAKED, compared.leaked),
        (FindingCode.NOT_COMPARED, compared.left_out),
    ):
        if found.count:
            corpus.findings.add(code, found.first, found.count)
    return compared.repeated.count


def _extents(corpus: Corpus, tokenise: Tokenisation, *, show: bool) -> tuple[Extents, tuple[int, str]]:
    """Where loss lies in each training example, and the longest with its place; notes what the templates do to them."""
    from qlora_trainer.sequences import NO_LOSS, SAMPLES, Extents, log_samples, marked

    extents, longest, samples = Extents(), (0, ""), []
    stops = tokenise.stops()
    different = sum(corpus.per_source)
    tried = min(different, max(ROUND_TRIPS, round(ROUND_TRIPS_SHARE * different)))
    chosen, of = corpus.train.spread(tried), f"; {tried} of {different} were tried" * (tried < different)
    for number, (where, example, times) in enumerate(corpus.train.counted(), start=1):
        try:
            sequence = tokenise(example)
        except Mistake as mistake:
            corpus.findings.mistake(where, mistake)
            continue
        extents.add(sequence, times)
        longest = max(longest, (len(sequence.ids), where), key=lambda found: found[0])
        if len(samples) < SAMPLES:
            samples.append(marked(sequence, tokenise.tokenizer))
        if stops.isdisjoint(sequence.labels) and any(label != NO_LOSS for label in sequence.labels):
            corpus.findings.add(FindingCode.NO_STOP_TOKEN, where)
        if chosen[number - 1] and (fault := tokenise.round_trip(example)):
            corpus.findings.add(FindingCode.TEMPLATE_ROUND_TRIP, f"{where}{of}")
            log.info("%s: %s", where, fault)
        if number % _EVERY == 0:
            log.info("%d examples tokenised", number)
    if show:
        log_samples(samples, corpus.golden)
    return extents, longest


def _shares(corpus: Corpus, extents: Extents, max_length: int) -> list[SourceShare]:
    """What each source gives of an epoch, where there are several: of the examples and of the tokens that are kept."""
    if len(corpus.per_source) == 1:
        return []
    source = np.repeat(np.repeat(np.arange(len(corpus.per_source)), corpus.per_source), extents.times)
    tokens = np.where(extents.loss_tokens(max_length) > 0, np.minimum(extents.lengths, max_length), 0)
    percent = [
        100 * np.bincount(source, weights=weights, minlength=len(corpus.per_source)) / weights.sum()
        for weights in (np.sign(tokens), tokens)
    ]
    shares = [
        SourceShare(examples_percent=round(of_examples, 2), tokens_percent=round(of_tokens, 2))
        for of_examples, of_tokens in zip(*percent, strict=True)
    ]
    for number, share in enumerate(shares):
        log.info(
            "%s gives %.2f %% of the examples and %.2f %% of the tokens", train_field(number), share.examples_percent,
            share.tokens_percent,
        )  # fmt: skip
    return shares


def _try_held_out(corpus: Corpus, tokenise: Tokenisation) -> None:
    """Whether the tokenizer takes the first of what is held out: train meets it hours later."""
    from qlora_trainer.sequences import prompt_tokens, require_chat_template

    firsts = (islice(of.placed(), HELD_OUT_TRIED) for of in (corpus.eval, corpus.golden, corpus.canary))
    for where, example in chain.from_iterable(firsts):
        if example.format == "messages":
            require_chat_template(tokenise.tokenizer)
        try:
            tokenise(example)
        except Mistake as mistake:
            corpus.findings.mistake(where, mistake)
        else:
            prompt_tokens(tokenise.tokenizer, example)


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
