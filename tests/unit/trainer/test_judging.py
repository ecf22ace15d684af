"""Against a real HTTP server that speaks as much of OpenAI's API as the judge asks for."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qlora_api.exchange import JudgeOrder
from qlora_trainer.environment import Pod
from qlora_trainer.interruption import Interruption
from qlora_trainer.judging import TRIES, Judge, JudgeUnusable, Question, mark, open_judge

Reply = tuple[int, str | None]


class Endpoint:
    """Answers each request as `reply` says: a status, and what the model says (None: no chat completion)."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.reply: Callable[[str], Reply] = lambda prompt: (200, "Grade: 3")
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append((self.path, dict(self.headers), body))
                status, said = endpoint.reply(body["messages"][0]["content"])
                answer = {"choices": [{"message": {"role": "assistant", "content": said}}]} if said else {"error": "x"}
                data = json.dumps(answer).encode()
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "http://127.0.0.1:9/elsewhere")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the base class names it
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


def judge_at(url: str) -> Judge:
    return Judge(JudgeOrder(endpoint=url, model="big"), seed=7, token="s3cret", waits=(0.01, 0.02))


ASKED = [Question(f"What is a {thing}?", "a bird", f"a {thing} it is") for thing in ("robin", "trout", "heron")]


def test_each_answer_gets_its_mark(endpoint: Endpoint) -> None:
    endpoint.reply = lambda prompt: (200, "Grade: 5" if "a robin it is" in prompt else "It is wrong.\nGrade: 1")
    told: list[int] = []
    assert judge_at(endpoint.url).marks(ASKED, lambda: told.append(1)) == [5, 1, 1]
    assert len(told) == len(ASKED) == len(endpoint.requests)
    for path, headers, body in endpoint.requests:
        assert path == "/v1/chat/completions"
        assert headers["Authorization"] == "Bearer s3cret"
        assert (body["model"], body["temperature"], body["seed"]) == ("big", 0, 7)
    (prompt,) = (b["messages"][0]["content"] for _, _, b in endpoint.requests if "trout" in str(b))
    assert all(text in prompt for text in ("What is a trout?", "a bird", "a trout it is"))


def test_a_busy_judge_is_asked_again(endpoint: Endpoint) -> None:
    replies = iter([(429, None), (503, None), (200, "Grade: 4")])
    endpoint.reply = lambda prompt: next(replies)
    assert judge_at(endpoint.url).marks(ASKED[:1], lambda: None) == [4]


@pytest.mark.parametrize(
    ("reply", "says", "asked"),
    [
        ((401, None), "401 Unauthorized", 1),
        ((302, None), "302 Found", 1),
        ((200, None), "this is no chat completion", 1),
        ((500, None), f"asked {TRIES} times: .*500 Internal Server Error", TRIES),
    ],
)
def test_a_judge_that_cannot_be_used_says_why(endpoint: Endpoint, reply: Reply, says: str, asked: int) -> None:
    endpoint.reply = lambda prompt: reply
    with pytest.raises(JudgeUnusable, match=says):
        judge_at(endpoint.url).marks(ASKED[:1], lambda: None)
    assert len(endpoint.requests) == asked


def test_a_judge_that_is_not_there(endpoint: Endpoint) -> None:
    with pytest.raises(JudgeUnusable, match="Connection refused"):
        judge_at("http://127.0.0.1:9/v1").marks(ASKED, lambda: None)


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("Grade: 4", 4),
        ("**Grade:** 2", 2),
        ("5", 5),
        ("The grade would be 3.\nOn reflection:\nGrade: 1", 1),
        ("4/5 of the answer is right", None),
        ("Grade: 7", None),
        ("", None),
    ],
)
def test_the_mark_in_a_reply(reply: str, grade: float | None) -> None:
    assert mark(reply) == grade


def test_the_secret_holds_the_token(tmp_path: Path) -> None:
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "token").write_text("s3cret\n")
    pod = Pod(Interruption(), credentials=str(tmp_path))
    order = JudgeOrder(endpoint="https://judge/v1", model="big", secret="judge")
    assert open_judge(order, 1, pod).token == "s3cret"
    assert open_judge(order.model_copy(update={"secret": "missing"}), 1, pod).token is None
