"""Formats × files × methods × optimizers × packing × ranks, from the job that a user writes to the adapter.

Each row goes the job's own way: the operator's inspect order, the stage, its plan for the nodes of a cluster, its train
order, the stage. Two ranks are replicas that meet over gloo, and have the losses of one.

In the ordinary run each value meets each other at least once (`pairwise`, 35 rows). `make soak` has every method with
every optimizer, packing and number of ranks (112 rows; formats and files, of which nothing is left once the data is
prepared, are dealt out over them), and interrupts the trainings of one rank to hold what goes on against them, bit
by bit.
"""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pyarrow as pa
import pytest
import torch
from peft import PeftModel
from pyarrow import parquet
from transformers import AutoModelForCausalLM

from qlora_api.exchange import ExitCode, Inspection, TrainOrder, TrainResult, parse_order
from qlora_api.v1alpha1 import Plan
from qlora_api.v1alpha1.fields import DataFormat, Optimizer
from qlora_operator.commands.nodes import nodes_of_file
from qlora_operator.lifecycle.observed import Job
from qlora_operator.lifecycle.tasks import INSPECT, TRAIN, Task
from qlora_operator.manifests.orders import order as order_of
from qlora_operator.placement.inventory import Inventory
from qlora_operator.planner import plan
from qlora_operator.settings import Settings
from qlora_trainer.environment import Pod
from qlora_trainer.failures import Interrupted
from qlora_trainer.main import run_stage

from ..operator import given
from ..operator.jobs_in_cluster import FILES
from .conftest import KIND, THINGS, Place
from .side_by_side import needs_forks, side_by_side
from .test_training import InterruptedAfter, losses

#: What carries loss, where it is not the assistant's turns.
LOSSES = {"text": "all", "prompt-completion": "completion", "instruction": "completion"}
BATCH, MICRO = 2, 1
#: q, k, v, o, gate, up and down in two layers.
ADAPTED = 14


def pairs_of(row: Sequence[Any]) -> set[tuple[int, Any, int, Any]]:
    """The pairs of values that a row brings together, with their columns."""
    return {(one, row[one], other, row[other]) for one, other in itertools.combinations(range(len(row)), 2)}


def pairwise(columns: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Rows in which each value of a column meets each value of every other column at least once.

    Greedy, and the same every time: of all rows the first that brings most pairs which no earlier row has brought.
    """
    every = {row: pairs_of(row) for row in itertools.product(*columns)}
    missing = set[Any]().union(*every.values())
    chosen: list[tuple[Any, ...]] = []
    while missing:
        best = max(every, key=lambda row: len(every[row] & missing))
        missing -= every[best]
        chosen.append(best)
    return chosen


# --- the columns ---


def of_format(written: str, question: str, answer: str) -> dict[str, Any]:
    """One example as people write it in that format."""
    match written:
        case "messages":
            return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        case "prompt-completion":
            return {"prompt": question, "completion": " " + answer}
        case "instruction":
            return {"instruction": question, "output": answer}
        case "sharegpt":
            return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        case _:
            return {"text": f"{question} {answer}"}


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({name: v if isinstance(v, str) else json.dumps(v) for name, v in row.items()})


FILE_TYPES: dict[str, Callable[[Path, list[dict[str, Any]]], object]] = {
    "jsonl": _jsonl,
    "json": lambda path, rows: path.write_text(json.dumps(rows)),
    "parquet": lambda path, rows: parquet.write_table(pa.Table.from_pylist(rows), path),
    "csv": _csv,
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "nf4": {"method": "qlora"},
    "fp4": {"method": "qlora", "quantization.type": "fp4"},
    "rslora": {"method": "qlora", "lora.rslora": True},
    "dora": {"method": "qlora", "lora.dora": True},
    "loftq": {"method": "qlora", "lora.init": "loftq"},
    "gaussian": {"method": "qlora", "lora.init": "gaussian"},
}


class Row(NamedTuple):
    format: str
    file: str
    method: str
    optimizer: str
    packing: bool
    ranks: int

    def __str__(self) -> str:
        return "-".join([*self[:4], "packed" if self.packing else "one by one", f"{self.ranks} ranks"])


COLUMNS = (get_args(DataFormat), tuple(FILE_TYPES), tuple(METHODS), get_args(Optimizer), (True, False), (1, 2))
OFTEN = [Row(*row) for row in pairwise(COLUMNS)]
SELDOM = [
    Row(*data, *recipe)
    for data, recipe in zip(
        itertools.cycle(itertools.product(*COLUMNS[:2])), itertools.product(*COLUMNS[2:]), strict=False
    )
]
MATRIX = [*OFTEN, *(pytest.param(row, marks=pytest.mark.soak) for row in SELDOM)]


def test_each_pair_of_values_is_in_the_ordinary_run() -> None:
    every = set[Any]().union(*(pairs_of(row) for row in itertools.product(*COLUMNS)))
    assert set[Any]().union(*(pairs_of(row) for row in OFTEN)) == every
    # no fewer rows can do: the two longest columns meet in so many
    longest = sorted(map(len, COLUMNS))[-2:]
    assert longest[0] * longest[1] <= len(OFTEN) <= 1.5 * longest[0] * longest[1]


# --- a job's way ---


class InPlace:
    """A job, and where its volumes are here."""

    def __init__(self, place: Place, row: Row) -> None:
        self.place = place
        spec = {
            "model.uri": "pvc://base/model",
            "dataset.train": [{"uri": f"pvc://data/rows.{row.file}", "format": row.format}],
            "dataset.maxLength": 48,  # two or three examples, a step or more of those that packing leaves
            "dataset.packing": row.packing,
            "quantization.computeDtype": "float32",  # where comparisons can be strict
            "lora.rank": 8,
            "lora.dropout": 0.0,
            "training.epochs": 1.0,
            "training.learningRate": 5e-3,
            "training.effectiveBatchSize": BATCH,
            "training.microBatchSize": MICRO,
            "training.optimizer": row.optimizer,
            "training.gradientCheckpointing": False,
            "hardware.gpus": row.ranks,
            **METHODS[row.method],
        }
        self.job = given.job(spec)

    def order(self, task: Task) -> Any:
        """The operator's, read from the document; work volume and device are those that are here."""
        written = parse_order(order_of(self.job, task, 1, Settings(trainer_image="trainer")).to_json())
        here = {"work_dir": str(self.place.work)} | ({"accelerator": "cpu"} if task == TRAIN else {})
        return written.model_copy(update=here)

    def inspect(self) -> Inspection:
        """What the stage finds, as the operator records it."""
        found = run_stage(self.order(INSPECT), self.place.pod)
        assert isinstance(found, Inspection)
        self._record(inspection=found)
        return found

    def plan(self) -> Plan:
        """The operator's, for the nodes of a cluster."""
        assert self.job.status.inspection
        made = plan(self.job.spec, self.job.status.inspection, Inventory.of(nodes_of_file(str(FILES / "nodes.yaml"))))
        assert isinstance(made, Plan), made
        self._record(plan=made)
        return made

    def _record(self, **found: Any) -> None:
        self.job = Job(self.job.metadata, self.job.spec, self.job.status.model_copy(update=found))


def trained(place: Place, order: TrainOrder) -> tuple[TrainResult, list[float]]:
    """What a training by as many ranks as `order` says comes to, and its losses."""
    if order.ranks > 1:
        assert side_by_side(order.ranks, lambda _: run_stage(order, place.pod)) == [ExitCode.SUCCEEDED] * order.ranks
    result = run_stage(order, place.pod)  # a finished one only says what it found
    assert isinstance(result, TrainResult)
    return result, losses(place)


@needs_forks
@pytest.mark.parametrize("row", MATRIX, ids=str)
def test_a_job_of_each_kind_learns(place: Place, row: Row, request: pytest.FixtureRequest) -> None:
    rows = [of_format(row.format, f"What is a {thing}?", KIND[thing]) for thing in THINGS]
    FILE_TYPES[row.file](place.claims / "data" / f"rows.{row.file}", rows)
    job = InPlace(place, row)
    inspection, planned = job.inspect(), job.plan()
    assert (inspection.examples, inspection.truncated_percent) == (len(rows), 0)
    assert inspection.loss == LOSSES.get(row.format, "assistant")
    assert (planned.gpus, planned.sharded) == (row.ranks, False)

    order: TrainOrder = job.order(TRAIN)
    result, learned = trained(place, order)
    assert result.steps == len(learned) == -(-inspection.sequences // BATCH)
    assert (inspection.sequences < len(rows)) == row.packing
    assert result.tokens == inspection.tokens.total, "an epoch has each token of the data once"
    assert learned[-1] < 0.9 * learned[0]
    _loads_in_plain_peft(place)
    adapter = result.adapter_digest

    if row.ranks > 1:
        shutil.rmtree(place.work)
        _, alone = trained(place, order.model_copy(update={"ranks_per_node": 1}))
        assert learned == pytest.approx(alone, rel=1e-4)
    elif request.node.get_closest_marker("soak"):
        shutil.rmtree(place.work)
        with pytest.raises(Interrupted, match="at step 1 of"):
            run_stage(order, Pod(InterruptedAfter(BATCH // MICRO + 2), place.pod.claims))
        again, resumed = trained(place, order)
        assert (again.resumed_from_step, resumed, again.adapter_digest) == (1, learned, adapter)


def _loads_in_plain_peft(place: Place) -> None:
    base = AutoModelForCausalLM.from_pretrained(place.claims / "base" / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(place.work / "adapter"))
    learned = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    assert len(learned) == ADAPTED
    assert all(float(weight.abs().max()) > 0 for weight in learned)
