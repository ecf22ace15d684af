"""GitOps tools read a job right: kstatus itself, on objects by hand and on the statuses that the policies write."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest

from qlora_api.v1alpha1 import JobStatus
from qlora_operator.lifecycle.observed import Absent, Active, Job, Observed
from qlora_operator.lifecycle.policies import next_step
from qlora_operator.lifecycle.tasks import INSPECT, TRAIN
from tests.e2e.judge import Status, Verdict, judge
from tests.unit.operator import given
from tests.unit.operator.kstatus import kstatus as as_the_unit_tests_read_it

pytestmark = pytest.mark.cluster  # needs no cluster, but what compiles one: Go


def thing(status: Mapping[str, Any] | None, *, generation: int = 2, **metadata: Any) -> dict[str, Any]:
    """An object of a kind that kstatus has no rules of its own for."""
    found: dict[str, Any] = {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRAJob",
        "metadata": {"name": "support-bot", "generation": generation, **metadata},
    }
    return found if status is None else found | {"status": status}


def saying(observed: int | None = 2, **conditions: str) -> dict[str, Any]:
    """A status with `conditions`, in the order given."""
    said = [{"type": kind, "status": value, "reason": "R", "message": f"{kind}!"} for kind, value in conditions.items()]
    return ({} if observed is None else {"observedGeneration": observed}) | {"conditions": said}


BY_HAND = [
    pytest.param(thing(None), "Current", "Resource is current", id="no status: why the CRD defaults one"),
    pytest.param(thing({"observedGeneration": -1}), "InProgress", "observed generation is -1", id="the CRD's default"),
    pytest.param(thing(saying(1, Ready="True")), "InProgress", "observed generation is 1", id="generation behind"),
    pytest.param(thing(saying(Ready="True")), "Current", "Resource is Ready", id="Ready"),
    pytest.param(thing(saying(Ready="False")), "InProgress", "Ready!", id="not Ready"),
    pytest.param(thing(saying(Ready="Unknown")), "InProgress", "Ready!", id="Ready unknown"),
    pytest.param(thing(saying(Ready="False", Failed="True")), "InProgress", "Ready!", id="Failed alone is no failure"),
    pytest.param(thing(saying(Ready="True", Reconciling="True")), "InProgress", "Reconciling!", id="Reconciling wins"),
    pytest.param(thing(saying(Ready="False", Stalled="True")), "Failed", "Stalled!", id="Stalled"),
    pytest.param(
        thing(saying(Ready="True"), deletionTimestamp="2026-09-01T12:00:00Z"), "Terminating", "deletion", id="deleted"
    ),
    pytest.param(thing({"conditions": 3}), "Unknown", "cannot restore slice", id="a status that it cannot read"),
]


@pytest.mark.parametrize(("found", "status", "says"), BY_HAND)
def test_kstatus_reads_an_object(found: dict[str, Any], status: str, says: str) -> None:
    [verdict] = judge([found])
    assert verdict.status == status
    assert says in verdict.message


def test_every_object_has_its_own_verdict_whatever_it_says() -> None:
    """Messages of many lines, tabs and 2 MiB do not shift the verdicts that come after."""
    long, many = "x" * 2**21, "it failed:\n\tline 2\r\nand\u2028so on"
    objects = [thing(saying(Stalled="True")), thing(None), thing(saying(Ready="True"))]
    objects[0]["status"]["conditions"][0]["message"] = many
    objects[1]["metadata"]["annotations"] = {"long": long}
    assert judge(objects) == [
        Verdict(Status.FAILED, "it failed: \tline 2  and\u2028so on"),
        Verdict(Status.CURRENT, "Resource is current"),
        Verdict(Status.CURRENT, "Resource is Ready"),
    ]
    assert judge([]) == []


def test_what_is_no_object_is_named_by_its_place() -> None:
    with pytest.raises(ValueError, match=r"object 2: Object 'Kind' is missing"):
        judge([thing(None), {"metadata": {}}, thing(None)])


def test_the_unit_tests_read_statuses_as_kstatus_does() -> None:
    """They use a few lines of Python for it; every combination of what these look at is judged by both."""
    values = (None, "True", "False", "Unknown")
    objects = []
    for reconciling, stalled, ready in itertools.product(values, repeat=3):
        conditions = {"Reconciling": reconciling, "Stalled": stalled, "Ready": ready}
        said = {kind: value for kind, value in conditions.items() if value}
        for observed in (None, -1, 1, 2):
            objects.append(thing(saying(observed, **said)))
            objects.append(thing(saying(observed, **said), deletionTimestamp="2026-09-01T12:00:00Z"))
    verdicts = judge(objects)
    assert [as_the_unit_tests_read_it(found) for found in objects] == [verdict.status for verdict in verdicts]
    assert {verdict.status for verdict in verdicts} == set(Status) - {Status.UNKNOWN}


# --- the statuses that the policies write ---


def decided(of: Job, seen: Observed | None = None) -> dict[str, Any]:
    """The object once the operator's next decision about `of` is written."""
    step = next_step(of, seen or given.seen(of), given.NOW)
    return given.document(generation=of.metadata.generation) | {"status": step.status.to_api()}


FRESH = given.job()
REFUSED = given.job({"output.signingKeySecretRef": {"name": "key"}})
TRAINABLE = given.history(given.job(), INSPECT)
RESTING = given.job({"suspend": True})
PLAN_ONLY = given.job({"planOnly": True})
BAD_DATA = given.job(status=JobStatus(attempts=(given.attempt(INSPECT, 1, "BadInput", message="line 3: no role"),)))

DECIDED = [
    pytest.param(FRESH, {}, "InProgress", "starting inspect", id="first touch"),
    pytest.param(FRESH, {"inspect-1": Active()}, "InProgress", "inspect is running", id="inspecting"),
    pytest.param(
        FRESH, {"inspect-1": Active(waiting="no image")}, "InProgress", "no image", id="the inspection's pod waits"
    ),
    pytest.param(FRESH, {"inspect-1": given.succeeded(INSPECT)}, "InProgress", "inspect", id="inspected"),
    pytest.param(given.history(FRESH, INSPECT, planned=False), {}, "InProgress", "no GPU can", id="no node yet"),
    pytest.param(TRAINABLE, {"train-1": Absent()}, "InProgress", "starting train", id="to train"),
    pytest.param(TRAINABLE, {"train-1": Active()}, "InProgress", "train is running", id="training"),
    pytest.param(TRAINABLE, {"train-1": given.exited(1)}, "InProgress", "train", id="training crashed: again"),
    pytest.param(given.history(RESTING, INSPECT), {}, "InProgress", "suspended", id="suspended"),
    pytest.param(given.history(PLAN_ONLY, INSPECT), {}, "Current", "Resource is Ready", id="planned only: done"),
    pytest.param(
        REFUSED, {}, "Failed", "spec.output.signingKeySecretRef: not supported", id="a field that is not built"
    ),
    pytest.param(BAD_DATA, {}, "Failed", "line 3: no role", id="bad data"),
    pytest.param(
        given.history(FRESH, INSPECT, TRAIN, given.PUBLISH_ADAPTER), {}, "Current", "Resource is Ready", id="published"
    ),
]


@pytest.mark.parametrize(("of", "seen", "status", "says"), DECIDED)
def test_kstatus_reads_what_the_policies_write(of: Job, seen: Mapping[str, Any], status: str, says: str) -> None:
    [verdict] = judge([decided(of, given.seen(of, seen))])
    assert verdict.status == status, verdict
    assert says in verdict.message


def test_a_job_is_in_progress_until_the_operator_has_seen_it() -> None:
    """What the API server stores before the first touch is the model's default status."""
    [verdict] = judge([given.document() | {"status": JobStatus().to_api()}])
    assert verdict.status == Status.IN_PROGRESS


def test_a_finished_job_that_is_edited_is_read_again_only_when_the_operator_has_seen_the_edit() -> None:
    done = decided(given.history(given.job(), INSPECT, TRAIN, given.PUBLISH_ADAPTER))
    edited = given.job({"suspend": True}, JobStatus.model_validate(done["status"]), generation=2)
    before, after = judge([done | {"metadata": done["metadata"] | {"generation": 2}}, decided(edited)])
    assert (before.status, after.status) == (Status.IN_PROGRESS, Status.CURRENT)
