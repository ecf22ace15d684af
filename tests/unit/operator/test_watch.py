"""`kubectl qlora watch`, run as people run it, beside a kubectl that plays what a real one says."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as for_all
from hypothesis import strategies as st
from rich.console import Console

from qlora_api.v1alpha1 import OlderAttempts, Phase, Progress
from qlora_operator.commands.watch import LOST, RECONNECTS, SUCCEEDED, Lost, documents, read, watch
from qlora_operator.lifecycle.tasks import INSPECT, TRAIN
from tests.unit.operator import given

NOT_FOUND = 'Error from server (NotFound): qlorajobs.qlora.dev "support-bot" not found'


class Kubectl:
    """A program of that name. Each run plays the next of its plays (the last for ever) and notes its arguments."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.plays = 0
        directory.mkdir()
        program = directory / "kubectl"
        program.write_text(
            f'#!/bin/sh\ncd {directory}\necho "$@" >> arguments\n'
            "run=$(( $(cat runs 2>/dev/null || echo 0) + 1 ))\necho $run > runs\n"
            f"[ -f $run.sh ] || run=$(cat last)\n. ./$run.sh\n"
        )
        program.chmod(0o755)

    def play(self, *said: dict[str, Any] | str, complaint: str = "", code: int = 0, hang: bool = False) -> None:
        """Next time: write `said` (events as kubectl indents them, or text), complain, and end with `code`."""
        self.plays += 1
        text = "".join(part if isinstance(part, str) else json.dumps(part, indent=4) + "\n" for part in said)
        (self.directory / f"{self.plays}.out").write_text(text)
        (self.directory / f"{self.plays}.err").write_text(complaint)
        rest = "exec sleep 60" if hang else f"cat {self.plays}.err >&2\nexit {code}"
        (self.directory / f"{self.plays}.sh").write_text(f"cat {self.plays}.out\n{rest}\n")
        (self.directory / "last").write_text(str(self.plays))

    @property
    def runs(self) -> list[str]:
        path = self.directory / "arguments"
        return path.read_text().splitlines() if path.is_file() else []

    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self.directory}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }


@pytest.fixture
def kubectl(tmp_path: Path) -> Kubectl:
    return Kubectl(tmp_path / "bin")


def event(
    phase: Phase | str | None, message: str = "", kind: str = "MODIFIED", plan_only: bool = False, **status: Any
) -> dict[str, Any]:
    """What kubectl writes when the job has changed: the whole object, as the operator leaves it."""
    job = given.history(given.job({"planOnly": plan_only}), INSPECT)
    document = given.document({"planOnly": plan_only}) | {
        "status": job.status.model_copy(update=status).to_api() | {"message": message}
    }
    if phase is None:
        document["status"] = {"observedGeneration": -1}
    else:
        document["status"]["phase"] = str(phase)
    return {"type": kind, "object": document}


def training(step: int, **progress: Any) -> dict[str, Any]:
    return event(Phase.TRAINING, "training on node-1", progress=Progress(step=step, steps=1200, percent=40, **progress))


LIVE: dict[str, Any] = {
    "loss": 0.51887, "eval_loss": 0.61, "tokens_per_second": 12345, "mfu": 0.412, "remaining": "12m",
}  # fmt: skip


def run(kubectl: Kubectl, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qlora_operator.cli", "watch", *arguments],
        env=kubectl.environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip


# --- lines ---


def test_a_job_is_told_line_by_line_to_its_end(kubectl: Kubectl) -> None:
    kubectl.play(
        event(None, kind="ADDED"),
        event(Phase.INSPECTING, "looking at model and data"),
        event(Phase.INSPECTING, "looking at model and data"),
        training(0),
        training(480, **LIVE),
        event(Phase.PUBLISHING, "publishing adapter", progress=Progress(percent=67, step=1200, steps=1200, **LIVE)),
        event(Phase.SUCCEEDED, "published adapter at pvc://results/tuned/adapter", progress=Progress(percent=100)),
        hang=True,
    )
    ended = run(kubectl, "support-bot", "-n", "team-a", "--context", "prod", "--kubeconfig", "/k/config")
    assert ended.stdout.splitlines() == [
        "Pending      0 %",
        "Inspecting   0 %  looking at model and data",
        "Training     step 0/1,200  training on node-1",
        "Training     step 480/1,200  loss 0.5189  eval loss 0.6100  12,345 tokens/s  MFU 41%  remaining 12m"
        "  training on node-1",
        "Publishing   67 %  publishing adapter",
        "Succeeded    100 %  published adapter at pvc://results/tuned/adapter",
    ]
    assert ended.stderr == ""
    assert ended.returncode == 0
    assert kubectl.runs == [
        "--namespace=team-a --context=prod --kubeconfig=/k/config get qlorajobs.qlora.dev support-bot "
        "--output=json --watch --output-watch-events"
    ]


def test_a_failed_job_says_why_and_which_attempts(kubectl: Kubectl) -> None:
    attempts = (
        given.attempt(INSPECT, 1, "Succeeded"),
        given.attempt(TRAIN, 1, "OutOfMemory", node="node-1", exit_code=13, message="out of memory: 2 GiB"),
        given.attempt(given.PUBLISH_ADAPTER, 2, "BadInput", exit_code=10),
    )
    older = (
        OlderAttempts(stage="train", outcome="Interrupted", count=31),
        OlderAttempts(stage="publish", artifact="adapter", outcome="NodeLost", count=1),
    )
    told = event(
        Phase.FAILED, "output.uri: there is something already [there]", attempts=attempts, older_attempts=older
    )
    kubectl.play(told)
    ended = run(kubectl, "support-bot")
    assert ended.returncode == 1
    assert ended.stdout.splitlines()[1:] == [
        "team-a/support-bot has failed: output.uri: there is something already [there]",
        "  train, attempt 1 on node-1: OutOfMemory, exit code 13: out of memory: 2 GiB",
        "  publish adapter, attempt 2: BadInput, exit code 10",
        "  train, 31 older attempts: Interrupted",
        "  publish adapter, 1 older attempt: NodeLost",
    ]


def test_a_job_that_rests_at_its_plan_is_done_with(kubectl: Kubectl) -> None:
    kubectl.play(event(Phase.PLANNED, "rests at its plan", plan_only=True), hang=True)
    ended = run(kubectl, "support-bot")
    assert (ended.returncode, ended.stdout) == (0, "Planned      0 %  rests at its plan\n")


def test_suspended_and_released_it_is_watched_on(kubectl: Kubectl) -> None:
    kubectl.play(
        event(Phase.PLANNED, "goes on"), event(Phase.SUSPENDED, "suspended"), event(Phase.SUCCEEDED, "done"), hang=True
    )
    ended = run(kubectl, "support-bot")
    assert ended.returncode == 0
    assert [line.split()[0] for line in ended.stdout.splitlines()] == ["Planned", "Suspended", "Succeeded"]


def test_a_newer_operators_job_is_shown_too(kubectl: Kubectl) -> None:
    newer = event("Quantizing", "to FP8")
    newer["object"]["status"]["inspection"]["smell"] = "fine"
    newer["object"]["spec"]["novelty"] = {"a": 1}
    kubectl.play(newer, event(Phase.SUCCEEDED, "done"))
    assert run(kubectl, "support-bot").stdout.startswith("Quantizing   0 %  to FP8\n")


# --- what can go wrong ---


def test_no_kubectl(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "qlora_operator.cli", "watch", "support-bot"],
        env={"PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == LOST
    assert ended.stderr.startswith("kubectl is not on the PATH: install it")


@pytest.mark.parametrize(
    "complaint",
    [
        NOT_FOUND,
        'error: the server doesn\'t have a resource type "qlorajobs"',
        'error: context "prod" does not exist',
        "The connection to the server 127.0.0.1:6443 was refused - did you specify the right host or port?",
    ],
)
def test_what_cannot_be_watched_is_told_in_kubectls_words(kubectl: Kubectl, complaint: str) -> None:
    logged = 'E1123 08:20:03.786060   12609 memcache.go:381] "Couldn\'t get current server API group list"\n'
    kubectl.play(complaint=f"{logged}{logged}{complaint}\n", code=1)
    ended = run(kubectl, "support-bot")
    assert (ended.returncode, ended.stdout, ended.stderr) == (LOST, "", complaint + "\n")
    assert len(kubectl.runs) == 1


def in_process(kubectl: Kubectl) -> tuple[int, str, list[float]]:
    """Exit code, output and the pauses that were to be made."""
    output, pauses = StringIO(), []
    code = watch(
        [str(kubectl.directory / "kubectl")], "support-bot", Console(file=output, width=300), pause=pauses.append
    )
    return code, output.getvalue(), pauses


def test_a_broken_stream_is_taken_up_again(kubectl: Kubectl) -> None:
    whole = json.dumps(training(480), indent=4)
    kubectl.play(training(1), whole[: len(whole) // 2], complaint="error: unexpected EOF\n", code=1)
    kubectl.play(complaint="Unable to connect to the server: EOF\n", code=1)
    kubectl.play(training(1), training(900))  # servers end every watch after a while
    kubectl.play({"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired"}})
    kubectl.play(event(Phase.SUCCEEDED, "done"), hang=True)
    code, output, pauses = in_process(kubectl)
    assert code == SUCCEEDED
    assert output.splitlines() == [
        "Training     step 1/1,200  training on node-1",
        "the connection has ended (error: unexpected EOF); watching again",
        "the connection has ended (Unable to connect to the server: EOF); watching again",
        "Training     step 900/1,200  training on node-1",
        "the connection has ended; watching again",
        "the connection has ended; watching again",
        "Succeeded    0 %  done",
    ]
    assert pauses == [1, 2, 1, 2]


def test_it_is_not_tried_for_ever(kubectl: Kubectl, capsys: pytest.CaptureFixture[str]) -> None:
    kubectl.play(training(1))
    kubectl.play(complaint="The connection to the server was refused", code=1)
    code, _, pauses = in_process(kubectl)
    assert code == LOST
    assert len(kubectl.runs) == 2 + RECONNECTS
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]
    assert capsys.readouterr().err == (
        "the connection is gone, and 8 attempts to watch again failed: The connection to the server was refused\n"
    )


@pytest.mark.parametrize("while_watched", [True, False])
def test_a_deleted_job_is_no_failed_one(
    kubectl: Kubectl, capsys: pytest.CaptureFixture[str], while_watched: bool
) -> None:
    if while_watched:
        kubectl.play(training(1), event(Phase.TRAINING, kind="DELETED"), hang=True)
    else:
        kubectl.play(training(1))
        kubectl.play(complaint=NOT_FOUND, code=1)
    assert in_process(kubectl)[0] == LOST
    assert capsys.readouterr().err == "team-a/support-bot was deleted\n"


def test_what_is_not_json_is_told(kubectl: Kubectl, capsys: pytest.CaptureFixture[str]) -> None:
    kubectl.play("NAME          PHASE\n", hang=True)
    assert in_process(kubectl)[0] == LOST
    assert capsys.readouterr().err == "kubectl has written something that is not JSON: NAME          PHASE\n"


def test_a_job_that_cannot_be_read_names_the_field() -> None:
    odd = event(Phase.TRAINING)["object"]
    odd["status"]["progress"] = {"step": "many"}
    with pytest.raises(Lost, match=r"cannot read the job \(status\.progress\.step: must be a valid integer"):
        read(odd)


def test_ctrl_c_ends_it_and_kubectl_too(kubectl: Kubectl) -> None:
    kubectl.play(training(1), hang=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_operator.cli", "watch", "support-bot"],
        env=kubectl.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ours may be ignored
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline().startswith("Training")
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGINT)
    _, complaints = process.communicate(timeout=20)
    assert process.returncode == 130
    assert complaints == ""
    assert not Path(f"/proc/{child}").exists()


# --- the terminal ---


def on_a_terminal(kubectl: Kubectl) -> tuple[int, str]:
    """Exit code, and all that was written to a terminal."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_operator.cli", "watch", "support-bot"],
        env=kubectl.environment() | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"},
        stdin=slave, stdout=slave, stderr=slave, close_fds=True,
    )  # fmt: skip
    os.close(slave)
    written = b""
    while True:
        try:
            written += os.read(master, 1 << 16)
        except OSError:  # the other end is closed
            break
    os.close(master)
    return process.wait(timeout=20), written.decode()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_on_a_terminal_there_is_a_picture(kubectl: Kubectl) -> None:
    kubectl.play(
        training(480, **LIVE), training(900, **LIVE), event(Phase.SUCCEEDED, "done", progress=Progress(percent=100))
    )
    code, written = on_a_terminal(kubectl)
    assert code == 0
    assert "\x1b[" in written
    shown = plain(written)
    assert re.search(r"team-a/support-bot  Training\s+━{16}╺━+  step 480/1,200", shown)
    assert "loss 0.5189   eval loss 0.6100   12,345 tokens/s   MFU 41%   remaining 12m" in shown
    assert re.search(r"━{30}╺━+  step 900/1,200", shown)
    assert re.search(r"team-a/support-bot  Succeeded\s+━{40}  100 %\s+done", shown)


def test_on_a_terminal_a_failure_is_told_below(kubectl: Kubectl) -> None:
    attempts = (given.attempt(TRAIN, 1, "Diverged", exit_code=12, message="lower the rate"),)
    kubectl.play(event(Phase.FAILED, "diverged", attempts=attempts))
    code, written = on_a_terminal(kubectl)
    assert code == 1
    assert plain(written).rstrip().endswith("  train, attempt 1: Diverged, exit code 12: lower the rate")


# --- parts ---


@for_all(
    st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.booleans())), max_size=4),
    st.lists(st.integers(min_value=1, max_value=40), min_size=1),
    st.sampled_from([None, 4]),
)
def test_a_stream_may_be_cut_anywhere(said: list[dict[str, Any]], cuts: list[int], indent: int | None) -> None:
    text = "".join(json.dumps(each, indent=indent, ensure_ascii=False) + "\n" for each in said)

    def chunks() -> Iterator[str]:
        start, number = 0, 0
        while start < len(text):
            yield text[start : (start := start + cuts[number % len(cuts)])]
            number += 1

    assert list(documents(chunks())) == said


def test_a_document_is_shown_as_soon_as_it_is_whole() -> None:
    stream = documents(iter(['{"a": 1}\n{"b"', ": 2}"]))
    assert next(stream) == {"a": 1}
    assert next(stream) == {"b": 2}


def test_the_command_line_loads_the_base_install_only() -> None:
    """A laptop has neither the operator's nor the trainer's libraries."""
    program = "import sys, qlora_operator.cli; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    lock = (Path(__file__).parents[3] / "requirements" / "base.lock").read_text()
    base = {name.replace("-", "_") for name in re.findall(r"^([a-z0-9-]+)==", lock, re.MULTILINE)}
    ours = {"qlora_api", "qlora_operator"}
    foreign = {n for n in loaded.stdout.split() if not n.startswith("_")} - set(sys.stdlib_module_names)
    assert foreign - ours <= base


@pytest.mark.parametrize("command", ["plan", "explain", "watch", "estimate"])
def test_a_command_loads_no_library_that_another_one_needs(command: str) -> None:
    """kubectl asks for nothing else while somebody waits: what is imported is most of the time that a command takes."""
    program = (
        "import sys, contextlib, qlora_operator.cli as cli\n"
        "with contextlib.suppress(SystemExit): cli.main(sys.argv[1:])\n"
        "print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    )

    def loaded(*arguments: str) -> set[str]:
        environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
        ended = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment
        )
        return set(ended.stderr.splitlines()[-1].split())

    assert not loaded("--help") & {"pydantic", "rich", "yaml", "matplotlib"}
    assert not loaded(command, "--help") & {"yaml", "matplotlib", "kopf", "kubernetes", "torch"}


def test_help_says_what_the_exit_codes_mean(kubectl: Kubectl) -> None:
    text = run(kubectl, "--help").stdout
    assert all(f"  {code:<4} " in text for code in (0, 1, 2, 130))
