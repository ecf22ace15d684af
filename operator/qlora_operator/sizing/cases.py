"""The prediction beside what somebody measured: a table of trainings with all that their memory depends on."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qlora_operator.sizing.config import read_shape
from qlora_operator.sizing.memory import CUDA_CONTEXT_BYTES, GIB, OPTIMIZER_BYTES, peak_of, reserved_bytes
from qlora_operator.sizing.training import DTYPE_BYTES, Training, decoder_of

#: What is adapted, by the words of the table.
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class CasesError(ValueError):
    """The table or a model beside it cannot be read; the message says which line and what to do."""


class Case(BaseModel):
    """A line of the table."""

    model_config = ConfigDict(frozen=True, extra="allow")

    model: str = Field(min_length=1)
    method: Literal["qlora", "lora"]
    double_quant: bool
    compute_dtype: Literal["float16", "bfloat16", "float32"]
    targets: Literal["attention", "all-linear"]
    rank: int = Field(ge=1)
    seq_len: int = Field(ge=1)
    micro_batch: int = Field(ge=1)
    gradient_checkpointing: bool
    attention: Literal["eager", "sdpa", "flash"]
    loss: Literal["logits", "fused"]
    optimizer: str
    norm_embed_fp32: bool
    gpus: int = Field(ge=1)
    sharding: Literal["none", "fsdp"]
    measured_gib: float = Field(gt=0)
    measure: str


@dataclass(frozen=True)
class Compared:
    """A case and what is predicted for it, in bytes; `error` as a fraction of what was measured."""

    case: Case
    row: dict[str, str]
    predicted_bytes: int

    @property
    def error(self) -> float:
        return self.predicted_bytes / GIB / self.case.measured_gib - 1

    def as_json(self) -> dict[str, Any]:
        return {
            **self.row,
            "predictedGiB": round(self.predicted_bytes / GIB, 3),
            "measuredGiB": self.case.measured_gib,
            "error": round(self.error, 4),
        }


def compare(table: Path, models: Path) -> list[Compared]:
    """Every line of `table` (CSV), with the shapes in `models` (config.json of each, named owner--name.json).

    Raises CasesError naming the line.
    """
    try:
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CasesError(f"{table}: {error}") from error
    if not rows:
        raise CasesError(f"{table}: no line under the header; give the columns {', '.join(Case.model_fields)}")
    found = []
    for number, row in enumerate(rows, start=2):
        try:
            case = Case.model_validate({key: value for key, value in row.items() if key is not None})
            found.append(Compared(case, row, predicted_bytes(case, models)))
        except ValidationError as error:
            first = error.errors()[0]
            raise CasesError(f"{table} line {number}: {first['loc'][0]}: {first['msg']}") from error
        except ValueError as error:
            raise CasesError(f"{table} line {number}: {error}") from error
    return found


def predicted_bytes(case: Case, models: Path) -> int:
    """What the case's own measure would show: allocated, reserved, or the process with the driver's context.

    Raises ValueError for a model without a shape, an unknown optimizer or an unknown measure.
    """
    training = training_of(case, models)
    measure = case.measure.split(",")[0]
    if measure == "allocated":
        return peak_of(training).bytes
    if measure not in ("reserved", "process"):
        raise ValueError(f"measure: {case.measure!r} is none of allocated, reserved, process")
    return reserved_bytes(training) + (CUDA_CONTEXT_BYTES if measure == "process" else 0)


def training_of(case: Case, models: Path) -> Training:
    """The case as a training of the trainers that such figures are measured with.

    These keep the logits in hand until the step is over and let torch's default allocator work. In bfloat16 they run
    under autocast, where embeddings stay in the compute type; without it, norms and embeddings in fp32 make the
    residual stream fp32. Those that shard quantise the whole base on each GPU first.
    """
    path = models / f"{case.model.replace('/', '--')}.json"
    try:
        shape = read_shape(path)
    except OSError as error:
        raise ValueError(f"model: no shape of {case.model}: put its config.json at {path}") from error
    except ValueError as error:
        raise ValueError(f"model: {error}") from error
    decoder = decoder_of(shape)
    compute = DTYPE_BYTES[case.compute_dtype]
    adapter_bytes, state_bytes = _adapter_and_state(case.optimizer, compute)
    autocast = case.compute_dtype == "bfloat16" and case.norm_embed_fp32
    gpus = case.gpus if case.sharding == "fsdp" else 1
    return Training(
        decoder=decoder,
        method=case.method,
        double_quant=case.double_quant,
        compute_bytes=compute,
        rank=case.rank,
        adapted=frozenset(_ATTENTION if case.targets == "attention" else (linear.name for linear in decoder.linears)),
        dropout=False,
        max_length=case.seq_len,
        micro_batch_size=case.micro_batch,
        gradient_checkpointing=case.gradient_checkpointing,
        attention=case.attention,
        state_bytes=state_bytes,
        update_bytes=float(adapter_bytes),
        adapter_bytes=adapter_bytes,
        norm_embed_fp32=case.norm_embed_fp32,
        autocast=autocast,
        loss="trl" if case.loss == "fused" else "logits",
        keeps_logits=not autocast,
        expands_heads=case.compute_dtype == "float16",
        loads_whole=gpus > 1,
        gpus=gpus,
    )


def _adapter_and_state(optimizer: str, compute_bytes: int) -> tuple[int, float]:
    """Bytes per trained weight: of the adapter, and of the optimizer's state."""
    if optimizer == "adamw_lora_dtype":
        return compute_bytes, 2.0 * compute_bytes
    if optimizer == "adamw_fp32":
        return 4, OPTIMIZER_BYTES["adamw_torch"]
    if optimizer in OPTIMIZER_BYTES:
        return 4, OPTIMIZER_BYTES[optimizer]
    known = ", ".join(("adamw_fp32", "adamw_lora_dtype", *OPTIMIZER_BYTES))
    raise ValueError(f"optimizer: {optimizer!r} is none of {known}")


def median_abs_error(compared: list[Compared]) -> float:
    return median(abs(row.error) for row in compared)


def worst_abs_error(compared: list[Compared]) -> float:
    return max(abs(row.error) for row in compared)
