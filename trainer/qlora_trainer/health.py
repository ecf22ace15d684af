"""Whether a training still learns: what its loss and gradients say, and when it is given up."""

from __future__ import annotations

import math

from qlora_trainer.environment import log
from qlora_trainer.failures import Diverged

#: So many steps in a row without a finite loss and gradient, and the training is given up.
DIVERGED_AFTER = 3
#: So many steps in a row whose loss has exploded, and it is given up, too.
EXPLODED_AFTER = 10
#: A model that gives every token the same chance has a loss of ln(vocabulary): so far above it, it has unlearned.
EXPLODED_FACTOR = 1.5


class Health:
    """Looks at each step before it is taken."""

    def __init__(self, learning_rate: float, vocab_size: int) -> None:
        self._learning_rate = learning_rate
        self._guessing = math.log(vocab_size)
        self._first: float | None = None
        self._not_finite = self._exploded = 0

    def allows(self, step: int, loss: float, norm: float) -> bool:
        """Whether step `step` may be taken: one infinite gradient would make every weight infinite.

        Raises Diverged when the loss (nats per token) or the gradient's norm have not been finite for `DIVERGED_AFTER`
        steps, or the loss has been far above that of guessing, and of the first step, for `EXPLODED_AFTER`.
        """
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._not_finite += 1
            log.info("step %d: loss %s, gradient norm %s; not taken", step, loss, norm)
            if self._not_finite == DIVERGED_AFTER:
                raise Diverged(
                    f"loss or gradients were not finite in {DIVERGED_AFTER} steps in a row, up to step {step}: "
                    f"lower training.learningRate ({self._learning_rate:g}), compute in bfloat16, or look at the data"
                )
            return False
        self._not_finite = 0
        self._first = loss if self._first is None else self._first
        ceiling = EXPLODED_FACTOR * max(self._guessing, self._first)
        self._exploded = self._exploded + 1 if loss > ceiling else 0
        if self._exploded == EXPLODED_AFTER:
            raise Diverged(
                f"the loss has been above {ceiling:.1f} for {EXPLODED_AFTER} steps, up to step {step} "
                f"(now {loss:.1f}), and guessing gives {self._guessing:.1f}: "
                f"lower training.learningRate ({self._learning_rate:g})"
            )
        return True
