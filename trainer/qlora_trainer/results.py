"""Results that finished stages leave in the work volume: a stage that is run again returns what it found before."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from qlora_api.exchange import MergeOrder, MergeResult, PublishOrder, PublishResult, TrainOrder, TrainResult
from qlora_trainer.artifacts import write_file

Order = TrainOrder | MergeOrder | PublishOrder
R = TypeVar("R", TrainResult, MergeResult, PublishResult)
#: What does not change a stage's result: who asks, as whom, and for the how-manieth time.
_CIRCUMSTANCES = {"namespace", "job", "job_uid", "attempt", "work_dir", "model_secret", "output_secret"}


def binding(order: Order) -> str:
    """What a result is bound to: everything in the order that decides it; `sha256:…`."""
    if isinstance(order, TrainOrder):
        return order.binding()
    deciding = order.model_dump(mode="json", by_alias=True, exclude=_CIRCUMSTANCES)
    return f"sha256:{hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()}"


def _path(order: Order) -> Path:
    name = f"publish-{order.artifact}" if isinstance(order, PublishOrder) else order.stage.value
    return Path(order.work_dir) / "results" / f"{name}.json"


def recorded(order: Order, kind: type[R]) -> R | None:
    """The result of an earlier attempt at this very order, if there is one."""
    try:
        document = json.loads(_path(order).read_text(encoding="utf-8"))
        return kind.model_validate(document["result"]) if document["binding"] == binding(order) else None
    except (FileNotFoundError, KeyError, TypeError, ValueError, ValidationError):
        return None


def record(order: Order, result: TrainResult | MergeResult | PublishResult) -> None:
    """Keep `result` for the next attempt, whole, bound to its order."""
    document = {"binding": binding(order), "result": result.model_dump(mode="json", by_alias=True, exclude_none=True)}
    write_file(_path(order), json.dumps(document, indent=2, sort_keys=True) + "\n")
