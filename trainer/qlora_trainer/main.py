"""The pod's entry: reads the order, runs its stage, writes the report, exits with the code for how it ended."""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from qlora_api.exchange import (
    CLAIMS_MOUNT,
    ORDER_PATH,
    REPORT_MAX_BYTES,
    REPORT_PATH,
    ExitCode,
    Order,
    Result,
    Stage,
    failed,
    parse_order,
    succeeded,
)
from qlora_trainer.environment import Pod, log, prepare_process
from qlora_trainer.failures import describe
from qlora_trainer.interruption import Interruption

#: Where each stage is; imported when its turn comes, for publish needs no torch and merge no transformers.
STAGES = {
    Stage.INSPECT: ("qlora_trainer.inspection", "inspect"),
    Stage.TRAIN: ("qlora_trainer.training", "train"),
    Stage.MERGE: ("qlora_trainer.merge", "merge"),
    Stage.PUBLISH: ("qlora_trainer.publish", "publish"),
}


def run_stage(order: Order, pod: Pod) -> Result:
    """Do what `order` says."""
    module, name = STAGES[order.stage]
    stage: Callable[[Order, Pod], Result] = getattr(importlib.import_module(module), name)
    return stage(order, pod)


def main() -> int:
    """Run the ordered stage; the exit code is `ExitCode`'s, or 1 for what nobody foresaw."""
    prepare_process()
    interruption = Interruption()
    interruption.install()
    pod = Pod(claims=os.environ.get("QLORA_CLAIMS", CLAIMS_MOUNT), interruption=interruption)
    report_path = Path(os.environ.get("QLORA_REPORT", REPORT_PATH))
    order_path = Path(os.environ.get("QLORA_ORDER", ORDER_PATH))
    order: Order | None = None
    try:
        text = order_path.read_text(encoding="utf-8")
        order = parse_order(text)
        log.info("%s of job %s/%s, attempt %d", order.stage, order.namespace, order.job, order.attempt)
        report = succeeded(order, run_stage(order, pod))
        report_path.write_text(report.fitted(), encoding="utf-8")
        log.info("%s succeeded: %s", order.stage, json.dumps(report.result))
        return ExitCode.SUCCEEDED
    except BaseException as error:  # noqa: BLE001  the one place where every end becomes an exit code and a message
        code, message = describe(error)
        log.error("%s", message, exc_info=error if code == 1 or log.isEnabledFor(logging.DEBUG) else None)
        report_path.write_text(failed(order, message).fitted() if order else _without_order(message), encoding="utf-8")
        return code


def _without_order(message: str) -> str:
    """An order that cannot be read has no job to report for: the plain message is the termination message."""
    return message[: REPORT_MAX_BYTES // 4]
