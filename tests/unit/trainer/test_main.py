"""The pod's process: environment in, exit code and termination message out."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import pytest

from qlora_api.exchange import (
    ExitCode,
    Inspection,
    MergeOrder,
    MergeResult,
    Order,
    PublishOrder,
    PublishResult,
    TrainResult,
    parse_report,
)
from qlora_trainer import ask
from qlora_trainer.failures import describe
from qlora_trainer.main import in_words
from qlora_trainer.training import train

from .conftest import Place, examples, recipe_of, write_jsonl
from .progress_server import Endpoint


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def start(place: Place, order: Order | str, more: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
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
        "QLORA_CREDENTIALS": str(place.root / "credentials"),
        "QLORA_REPORT": str(place.root / "report.json"),
        "QLORA_METRICS_HOST": "127.0.0.1",
        "QLORA_METRICS_PORT": str(free_port()),
        **(more or {}),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "qlora_trainer"],
        env=environment, cwd=place.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(place: Place, order: Order | str, more: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    process = start(place, order, more)
    log, _ = process.communicate(timeout=120)
    return process.returncode, (place.root / "report.json").read_text(), log


def test_an_order_in_a_result_out(place: Place) -> None:
    code, report, log = finish(place, place.inspect_order())
    assert code == ExitCode.SUCCEEDED, log
    seen = Inspection.model_validate(parse_report(report).result)
    assert seen.examples == 48
    assert log.splitlines()[:2] == ["inspect of job team/tune, attempt 1", "looking at pvc://base/model"]
    assert log.splitlines()[-1] == (
        f"inspect succeeded: LlamaForCausalLM of {seen.shape.parameters:,} weights; 48 examples of "
        f"{seen.tokens.total:,} tokens, in {seen.sequences} sequences of at most {seen.max_length}"
    )
    assert "sparrow" not in log


def test_a_training_can_be_watched_from_outside(place: Place) -> None:
    """Its metrics while it runs, its progress to the last step before it was told to stop."""
    order = place.train_order(recipe={"max_steps": 100_000, "learning_rate": 1e-4})
    endpoint, port = Endpoint(place.root / "endpoint"), free_port()
    with endpoint.running():
        process = start(place, order, {**endpoint.environment, "QLORA_METRICS_PORT": str(port)})
        assert process.stdout
        next(line for line in process.stdout if line.startswith("step "))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(timeout=60) == ExitCode.INTERRUPTED, rest
    assert re.search(r"^qlora_train_step [1-9]", metrics, re.MULTILINE)
    failure = parse_report((place.root / "report.json").read_text()).failure
    assert failure and failure.startswith(f"told to stop at step {endpoint.steps()[-1]} of 100000")
    assert endpoint.steps()[0] == "0"


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
    assert "in train_with: 'NoneType'" in message


def test_a_file_that_may_not_be_read_is_told_with_its_cure() -> None:
    code, message = describe(PermissionError(13, "Permission denied", "/claims/base/model-1.safetensors"))
    assert code == ExitCode.BAD_INPUT
    assert "/claims/base/model-1.safetensors: not allowed for this pod's user" in message


def test_which_volume_is_full_depends_on_the_stage(place: Place) -> None:
    with pytest.raises(OSError, match="No space left") as raised:
        Path("/dev/full").write_text("x")
    # as safetensors says it
    assert describe(RuntimeError("I/O error: No space left on device (os error 28)"))[0] == ExitCode.VOLUME_FULL
    publish = PublishOrder(
        **place.envelope(), artifact="adapter", artifact_digest="sha256:a", output_uri="pvc://results/tune/adapter"
    )
    merge = MergeOrder(
        **place.envelope(),
        model_uri="pvc://base/model",
        model_digest="x",
        recipe=recipe_of(),
        adapter_digest="sha256:a",
    )
    orders = {"inspect": place.inspect_order(), "merge": merge, "publish": publish}
    told = {stage: describe(raised.value, order) for stage, order in orders.items()}
    assert {code for code, _ in told.values()} == {ExitCode.VOLUME_FULL}
    assert "scratch space" in told["inspect"][1]
    assert "the work volume" in told["merge"][1]
    assert "output.uri: the claim results has no room left" in told["publish"][1]
    assert describe(raised.value)[0] == ExitCode.VOLUME_FULL, "and where no order has been read"


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


def test_results_are_told_in_a_line() -> None:
    trained = TrainResult(
        adapter_digest="sha256:0123456789abcdef0123", adapter_bytes=1, steps=1200, epochs=3.0, train_loss=0.51239,
        eval_loss=0.6, tokens=1, tokens_per_second=1.0, seconds=4321.4, device="NVIDIA L40S", peak_memory_bytes=1,
    )  # fmt: skip
    assert in_words(trained) == (
        "1,200 steps in 4,321 s on NVIDIA L40S, loss 0.5124, 0.6000 on held-out examples; adapter sha256:0123456789ab"
    )
    merged = MergeResult(digest="sha256:0123456789abcdef0123", bytes=2_000_000, shards=2, parity=0.0012)
    assert in_words(merged) == "2,000,000 bytes in 2 files, sha256:0123456789ab; parity 1.2e-03"
    published = PublishResult(uri="pvc://a/b", digest="sha256:0123456789abcdef0123", bytes=2_000_000, files=5)
    assert in_words(published) == "5 files of 2,000,000 bytes at pvc://a/b, sha256:0123456789ab"
