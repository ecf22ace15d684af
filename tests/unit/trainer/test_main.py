"""The pod's process: environment in, exit code and termination message out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_api.exchange import ExitCode, Inspection, Order, TrainResult, parse_report
from qlora_trainer import ask
from qlora_trainer.failures import describe
from qlora_trainer.training import train

from .conftest import Place, examples, write_jsonl


def start(place: Place, order: Order | str) -> subprocess.Popen[str]:
    """The process as a pod runs it: no home of its own, nothing in its environment but what the manifest says."""
    (place.root / "order.json").write_text(order if isinstance(order, str) else order.to_json())
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/tmp",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONUNBUFFERED": "1",
        "QLORA_ORDER": str(place.root / "order.json"),
        "QLORA_CLAIMS": str(place.claims),
        "QLORA_REPORT": str(place.root / "report.json"),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "qlora_trainer"],
        env=environment, cwd=place.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(place: Place, order: Order | str) -> tuple[int, str, str]:
    process = start(place, order)
    log, _ = process.communicate(timeout=120)
    return process.returncode, (place.root / "report.json").read_text(), log


def test_an_order_in_a_result_out(place: Place) -> None:
    code, report, log = finish(place, place.inspect_order())
    assert code == ExitCode.SUCCEEDED, log
    seen = Inspection.model_validate(parse_report(report).result)
    assert seen.examples == 48
    assert log.splitlines()[:2] == ["inspect of job team/tune, attempt 1", "looking at pvc://base/model"]
    assert "sparrow" not in log


def test_bad_input_is_told_in_the_report(place: Place) -> None:
    with (place.claims / "data" / "train.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "asistant", "content": "x"}]}\n')
    code, report, log = finish(place, place.inspect_order())
    assert code == ExitCode.BAD_INPUT
    failure = parse_report(report).failure
    assert failure == (
        'dataset.train[0] line 49: messages[0]: role "asistant"; roles are system, user, assistant, tool'
    )
    assert "Traceback" not in log


def test_sigterm_saves_and_the_next_pod_goes_on(place: Place) -> None:
    order = place.train_order(recipe={"max_steps": 100_000, "learning_rate": 1e-4})
    process = start(place, order)
    assert process.stdout
    for line in process.stdout:
        if line.startswith("step "):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=60) == ExitCode.INTERRUPTED, rest
    failure = parse_report((place.root / "report.json").read_text()).failure
    assert failure and failure.startswith("told to stop at step ")
    (saved,) = place.work.glob("checkpoints/*/step-*")
    progress = json.loads((saved / "progress.json").read_text())
    assert f"step {progress['step']} of 100000" in failure

    again = start(place, order.model_copy(update={"attempt": 2}))
    assert again.stdout
    resumed = next(line for line in again.stdout if line.startswith("resumed from step "))
    again.kill()
    again.communicate()
    assert resumed == f"resumed from step {progress['step']}\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"version": "v9", "stage": "inspect"}', "use operator and trainer images of one release"),
        ("{", "the order is not a JSON object"),
    ],
)
def test_an_order_that_cannot_be_read_is_no_fault_of_the_users(place: Place, text: str, told: str) -> None:
    code, report, _ = finish(place, text)
    assert code == 1
    assert told in report


def test_what_nobody_foresaw_names_its_place() -> None:
    with pytest.raises(AttributeError) as raised:
        train(None, None)  # pyright: ignore[reportArgumentType]
    code, message = describe(raised.value)
    assert code == 1
    assert message.startswith("AttributeError at training.py:")
    assert "in train: 'NoneType'" in message


def test_a_file_that_may_not_be_read_is_told_with_its_cure() -> None:
    code, message = describe(PermissionError(13, "Permission denied", "/claims/base/model-1.safetensors"))
    assert code == ExitCode.BAD_INPUT
    assert "/claims/base/model-1.safetensors: not allowed for this pod's user" in message


def test_asking_the_tuned_model_gives_what_training_scored(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(place.claims / "data" / "golden.jsonl", examples()[:12])  # what was learned by heart can be answered
    result: TrainResult = train(place.train_order(recipe={"method": "lora", "max_steps": 60}), place.pod)
    (score,) = result.scores
    assert score.tuned > 0.5 > score.base
    model, golden = place.claims / "base" / "model", place.claims / "data" / "golden.jsonl"
    arguments = ["--model", str(model), "--adapter", str(place.work / "adapter")]
    assert ask.main([*arguments, "--golden", str(golden)]) == 0
    assert capsys.readouterr().out.endswith(f"exactMatch {score.tuned:.4f} ({round(score.tuned * 12)} of 12)\n")
    assert ask.main([*arguments, "--prompt", "What is a sparrow?"]) == 0
    assert capsys.readouterr().out.strip() in ("bird", "fish", "rock", "tree", "flower")
    assert Path(place.work / "results" / "train.json").is_file()
