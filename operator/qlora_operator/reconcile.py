"""One pass over one job: observe, decide, act, write the status."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import ValidationError

from qlora_api.v1alpha1 import JobStatus, Metadata, QLoRAJob, problems
from qlora_operator import events
from qlora_operator.cluster import ApiError, Cluster, require_ours
from qlora_operator.lifecycle.conditions import unreadable
from qlora_operator.lifecycle.observed import Absent, Job, Observed, Seen, see
from qlora_operator.lifecycle.policies import next_step
from qlora_operator.lifecycle.standing import FINISHED, call_refused
from qlora_operator.lifecycle.step import Action, CreateWorkVolume, DeleteWorkVolume, Remove, Start, Stop
from qlora_operator.lifecycle.tasks import INSPECT, Task, current
from qlora_operator.lifecycle.volumes import output_claim, work_claim
from qlora_operator.manifests import attempts
from qlora_operator.manifests.claims import work_volume_claim
from qlora_operator.manifests.reporting import Endpoint
from qlora_operator.metrics import Metrics
from qlora_operator.placement.inventory import Inventory
from qlora_operator.planner import Installation
from qlora_operator.reports import Reports
from qlora_operator.settings import Settings
from qlora_operator.waiting import Waiting, waits_for_gpus
from qlora_operator.workqueue import Key

log = logging.getLogger(__name__)


#: So long a status is left alone while nothing but progress is new.
PROGRESS_PAUSE = timedelta(seconds=10)


def progress_alone(before: JobStatus, after: JobStatus) -> bool:
    """Whether the two differ, and in nothing but in what trainers report."""
    return before != after and before.model_copy(update={"progress": after.progress}) == after


class Reconciler:
    """Brings one job at a time to where it should be."""

    def __init__(
        self,
        cluster: Cluster,
        settings: Settings,
        inventory: Inventory,
        waiting: Waiting,
        reports: Reports | None = None,
        endpoint: Endpoint | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._cluster = cluster
        self._settings = settings
        self._inventory = inventory
        self._installation = Installation(
            tolerations=settings.tolerations,
            prices=settings.gpu_prices,
            amd_image=settings.amd_trainer_image is not None,
            mirror="HF_ENDPOINT" in settings.stage_env,
            stage_memory_bytes=settings.cpu_stages.memory_bytes,
            back_ends=frozenset(settings.back_ends),
        )
        self._waiting = waiting
        self._metrics = metrics or Metrics()
        self._reports = reports
        self._endpoint = endpoint
        self._written: dict[str, datetime] = {}

    def keep_only(self, uids: Set[str]) -> None:
        """Forget jobs that are gone."""
        self._written = {uid: at for uid, at in self._written.items() if uid in uids}

    async def __call__(self, key: Key) -> timedelta | None:
        """One pass over the job `key`; when to look again. Raises `ApiError` when the API server refuses a call."""
        self._waiting.add(key)  # nodes may change while this pass looks at them
        raw = await self._cluster.job(*key)
        if raw is None or raw["metadata"].get("deletionTimestamp"):
            self._metrics.forget(key)
            self._waiting.discard(key)
            return None  # its children go with it, by their ownerReferences
        self._metrics.observe(key, raw.get("status", {}))
        now = datetime.now(UTC)
        try:
            document = QLoRAJob.read(raw)
        except ValidationError as error:
            self._waiting.discard(key)
            await self._say_unreadable(raw, problems(error), now)
            return None
        job = Job(document.metadata, document.spec, document.status)
        try:
            step = next_step(job, await self.observe(job), now)
            for action in step.actions:
                await self._act(job, action)
        except ApiError as error:
            if job.status.phase not in FINISHED:
                await self._write(raw, job.status, call_refused(job, "ApiError", str(error), now), now)
            raise
        if not waits_for_gpus(step.status):
            self._waiting.discard(key)
        if any(isinstance(action, Start) for action in step.actions):
            return step.after  # where hundreds come at once, all are started before any is told of
        if progress_alone(job.status, step.status) and (left := self._until_next_write(job, now)):
            return left if step.after is None else min(left, step.after)
        await self._write(raw, job.status, step.status, now)
        return step.after

    def _until_next_write(self, job: Job, now: datetime) -> timedelta | None:
        """None when the job's status was not written for `PROGRESS_PAUSE`."""
        left = self._written.get(job.metadata.uid, now - PROGRESS_PAUSE) + PROGRESS_PAUSE - now
        return left if left > timedelta() else None

    async def observe(self, job: Job) -> Observed:
        """What the cluster has of the job, by live reads of its children's fixed names."""
        namespace = job.metadata.namespace
        states: dict[str, Seen] = {}
        for task, n in current(job.spec, job.status):
            name = task.job_name(job.metadata.name, n)
            states[name] = await self._attempt(namespace, task, name, job.metadata.uid)
        claims, shared = dict[str, bool](), set[str]()
        if job.status.plan is not None and job.status.phase not in FINISHED:
            claim = await self._cluster.claim(namespace, work_claim(job))
            if claim is not None and job.spec.storage.claim_name is None:
                require_ours(claim, job.metadata.uid)
            claims[work_claim(job)] = claim is not None
            if claim is not None and "ReadWriteMany" in claim.get("spec", {}).get("accessModes", ()):
                shared.add(work_claim(job))
            if (output := output_claim(job)) and job.status.work_volume is None:
                claims[output] = await self._cluster.claim(namespace, output) is not None
        reported = self._reports.newest(job.metadata.uid) if self._reports else None
        return Observed(states, claims, self._inventory, self._installation, reported, shared)

    async def _attempt(self, namespace: str, task: Task, name: str, owner: str) -> Seen:
        found = await self._cluster.stage_job(namespace, name)
        if found is not None:
            require_ours(found, owner)
        elif task == INSPECT:
            return Absent()  # it has no volume that a pod of before could still write to
        return see(found, await self._cluster.pods(namespace, name))

    async def _act(self, job: Job, action: Action) -> None:
        namespace, uid = job.metadata.namespace, job.metadata.uid
        log.info("%s/%s: %s", namespace, job.metadata.name, action.describe())
        match action:
            case Start(task, attempt):
                for manifest in attempts.manifests(job, task, attempt, self._settings, self._endpoint):
                    await self._cluster.create(manifest)
            case Stop(task, attempt):
                await self._cluster.delete("Job", namespace, task.job_name(job.metadata.name, attempt), uid)
            case Remove(task, attempt):
                for kind, name in attempts.names(job, task, attempt):
                    await self._cluster.delete(kind, namespace, name, uid)
            case CreateWorkVolume():
                await self._cluster.create(work_volume_claim(job, self._settings))
            case DeleteWorkVolume():
                await self._cluster.delete("PersistentVolumeClaim", namespace, work_claim(job), uid)

    async def _say_unreadable(self, raw: Mapping[str, Any], sentences: list[str], now: datetime) -> None:
        """Say that this version cannot read the job, stored by another one. Nothing of its status is lost."""
        status = dict(raw.get("status", {}))
        if status.get("phase") in FINISHED:
            return
        log.warning("%s/%s: %s", raw["metadata"]["namespace"], raw["metadata"]["name"], "; ".join(sentences))
        document = unreadable(status, "; ".join(sentences), generation=raw["metadata"]["generation"], now=now)
        if document != status and await self._cluster.apply_status(raw["metadata"], document):
            self._metrics.observe((raw["metadata"]["namespace"], raw["metadata"]["name"]), document)

    async def _write(self, raw: Mapping[str, Any], before: JobStatus, after: JobStatus, now: datetime) -> None:
        """Write the status if it says something new; events only if it landed."""
        document = {key: value for key, value in after.to_api().items() if value != []}
        if document == raw.get("status"):
            return
        metadata = Metadata.model_validate(raw["metadata"], by_alias=True, by_name=False)
        self._written[raw["metadata"]["uid"]] = now
        if await self._cluster.apply_status(raw["metadata"], document):
            self._metrics.observe((metadata.namespace, metadata.name), document)
            self._metrics.recorded(before, after)
            for event in events.between(before, after):
                await self._cluster.create_event(metadata.namespace, events.manifest(event, metadata, now))
