"""The bench's own arithmetic and how it tells its figures."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench import __main__ as operator
from tests.bench import figures, trainer
from tests.bench.figures import Figure, Measured, Target, percentile, rate, told

SETTING = {"command": "python -m tests.bench burst", "date": "2026-09-01", "machine": "2 cores", "load": "0.1 0.2"}


def test_percentiles_are_values_that_were_measured() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert percentile(values, 50) == 3.0
    assert percentile(values, 99) == 5.0
    assert percentile(values, 1) == 1.0
    assert percentile([7.0], 99) == 7.0


def test_a_rate_counts_from_the_first_request_to_the_last_arrival() -> None:
    assert rate({"a": 10.0, "b": 10.5}, {"a": 11.0, "b": 14.0}) == 0.5
    assert rate({}, {"a": 11.0, "b": 14.0}, since=13.0) == 2.0


def test_the_median_is_held_against_the_target() -> None:
    target = Target("at least", 0.25)
    assert Figure("ratio", "", (0.1, 0.25, 0.3), target).verdict == "met"
    assert Figure("ratio", "", (0.1, 0.24, 0.3), target).verdict == "missed"
    assert Figure("memory", "MiB", (201.0,), Target("at most", 200)).verdict == "missed"
    assert Figure("rate", "jobs/s", (1.0,)).verdict == ""


def test_numbers_have_three_significant_digits() -> None:
    assert [told(value) for value in (0.0, 0.2468, 2.5, 33.333, 1234.5)] == ["0", "0.247", "2.50", "33.3", "1234"]


def test_table_and_page_show_runs_targets_and_setting() -> None:
    ratio = Figure("ratio", "", (0.2, 0.3, 0.4), Target("at least", 0.25))
    results = {"burst": figures.result(Measured((ratio,), {"POST jobs": 1.0}), SETTING)}
    head, row = figures.table(results).splitlines()
    for name, value in zip(
        figures.HEAD, ("burst: ratio", "0.300", "0.200, 0.300, 0.400", "at least 0.250"), strict=False
    ):
        assert row[head.index(name) :].startswith(value)
    assert row.endswith("met")
    page = figures.page(results)
    assert "| burst: ratio | 0.300 | 0.200, 0.300, 0.400 | at least 0.250 | met |" in page
    assert "| burst | python -m tests.bench burst | 2026-09-01 | 2 cores | 0.1 0.2 |" in page
    assert "| POST jobs | 1.00 |" in page


@pytest.mark.parametrize(
    ("kept", "page"),
    [
        (operator.PLACE / "operator.json", figures.page),
        (trainer.PAGE.with_suffix(".json"), trainer.page),
    ],
    ids=["operator", "trainer"],
)
def test_the_pages_are_those_of_what_was_measured(kept: Path, page: Callable[[figures.Results], str]) -> None:
    results = json.loads(kept.read_text())
    assert kept.with_suffix(".md").read_text() == page(results)


def test_each_measure_says_what_it_measures() -> None:
    assert figures.MEANING.keys() == operator.MEASURES.keys() | operator.ALONE.keys()
    assert trainer.MEANING.keys() == trainer.MEASURES.keys()
