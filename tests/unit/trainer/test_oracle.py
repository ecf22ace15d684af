"""The memory plan against a step of real model code; `make oracle` does the same with models up to 405B."""

from __future__ import annotations

import pytest

from tests.oracle.cases import SMALL, Case, compared


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.words}, {case.gpus} GPUs")
def test_the_plan_is_what_real_model_code_holds(case: Case) -> None:
    assert abs(compared(case).error) < 0.01
