"""Progress for the operator: the newest figures, posted in Kubeflow Trainer's format while the training runs.

Reports are a courtesy. They are sent from a thread of their own, and no way for them to fail is a way for the training
to fail, or to wait.
"""

from __future__ import annotations

import http.client
import math
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from qlora_api.exchange import (
    PROGRESS_CA_ENV,
    PROGRESS_TOKEN_ENV,
    PROGRESS_URL_ENV,
    ProgressDocument,
    ProgressMetric,
    ProgressName,
    TrainerStatus,
)
from qlora_trainer.environment import log
from qlora_trainer.standing import Standing

TIMEOUT_SECONDS = 10.0
_OK, _TOO_MANY, _SERVER_ERROR = range(200, 300), 429, range(500, 600)


@dataclass(frozen=True)
class Pace:
    """Seconds until the next post: after one that arrived, one that failed (doubled up to the longest), one refused."""

    interval: float = 5.0
    first_retry: float = 1.0
    longest_retry: float = 30.0
    refused: float = 60.0
    at_the_end: float = 3.0  # so long the end of the process waits for the last one

    def after_failures(self, count: int) -> float:
        return min(self.longest_retry, self.first_retry * 2.0 ** min(count - 1, 16))


class Unreachable(Exception):
    """Nobody took the report; later someone may (a network's fault, an operator that is being replaced)."""


class Refused(Exception):
    """The report reached a server that does not want it from this pod."""


@dataclass(frozen=True)
class Server:
    """Where reports go. CA and token are read anew for each: the kubelet replaces both while the pod runs."""

    url: str
    ca_file: Path
    token_file: Path

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Server | None:
        """The server that Kubeflow's variables name; None where they are not set, or not for https."""
        url, ca_file, token_file = (environment.get(n) for n in (PROGRESS_URL_ENV, PROGRESS_CA_ENV, PROGRESS_TOKEN_ENV))
        if not (url and ca_file and token_file):
            return None
        if urlsplit(url).scheme != "https" or not urlsplit(url).hostname:
            log.info("no progress reports: %s is %r, not an https address", PROGRESS_URL_ENV, url)
            return None
        return cls(url, Path(ca_file), Path(token_file))

    def post(self, body: bytes, *, timeout: float = TIMEOUT_SECONDS) -> None:
        """Post one document. Raises Unreachable or Refused.

        Neither proxies nor redirects are followed, and no authority but the one named is believed: the token is for
        this server alone.
        """
        address = urlsplit(self.url)
        try:
            token = self.token_file.read_text(encoding="ascii").strip()
            context = ssl.create_default_context(cafile=str(self.ca_file))
            connection = http.client.HTTPSConnection(
                address.hostname or "", address.port, timeout=timeout, context=context
            )
            try:
                connection.request(
                    "POST",
                    (address.path or "/") + (f"?{address.query}" if address.query else ""),
                    body,
                    {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
                )
                response = connection.getresponse()
                said = response.read(500).decode(errors="replace").strip()
            finally:
                connection.close()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unreachable(f"{type(error).__name__}: {error}") from error
        if response.status in _OK:
            return
        answer = " ".join(f"{response.status} {response.reason} {said}".split())
        raise (Unreachable if response.status == _TOO_MANY or response.status in _SERVER_ERROR else Refused)(answer)


class Reporter:
    """Posts the newest figures in the background; figures that newer ones overtake are never sent."""

    def __init__(self, server: Server, pace: Pace | None = None) -> None:
        self._server, self._pace = server, pace or Pace()
        self._newest: Standing | None = None
        self._news, self._closing = threading.Event(), threading.Event()
        self._give_up_at = math.inf
        self._failures, self._trouble = 0, ""
        self._thread = threading.Thread(target=self._run, name="progress-reports", daemon=True)
        self._thread.start()

    def see(self, standing: Standing) -> None:
        """Report these figures when the next report is due."""
        self._newest = standing
        self._news.set()

    def close(self) -> None:
        """Send what has not been sent, at once; waits for it no longer than `Pace.at_the_end`."""
        self._give_up_at = time.monotonic() + self._pace.at_the_end
        self._closing.set()
        self._news.set()
        self._thread.join(self._pace.at_the_end)

    def _run(self) -> None:
        sent: Standing | None = None
        while True:
            self._news.wait()
            self._news.clear()
            closing, newest = self._closing.is_set(), self._newest
            delay = 0.0
            if newest is not None and newest is not sent:
                delay = self._send(newest)
                if not self._trouble:
                    sent = newest
            if closing and (newest is sent or self._trouble == "refused" or time.monotonic() > self._give_up_at):
                return
            if self._trouble:
                self._news.set()  # the newest has still to be sent
            if closing:
                time.sleep(min(delay, self._pace.first_retry))
            else:
                self._closing.wait(delay)

    def _send(self, standing: Standing) -> float:
        """Post and say in the log what has changed by it; seconds until the next post."""
        try:
            self._server.post(document(standing).to_json().encode())
        except Refused as error:
            self._failures = 0
            self._say("refused", f"progress reports are refused ({error}); tried again each minute")
            return self._pace.refused
        except Unreachable as error:
            self._failures += 1
            self._say("unreachable", f"progress reports do not arrive ({error}); tried again")
            return self._pace.after_failures(self._failures)
        self._failures = 0
        self._say("", "progress reports arrive again")
        return self._pace.interval

    def _say(self, trouble: str, text: str) -> None:
        if trouble != self._trouble:
            self._trouble = trouble
            log.info("%s", text)


def document(standing: Standing) -> ProgressDocument:
    """The figures in Kubeflow Trainer's format (proposal 2779): numbers as decimal text, none that is not finite."""
    figures = {
        ProgressName.STEP: standing.step,
        ProgressName.STEPS: standing.steps,
        ProgressName.EPOCH: standing.epoch,
        ProgressName.LOSS: standing.loss,
        ProgressName.EVAL_LOSS: standing.eval_loss,
        ProgressName.TOKENS_PER_SECOND: standing.tokens_per_second,
        ProgressName.MFU: standing.mfu,
        ProgressName.MEMORY_BYTES: standing.gpu_memory_bytes.get("reserved_peak"),
    }
    left = standing.remaining_seconds
    return ProgressDocument(
        trainer_status=TrainerStatus(
            progress_percentage=standing.percent,
            estimated_remaining_seconds=None if left is None else round(left),
            metrics=[
                ProgressMetric(name=name, value=_decimal(value))
                for name, value in figures.items()
                if value is not None and math.isfinite(value)
            ],
            last_updated_time=standing.at.strftime("%Y-%m-%dT%H:%M:%SZ"),
        )
    )


def _decimal(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6f}".rstrip("0").rstrip(".")
