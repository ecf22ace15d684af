"""What inspection found, on its way to the user: it fits into a report, and the status says it."""

from __future__ import annotations

from typing import get_args

import pytest

from qlora_api.exchange import (
    FINDING_PLACE_MAX,
    FINDINGS_REPORTED,
    DataOrder,
    DataSource,
    ExpertWeights,
    Finding,
    InspectOrder,
    LinearModule,
    SourceShare,
    succeeded,
)
from qlora_api.findings import FINDINGS, FindingCode, Severity
from qlora_api.v1alpha1 import ConditionType
from qlora_operator.lifecycle.policies import next_step
from tests.unit.operator import given

WARNINGS = [code for code, kind in FINDINGS.items() if kind.severity == "warns"]


def test_every_kind_of_finding_says_what_it_means() -> None:
    assert FINDINGS.keys() == set(FindingCode)
    assert {kind.severity for kind in FINDINGS.values()} == set(get_args(Severity))


def test_the_worst_report_fits_into_a_termination_message() -> None:
    """A mixture of experts with every projection, and all findings with places as long as they may be."""
    names = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    linear = [LinearModule(name=name, in_features=18432, out_features=18432, count=61) for name in names]
    experts = [
        ExpertWeights(name=name, experts=256, in_features=18432, out_features=18432, count=61)
        for name in ("gate_up_proj", "down_proj")
    ]
    found = [Finding(severity="warns", code=code, count=10**9, example="x" * FINDING_PLACE_MAX) for code in WARNINGS][
        :FINDINGS_REPORTED
    ]
    shape = given.shape().model_copy(update={"linear": linear, "experts": experts})
    digest = f"sha256:{'0' * 64}"
    inspection = given.inspection(shape).model_copy(
        update={"findings": found, "near_duplicates": 10**9, "model_digest": digest, "data_digest": digest}
    )
    order = InspectOrder(
        namespace="n", job="j", job_uid="0" * 36, attempt=1, work_dir="/work/j", model_uri="pvc://m/m",
        data=DataOrder(train=[DataSource(uri="pvc://d/d")]),
    )  # fmt: skip
    assert len(succeeded(order, inspection).fitted().encode()) < 3700
    share = SourceShare(examples_percent=33.33, tokens_percent=33.33)
    mixed = inspection.model_copy(update={"findings": [], "sources": [share] * 32})
    succeeded(order, mixed).fitted()  # findings make room for the shares of as many sources as there may be


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({}, "400 examples"),
        ({FindingCode.LEAKED: 3, FindingCode.TRUNCATED: 1234}, "; to look at: leaked 3, truncated 1,234"),
    ],
)
def test_the_condition_names_what_is_to_be_looked_at(counts: dict[FindingCode, int], said: str) -> None:
    found = [Finding(severity="warns", code=code, count=count) for code, count in counts.items()]
    inspection = given.inspection().model_copy(update={"findings": found})
    of = given.history(given.job(), given.INSPECT, inspection=inspection)
    status = next_step(of, given.seen(of), given.NOW).status
    (condition,) = [each for each in status.conditions if each.type == ConditionType.INSPECTED]
    assert condition.message.endswith(said)
