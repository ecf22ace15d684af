"""The HTTPS endpoint that trainers report their progress to: Kubeflow Trainer's protocol, with a stricter check of who
speaks. A report is believed only from a pod of the very job that it is about.

What was reported last is kept in memory alone: a trainer says it again within seconds to whoever leads next.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import ssl
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from aiohttp import web
from pydantic import ValidationError

from qlora_api.exchange import PROGRESS_AUDIENCE, PROGRESS_MAX_BYTES, ProgressDocument, Stage
from qlora_api.v1alpha1 import KIND
from qlora_operator.cluster import ApiError, Cluster
from qlora_operator.lifecycle.observed import Reported
from qlora_operator.manifests.names import JOB_LABEL, STAGE_LABEL
from qlora_operator.workqueue import Key

log = logging.getLogger(__name__)

PATH = "/v1alpha1/namespaces/{namespace}/qlorajobs/{name}/progress"
#: How long a token that was checked is taken without asking again; a pod that is gone may report for so long.
TRUST_SECONDS = 60
POD_NAME, POD_UID = "authentication.kubernetes.io/pod-name", "authentication.kubernetes.io/pod-uid"


class Refused(Exception):
    """A report that is not taken, with the HTTP status that says why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Speaker:
    """Who a token speaks for: the attempt's Job, and the QLoRAJob's uid."""

    attempt: str
    job_uid: str
    checked: float


class Reports:
    """The newest report of each job, and the server that takes them."""

    def __init__(self, cluster: Cluster, heard: Callable[[Key], None]) -> None:
        self._cluster = cluster
        self._heard = heard
        self._newest: dict[str, Reported] = {}
        self._speakers: dict[tuple[str, Key], Speaker] = {}

    def newest(self, job_uid: str) -> Reported | None:
        """What the job's trainer said last, to this replica."""
        return self._newest.get(job_uid)

    def keep_only(self, job_uids: Set[str]) -> None:
        """Forget jobs that are over or gone, and tokens that nobody has used for a while."""
        self._newest = {uid: report for uid, report in self._newest.items() if uid in job_uids}
        oldest = time.monotonic() - TRUST_SECONDS
        self._speakers = {key: speaker for key, speaker in self._speakers.items() if speaker.checked > oldest}

    async def serve(self, port: int, context: ssl.SSLContext) -> None:
        """Serve until cancelled."""
        app = web.Application(client_max_size=PROGRESS_MAX_BYTES)
        app.add_routes([web.post(PATH, self._post)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, port=port, ssl_context=context).start()
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()

    async def _post(self, request: web.Request) -> web.Response:
        key = (request.match_info["namespace"], request.match_info["name"])
        try:
            speaker = await self._speaker(request.headers.get("Authorization", ""), key)
            self._newest[speaker.job_uid] = _parse(await request.text(), speaker.attempt)
        except Refused as refused:
            if refused.status in (401, 403):
                log.warning("%s/%s: a report from %s is refused: %s", *key, request.remote, refused)
            return web.Response(status=refused.status, text=f"{refused}\n")
        except ApiError as error:
            return web.Response(status=503, text=f"{error}\n", headers={"Retry-After": "5"})
        self._heard(key)
        return web.Response(status=204)

    async def _speaker(self, authorization: str, key: Key) -> Speaker:
        """The train pod of job `key` that the token was given to. Raises `Refused`, and `ApiError`."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Refused(401, "no bearer token")
        known = (hashlib.sha256(token.encode()).hexdigest(), key)
        speaker = self._speakers.get(known)
        if speaker is None or speaker.checked < time.monotonic() - TRUST_SECONDS:
            speaker = self._speakers[known] = await self._check(token, key)
        return speaker

    async def _check(self, token: str, key: Key) -> Speaker:
        namespace, name = key
        review = await self._cluster.review_token(token, PROGRESS_AUDIENCE)
        if not review.get("authenticated") or PROGRESS_AUDIENCE not in review.get("audiences", ()):
            raise Refused(401, f"not a token of this cluster for the audience {PROGRESS_AUDIENCE}")
        user = review.get("user", {})
        extra = user.get("extra") or {}
        pod_name, pod_uid = (next(iter(extra.get(entry, ())), "") for entry in (POD_NAME, POD_UID))
        if not pod_name or not str(user.get("username", "")).startswith(f"system:serviceaccount:{namespace}:"):
            raise Refused(403, f"the token is not of a pod in the namespace {namespace}")
        pod = await self._cluster.pod(namespace, pod_name)
        if pod is None or pod["metadata"]["uid"] != pod_uid:
            raise Refused(403, f"the pod {pod_name} is gone")
        labels = pod["metadata"].get("labels", {})
        attempt = _owner(pod, "Job")
        if (labels.get(JOB_LABEL), labels.get(STAGE_LABEL)) != (name, Stage.TRAIN) or attempt is None:
            raise Refused(403, f"the pod {pod_name} does not train {name}")
        stage_job = await self._cluster.stage_job(namespace, attempt["name"])
        job = _owner(stage_job, KIND) if stage_job and stage_job["metadata"]["uid"] == attempt["uid"] else None
        if job is None or job["name"] != name:
            raise Refused(403, f"the Job of the pod {pod_name} is not {name}'s")
        return Speaker(attempt["name"], job["uid"], time.monotonic())


def _owner(child: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    """The controller of `child`, if it is of `kind`."""
    references = child["metadata"].get("ownerReferences", ())
    return next((owner for owner in references if owner.get("controller") and owner["kind"] == kind), None)


def _parse(text: str, attempt: str) -> Reported:
    """The report in a request's body. Raises `Refused` with the field that is wrong."""
    try:
        document = ProgressDocument.model_validate_json(text)
        numbers = document.numbers()
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        raise Refused(400, f"{'.'.join(map(str, wrong['loc'])) or 'body'}: {wrong['msg']}") from error
    except ValueError as error:
        raise Refused(400, str(error)) from error
    status = document.trainer_status
    return Reported(
        attempt=attempt,
        received=datetime.now(UTC),
        percent=status.progress_percentage,
        remaining_seconds=status.estimated_remaining_seconds,
        numbers=numbers,
    )
