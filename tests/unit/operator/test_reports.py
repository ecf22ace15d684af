"""The progress endpoint over real HTTPS, with a stand-in for the API server behind it: who is believed, and who not."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest

from qlora_api.exchange import PROGRESS_MAX_BYTES, ProgressName
from qlora_operator.certificates import new_authority, new_server
from qlora_operator.cluster import ApiError
from qlora_operator.endpoint import Certificates
from qlora_operator.reports import Reports
from qlora_operator.workqueue import Key

NOW = datetime.now(UTC)
AUTHORITY = new_authority("test", NOW)
TLS = Certificates(AUTHORITY, new_server(AUTHORITY, ["localhost"], NOW))
GOOD = {
    "trainerStatus": {
        "progressPercentage": 50,
        "estimatedRemainingSeconds": 60,
        "metrics": [{"name": "loss", "value": "0.5"}],
        "lastUpdatedTime": "2026-09-01T12:00:00Z",
    }
}


def owned(by: str, name: str, uid: str) -> list[dict[str, Any]]:
    return [{"kind": by, "name": name, "uid": uid, "controller": True}]


class ApiServer:
    """The calls that the endpoint makes. Tokens are `namespace/pod`; one train pod of job `a`, and others."""

    def __init__(self) -> None:
        self.reviews = 0
        self.away = False
        self.pods = {
            ("team", "a-train-1-x"): ("a", "train", owned("Job", "a-train-1", "u1")),
            ("team", "b-train-1-x"): ("b", "train", owned("Job", "b-train-1", "u2")),
            ("team", "a-merge-1-x"): ("a", "merge", owned("Job", "a-merge-1", "u3")),
            ("team", "forged"): ("a", "train", []),
            ("team", "adopted"): ("a", "train", owned("Job", "b-train-1", "u2")),
            ("other", "a-train-1-x"): ("a", "train", owned("Job", "a-train-1", "u1")),
        }

    async def review_token(self, token: str, audience: str) -> dict[str, Any]:
        self.reviews += 1
        if self.away:
            raise ApiError("review a token", 0, "connection refused")
        if "/" not in token:
            return {"authenticated": False}
        namespace, pod = token.split("/")
        extra = {
            "authentication.kubernetes.io/pod-name": [pod],
            "authentication.kubernetes.io/pod-uid": [f"uid of {pod}"],
        }
        user = {"username": f"system:serviceaccount:{namespace}:default", "extra": {} if pod == "-" else extra}
        return {"authenticated": True, "audiences": ["another" if namespace == "elsewhere" else audience], "user": user}

    async def pod(self, namespace: str, name: str) -> dict[str, Any] | None:
        if (namespace, name) not in self.pods:
            return None
        job, stage, owners = self.pods[namespace, name]
        labels = {"qlora.dev/job": job, "qlora.dev/stage": stage}
        return {"metadata": {"uid": f"uid of {name}", "labels": labels, "ownerReferences": owners}}

    async def stage_job(self, namespace: str, name: str) -> dict[str, Any] | None:
        uid = {"a-train-1": "u1", "b-train-1": "u2", "a-merge-1": "u3"}[name]
        return {"metadata": {"uid": uid, "ownerReferences": owned("QLoRAJob", name[0], f"job {name[0]}")}}


class Client:
    """Posts as a trainer does, and what came of it."""

    def __init__(self, api: ApiServer, reports: Reports, heard: list[Key], session: aiohttp.ClientSession, url: str):
        self.api, self.reports, self.heard, self.session, self.url = api, reports, heard, session, url

    async def post(self, token: str | None, body: Any = GOOD, *, job: str = "team/qlorajobs/a") -> tuple[int, str]:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        data = body if isinstance(body, str) else json.dumps(body)
        async with self.session.post(
            f"{self.url}/v1alpha1/namespaces/{job}/progress", data=data, headers=headers
        ) as got:
            return got.status, await got.text()


@asynccontextmanager
async def endpoint() -> AsyncIterator[Client]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    api, heard = ApiServer(), list[Key]()
    reports = Reports(api, heard.append)  # type: ignore[arg-type]  # the calls that it makes, and no others
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    TLS.load_into(context)
    server = asyncio.create_task(reports.serve(port, context))
    trust = ssl.create_default_context(cadata=AUTHORITY.certificate)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust)) as session:
        for _ in range(100):
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            await asyncio.sleep(0.02)
        yield Client(api, reports, heard, session, f"https://localhost:{port}")
    server.cancel()
    await asyncio.gather(server, return_exceptions=True)


def test_the_report_of_the_jobs_own_pod_is_kept_and_queues_the_job() -> None:
    async def scene() -> None:
        async with endpoint() as client:
            assert await client.post("team/a-train-1-x") == (204, "")
            newest = client.reports.newest("job a")
            assert newest is not None
            assert (newest.attempt, newest.percent, newest.numbers) == ("a-train-1", 50, {ProgressName.LOSS: 0.5})
            assert client.heard == [("team", "a")]
            for _ in range(5):
                await client.post("team/a-train-1-x")
            assert client.api.reviews == 1, "a token that was checked is trusted for a while"
            client.reports.keep_only(set())
            assert client.reports.newest("job a") is None

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("token", "status", "reason"),
    [
        (None, 401, "no bearer token"),
        ("nonsense", 401, "not a token of this cluster"),
        ("elsewhere/a-train-1-x", 401, "audience"),
        ("team/-", 403, "not of a pod"),
        ("other/a-train-1-x", 403, "not of a pod in the namespace team"),
        ("team/gone", 403, "is gone"),
        ("team/b-train-1-x", 403, "does not train a"),
        ("team/a-merge-1-x", 403, "does not train a"),
        ("team/forged", 403, "does not train a"),
        ("team/adopted", 403, "is not a's"),
    ],
)
def test_who_is_not_the_jobs_train_pod_is_refused(token: str | None, status: int, reason: str) -> None:
    async def scene() -> None:
        async with endpoint() as client:
            got, text = await client.post(token)
            assert (got, reason in text) == (status, True), text
            assert (client.heard, client.reports.newest("job a"), client.reports.newest("job b")) == ([], None, None)

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("not JSON", "Invalid JSON"),
        ({"trainerStatus": {"progressPercentage": 101, "lastUpdatedTime": "x"}}, "trainerStatus.progressPercentage"),
        ({"trainerStatus": {}}, "trainerStatus.lastUpdatedTime"),
        (json.dumps(GOOD).replace('"0.5"', '"NaN"'), "metric loss"),
    ],
)
def test_a_report_that_is_none_is_refused_and_the_field_named(body: Any, reason: str) -> None:
    async def scene() -> None:
        async with endpoint() as client:
            status, text = await client.post("team/a-train-1-x", body)
            assert (status, reason in text) == (400, True), text
            assert client.heard == []

    asyncio.run(scene())


def test_a_report_that_is_too_long_is_not_read() -> None:
    async def scene() -> None:
        async with endpoint() as client:
            status, _ = await client.post("team/a-train-1-x", "x" * (PROGRESS_MAX_BYTES + 1))
            assert status == 413

    asyncio.run(scene())


def test_while_the_api_server_is_away_the_trainer_is_told_to_come_back() -> None:
    async def scene() -> None:
        async with endpoint() as client:
            client.api.away = True
            assert (await client.post("team/a-train-1-x"))[0] == 503
            client.api.away = False
            assert (await client.post("team/a-train-1-x"))[0] == 204

    asyncio.run(scene())
