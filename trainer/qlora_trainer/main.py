"""The pod's entry: reads the order, runs its stage, writes the report, exits with the code for how it ended."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from qlora_api.exchange import (
    CLAIMS_MOUNT,
    CREDENTIALS_MOUNT,
    METRICS_PORT,
    ORDER_PATH,
    REPORT_MAX_BYTES,
    REPORT_PATH,
    ExitCode,
    Inspection,
    MergeResult,
    Order,
    PublishResult,
    Result,
    Stage,
    TrainOrder,
    TrainResult,
    failed,
    parse_order,
    succeeded,
)
from qlora_trainer.environment import Pod, log, prepare_process
from qlora_trainer.failures import GateFailed, StageError, describe
from qlora_trainer.interruption import Interruption
from qlora_trainer.metrics import Metrics
from qlora_trainer.reporting import Reporter, Server
from qlora_trainer.watchdog import Watchdog
from qlora_trainer.words import leave_word

#: What is said of a rank, or of a pod's first process, that was told to stop and could not hear of it in time.
_WHILE_DEAF = "told to stop (SIGTERM) while a library was at work, with nothing to save"

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
    pod = Pod(
        interruption=interruption,
        claims=os.environ.get("QLORA_CLAIMS", CLAIMS_MOUNT),
        credentials=os.environ.get("QLORA_CREDENTIALS", CREDENTIALS_MOUNT),
    )
    report_path = Path(os.environ.get("QLORA_REPORT", REPORT_PATH))
    number = int(os.environ.get("RANK", 0))
    if number:
        log.setLevel(logging.WARNING)  # the first one speaks for all
    order_path = Path(os.environ.get("QLORA_ORDER", ORDER_PATH))
    order: Order | None = None
    reporter: Reporter | None = None
    watchdog: Watchdog | None = None
    try:
        text = order_path.read_text(encoding="utf-8")
        order = parse_order(text)
        log.info("%s of job %s/%s, attempt %d", order.stage, order.namespace, order.job, order.attempt)
        if isinstance(order, TrainOrder) and order.ranks > 1:
            interruption.leave_when_deaf(lambda: _leave(order, report_path, ExitCode.INTERRUPTED, _WHILE_DEAF))
            if "RANK" not in os.environ:
                from qlora_trainer.launch import launch  # it imports torch

                return launch(order, report_path)
        if order.stage is Stage.TRAIN and not number:  # ranks go on or hang together: one of them watches
            watchdog = Watchdog(lambda reason: _leave(order, report_path, ExitCode.STALLED, reason))
            pod = replace(pod, watchers=(watchdog,))
            metrics = Metrics()
            port = int(os.environ.get("QLORA_METRICS_PORT", METRICS_PORT))
            metrics.serve(port, os.environ.get("QLORA_METRICS_HOST"))
            pod = replace(pod, watchers=(*pod.watchers, metrics))
            if server := Server.from_environment(os.environ):
                reporter = Reporter(server)
                pod = replace(pod, watchers=(*pod.watchers, reporter))
        result = run_stage(order, pod)
        _tell(report_path, ExitCode.SUCCEEDED, succeeded(order, result).fitted())
        if not number:
            log.info("%s succeeded: %s", order.stage, in_words(result))
        return ExitCode.SUCCEEDED
    except BaseException as error:  # noqa: BLE001  the one place where every end becomes an exit code and a message
        code, message = describe(error, order)
        unforeseen = code == 1 and not isinstance(error, StageError)
        log.error("%s", message, exc_info=error if unforeseen or log.isEnabledFor(logging.DEBUG) else None)
        result = error.result if isinstance(error, GateFailed) else None
        report = failed(order, message, result).fitted() if order else _without_order(message)
        _tell(report_path, code, report, foreseen=not unforeseen)
        return code
    finally:
        if watchdog:
            watchdog.close()
        if reporter:
            with interruption.deferred():
                reporter.close()


def _leave(order: Order | None, report_path: Path, code: ExitCode, reason: str) -> None:
    """End the process at once, whatever its threads wait for: what hangs cannot be asked to stop."""
    log.error("%s", reason)
    _tell(report_path, code, failed(order, reason).fitted() if order else _without_order(reason))
    os._exit(code)


def _tell(path: Path, code: int, report: str, *, foreseen: bool = True) -> None:
    """Leave the report where the pod's is, or, for one process of several, for the one that has started it."""
    if "RANK" in os.environ:
        leave_word(os.environ, code, report, foreseen=foreseen)
    else:
        path.write_text(report, encoding="utf-8")


def in_words(result: Result) -> str:
    """What came out, in a line for people."""
    match result:
        case Inspection():
            return (
                f"{result.architecture} of {result.shape.parameters:,} weights; {result.examples:,} examples of "
                f"{result.tokens.total:,} tokens, in {result.sequences:,} sequences of at most {result.max_length:,}"
            )
        case TrainResult():
            held_out = "" if result.eval_loss is None else f", {result.eval_loss:.4f} on held-out examples"
            return (
                f"{result.steps:,} steps in {result.seconds:,.0f} s on {result.device}, loss {result.train_loss:.4f}"
                f"{held_out}; adapter {result.adapter_digest[:19]}"
            )
        case MergeResult():
            return f"{result.bytes:,} bytes in {result.shards} files, {result.digest[:19]}; parity {result.parity:.1e}"
        case PublishResult():
            return f"{result.files} files of {result.bytes:,} bytes at {result.uri}, {result.digest[:19]}"


def _without_order(message: str) -> str:
    """An order that cannot be read has no job to report for: the plain message is the termination message."""
    return message[: REPORT_MAX_BYTES // 4]
