"""What inspection can find wrong with examples: each kind once, with what it means for the job.

The trainer's messages, the status, `kubectl qlora explain` and the table of docs/data.md derive from it.
"""

from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Literal

Severity = Literal["fails", "warns"]


class FindingCode(StrEnum):
    """A kind of finding."""

    BROKEN_ROW = "brokenRow"
    WRONG_SHAPE = "wrongShape"
    WRONG_ROLES = "wrongRoles"
    EMPTY_TEXT = "emptyText"
    TEMPLATE_MISSING = "templateMissing"
    TEMPLATE_REFUSES = "templateRefuses"
    STOP_NOT_TRAINED = "stopNotTrained"
    NOTHING_TO_LEARN = "nothingToLearn"
    LEAKED = "leaked"
    NEARLY_LEAKED = "nearlyLeaked"
    NO_STOP_TOKEN = "noStopToken"
    TEMPLATE_ROUND_TRIP = "templateRoundTrip"
    TRUNCATED = "truncated"
    LEFT_OUT = "leftOut"
    NEAR_DUPLICATES = "nearDuplicates"
    NOT_COMPARED = "notCompared"
    DUPLICATES = "duplicates"
    FEW_EVAL_EXAMPLES = "fewEvalExamples"


@dataclass(frozen=True)
class Kind:
    """What a finding means: `fails` ends the job before a GPU is taken, `warns` stands in the status."""

    severity: Severity
    meaning: str
    cure: str


#: Fewer held-out examples than this, and the evaluation loss moves by chance more than by learning.
ENOUGH_EVAL_EXAMPLES = 200
#: So many training examples are compared with one another, and so many held-out ones with all training examples.
COMPARED_EXAMPLES = 2_000_000

#: The warnings in the order of their weight: a report has room for the first few.
FINDINGS = MappingProxyType({
    FindingCode.BROKEN_ROW: Kind(
        "fails", "a row cannot be read: not JSON, not UTF-8, not as many columns as the header",
        "mend the row, or leave it out",
    ),
    FindingCode.WRONG_SHAPE: Kind(
        "fails", "a row is of no format that is known, or of another than the rest of its source",
        "one format in a source; name it in `format`",
    ),
    FindingCode.WRONG_ROLES: Kind(
        "fails", "a role that is not known, or turns out of order", "user and assistant in turns, the assistant last",
    ),
    FindingCode.EMPTY_TEXT: Kind(
        "fails", "a prompt, completion, answer or text is empty", "leave the example out",
    ),
    FindingCode.TEMPLATE_MISSING: Kind(
        "fails", "the model has no chat template, or one that cannot mark what the assistant says",
        "an instruction-tuned model, another `dataset.loss`, or prompts and completions",
    ),
    FindingCode.TEMPLATE_REFUSES: Kind(
        "fails", "the model's chat template refuses an example, such as one with a system message",
        "write the examples as the model wants them",
    ),
    FindingCode.STOP_NOT_TRAINED: Kind(
        "fails", "the chat template's end-of-turn token never carries loss: the model would not learn to stop",
        "mend the template's marks, or `dataset.loss: all`",
    ),
    FindingCode.NOTHING_TO_LEARN: Kind(
        "fails", "no token of any example carries loss within `maxLength`",
        "raise `dataset.maxLength`, or look at `dataset.loss`",
    ),
    FindingCode.LEAKED: Kind(
        "warns", "examples to evaluate on are also trained on (but for case and white space)",
        "take them out of one side: their scores say little",
    ),
    FindingCode.NEARLY_LEAKED: Kind(
        "warns", "examples to evaluate on are nearly the same as ones that are trained on",
        "look at them: their scores may say little",
    ),
    FindingCode.NO_STOP_TOKEN: Kind(
        "warns", "what is learned of an example holds no token that ends an answer",
        "look at the chat template and `dataset.loss`: the model may not learn to stop",
    ),
    FindingCode.TEMPLATE_ROUND_TRIP: Kind(
        "warns", "an example as tokens is not what was written, or does not begin as the model is asked when it serves",
        "look at the chat template; characters that the tokenizer does not know are lost",
    ),
    FindingCode.TRUNCATED: Kind(
        "warns", "examples longer than `maxLength` lose their end", "raise `dataset.maxLength`, or split them",
    ),
    FindingCode.LEFT_OUT: Kind(
        "warns", "examples have nothing to learn within `maxLength` and are not trained on",
        "raise `dataset.maxLength`, or shorten their prompts",
    ),
    FindingCode.NEAR_DUPLICATES: Kind(
        "warns", "training examples are nearly the same as an earlier one; they are kept",
        "remove them, unless they are meant to count more",
    ),
    FindingCode.NOT_COMPARED: Kind(
        "warns", f"examples beyond the first {COMPARED_EXAMPLES:,} were not looked at for near duplicates",
        "nothing, or look for them before the data comes here",
    ),
    FindingCode.DUPLICATES: Kind(
        "warns", "training examples equal to an earlier one are removed",
        "nothing; `weight`, if they were meant to count more",
    ),
    FindingCode.FEW_EVAL_EXAMPLES: Kind(
        "warns", f"fewer than {ENOUGH_EVAL_EXAMPLES} examples are held out for the evaluation loss",
        "`dataset.evalFraction`, or more in `dataset.eval`",
    ),
})  # fmt: skip
