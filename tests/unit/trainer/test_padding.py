"""How much of what a model is given only fills rows up."""

from __future__ import annotations

import pytest

from qlora_trainer.environment import Pod
from qlora_trainer.failures import Interrupted
from qlora_trainer.model import open_base
from qlora_trainer.sequences import batches
from qlora_trainer.training import train
from tests.reference import rows_of

from .conftest import Place
from .test_training import InterruptedAfter, afresh


def test_padding_is_counted_over_all_attempts(place: Place) -> None:
    """Rows of a micro-batch are as long as its longest; alone, a row has none."""
    order = place.train_order(recipe={"packing": False, "max_steps": 6}, micro_batch_size=4, gradient_accumulation=1)
    whole = train(order, place.pod)
    rows = rows_of(order, place.pod, open_base(place.claims / "base" / "model", "x"))
    dealt = list(batches(len(rows), 4, order.recipe.seed, start=0, stop=6))
    given = sum(4 * max(len(rows[number].ids) for number in chosen) for chosen in dealt)
    tokens = sum(len(rows[number].ids) for chosen in dealt for number in chosen)
    assert whole.padding_percent == pytest.approx(100 * (1 - tokens / given), abs=0.05)
    assert whole.padding_percent > 5
    afresh(place)
    with pytest.raises(Interrupted):
        train(order, Pod(InterruptedAfter(2 * 3), place.pod.claims))
    assert train(order, place.pod).padding_percent == whole.padding_percent
    afresh(place)
    one_by_one = order.model_copy(update={"micro_batch_size": 1, "gradient_accumulation": 4})
    assert train(one_by_one, place.pod).padding_percent == 0
