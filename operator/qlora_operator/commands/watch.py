"""Follows one job by `kubectl get --watch`, and shows it: a picture that moves on a terminal, lines anywhere else."""

from __future__ import annotations

import argparse
import codecs
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qlora_api.v1alpha1 import GROUP, PLURAL, Attempt, Metadata, OlderAttempts, Phase, Progress, problems
from qlora_api.v1alpha1.fields import Document
from qlora_operator.commands.kubectl import NOT_THERE, declare_options, kubectl

SUCCEEDED, FAILED, LOST, STOPPED = 0, 1, 2, 130
#: So often in a row kubectl may end without a word of the job; the pauses between are doubled: two minutes in all.
RECONNECTS = 7
LONGEST_PAUSE_SECONDS = 30.0
BAR_WIDTH = 40
HELP = """\
Follow a job until it has ended: its phase, how far the training is, loss, speed and the time left.
On a terminal this is a picture that moves; anywhere else it is a line for each change.

exit codes:
  0    the job has succeeded, or rests at its plan (planOnly)
  1    the job has failed; its message and the attempts that failed are printed
  2    it could not be watched to its end: no such job, deleted, cluster out of reach
  130  stopped by Ctrl-C; the job goes on
"""


def declare(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = HELP
    parser.add_argument("name", metavar="NAME", help="name of the QLoRAJob")
    declare_options(parser)


def run(chosen: argparse.Namespace) -> int:
    """Watch the job that was named."""
    command = kubectl(chosen)
    if command is None:
        sys.stderr.write(f"{NOT_THERE}\n")
        return LOST
    return watch(command, chosen.name, Console(highlight=False))


class Spec(Document):
    """Of the job's spec, what is looked at here."""

    plan_only: bool = False


class Status(Document):
    """Of the job's status, what is shown. The phase is any text: a newer operator may know more of them."""

    observed_generation: int = -1
    phase: str = Phase.PENDING
    message: str = ""
    progress: Progress = Progress()
    attempts: tuple[Attempt, ...] = ()
    older_attempts: tuple[OlderAttempts, ...] = ()


class Job(Document):
    """A QLoRAJob as far as it is shown; what else it has is left alone, whatever version wrote it."""

    metadata: Metadata
    spec: Spec = Spec()
    status: Status = Field(default=Status())

    @property
    def full_name(self) -> str:
        return f"{self.metadata.namespace}/{self.metadata.name}"

    @property
    def exit_code(self) -> int | None:
        """How watching ends; None as long as it goes on."""
        match self.status.phase:
            case Phase.SUCCEEDED:
                return SUCCEEDED
            case Phase.FAILED:
                return FAILED
            case Phase.PLANNED if self.spec.plan_only:
                return SUCCEEDED
        return None


class Lost(Exception):
    """The job cannot be watched any further; the text says why."""


# --- what kubectl says ---


@dataclass(frozen=True)
class Ended:
    """kubectl has ended, for what reason it has written."""

    reason: str


def documents(chunks: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects in a stream of text, each as soon as it is whole. Raises Lost when there is something else."""
    decoder, text = json.JSONDecoder(), ""
    for chunk in chunks:
        text = (text + chunk).lstrip()
        while text:
            if not text.startswith("{"):
                raise Lost(f"kubectl has written something that is not JSON: {text.splitlines()[0][:200]}")
            try:
                document, end = decoder.raw_decode(text)
            except json.JSONDecodeError:
                break  # the rest of it is still to come
            yield document
            text = text[end:].lstrip()


def events(command: list[str]) -> Iterator[tuple[str, dict[str, Any]] | Ended]:
    """What `kubectl get --watch --output-watch-events` tells, as (type, object); at last that it has ended, and why."""
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints)
        try:
            for event in documents(_text(process.stdout.fileno() if process.stdout else -1)):
                yield event.get("type", ""), event.get("object", {})
            process.wait()
        finally:
            process.kill()
            process.wait()
        complaints.seek(0)
        said = complaints.read().decode(errors="replace").strip().splitlines()
        yield Ended(said[-1] if said else "")  # before it comes what client-go has logged of each of its tries


def _text(descriptor: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while chunk := os.read(descriptor, 1 << 16):
        yield decoder.decode(chunk)


def jobs(kubectl: list[str], name: str, say: Callable[[str], None], pause: Callable[[float], None]) -> Iterator[Job]:
    """The job, each time that it has changed; watched anew when the stream breaks. Raises Lost when it cannot be."""
    resource = f"{PLURAL}.{GROUP}"
    command = [*kubectl, "get", resource, name, "--output=json", "--watch", "--output-watch-events"]
    full_name, failures = name, 0
    seen = False
    while True:
        heard = False
        for event in events(command):
            match event:
                case Ended(reason):
                    if not seen:
                        raise Lost(reason or f"kubectl has ended and said nothing about {name}")
                    if "(NotFound)" in reason:
                        raise Lost(f"{full_name} was deleted")
                    failures = 0 if heard else failures + 1
                    if failures > RECONNECTS:
                        raise Lost(f"the connection is gone, and {failures} attempts to watch again failed: {reason}")
                    say(f"the connection has ended{f' ({reason})' if reason else ''}; watching again")
                    pause(min(LONGEST_PAUSE_SECONDS, 2.0**failures))
                case ("DELETED", _):
                    raise Lost(f"{full_name} was deleted")
                case ("ADDED" | "MODIFIED", document):
                    job = read(document)
                    full_name, seen, heard = job.full_name, True, True
                    yield job
                case _:
                    pass  # an error of the stream: kubectl ends by itself after it


def read(document: dict[str, Any]) -> Job:
    """The job in an API object. Raises Lost when this version cannot read it."""
    try:
        return Job.model_validate(document, by_alias=True, by_name=False)
    except ValidationError as error:
        raise Lost(unreadable(error)) from error


def unreadable(error: ValidationError) -> str:
    """What to do about a job that another version has written."""
    why = "; ".join(problems(error))
    return f"this version of kubectl-qlora cannot read the job ({why}): install the version of the operator"


# --- how it is shown ---


def figures(job: Job) -> list[str]:
    """What is known of a training under way, each with its unit."""
    progress = job.status.progress
    if job.status.phase != Phase.TRAINING:
        return []
    known = [
        None if progress.loss is None else f"loss {progress.loss:.4f}",
        None if progress.eval_loss is None else f"eval loss {progress.eval_loss:.4f}",
        None if progress.tokens_per_second is None else f"{progress.tokens_per_second:,} tokens/s",
        None if progress.mfu is None else f"MFU {progress.mfu:.0%}",
        None if progress.remaining is None else f"remaining {progress.remaining}",
    ]
    return [figure for figure in known if figure]


def done(job: Job) -> tuple[int, int, str]:
    """How much of how much is done, and that in words: of the steps while it trains, else of all its tasks."""
    progress = job.status.progress
    if job.status.phase == Phase.TRAINING and progress.step is not None and progress.steps:
        return progress.step, progress.steps, f"step {progress.step:,}/{progress.steps:,}"
    return progress.percent, 100, f"{progress.percent} %"


def line(job: Job) -> str:
    """The job in one line."""
    return "  ".join([f"{job.status.phase:<11}", done(job)[2], *figures(job), job.status.message]).rstrip()


def picture(job: Job) -> RenderableType:
    """The job on a terminal."""
    head = Text.assemble((job.full_name, "bold"), "  ", (job.status.phase, COLOURS.get(job.status.phase, "cyan")))
    part, whole, words = done(job)
    bar = Table.grid(padding=(0, 2))
    bar.add_row(ProgressBar(total=whole, completed=part, width=BAR_WIDTH), Text(words))
    parts: list[RenderableType] = [head, bar]
    if shown := figures(job):
        parts.append(Text("   ".join(shown)))
    if job.status.message:
        parts.append(Text(job.status.message, "dim"))
    return Group(*parts)


COLOURS: dict[str, str] = {Phase.SUCCEEDED: "bold green", Phase.FAILED: "bold red", Phase.SUSPENDED: "yellow"}


def failure(job: Job) -> list[str]:
    """Why a job has failed: its message, and each attempt that did not succeed."""
    failed = [attempt for attempt in job.status.attempts if attempt.outcome not in (None, "Succeeded")]
    said = [*(ending(attempt) for attempt in failed), *(older(ends) for ends in job.status.older_attempts)]
    return [f"{job.full_name} has failed: {job.status.message}", *(f"  {line}" for line in said)]


def older(ends: OlderAttempts) -> str:
    """How attempts have ended that are listed no longer, in one line."""
    return f"{_what(ends)}, {ends.count} older attempt{'s' * (ends.count > 1)}: {ends.outcome}"


def _what(ran: Attempt | OlderAttempts) -> str:
    return f"{ran.stage} {ran.artifact}" if ran.artifact else ran.stage


def ending(attempt: Attempt) -> str:
    """How an attempt has ended, in one line."""
    what = _what(attempt)
    where = f" on {attempt.node}" if attempt.node else ""
    code = "" if attempt.exit_code is None else f", exit code {attempt.exit_code}"
    said = f": {attempt.message}" if attempt.message else ""
    return f"{what}, attempt {attempt.number}{where}: {attempt.outcome or 'has not ended'}{code}{said}"


def watch(kubectl: list[str], name: str, console: Console, *, pause: Callable[[float], None] = time.sleep) -> int:
    """Show the job until it has ended; the exit code for how it did."""

    def say(text: str) -> None:
        console.print(Text(text), soft_wrap=True)

    said = ""
    with ExitStack() as stack:
        live = stack.enter_context(Live(console=console, auto_refresh=False)) if console.is_terminal else None
        try:
            for job in jobs(kubectl, name, say, pause):
                if live:
                    live.update(picture(job), refresh=True)
                elif line(job) != said:
                    said = line(job)
                    say(said)
                if job.exit_code is not None:
                    stack.close()
                    for text in failure(job) if job.exit_code == FAILED else []:
                        say(text)
                    return job.exit_code
        except Lost as error:
            stack.close()
            sys.stderr.write(f"{error}\n")
        except KeyboardInterrupt:
            return STOPPED
    return LOST
