"""Policies for the volumes that a job works in and writes its results to."""

from __future__ import annotations

from datetime import datetime

from qlora_api.exchange import claim_of
from qlora_api.v1alpha1 import Phase, WorkVolume
from qlora_operator.lifecycle.conditions import Situation
from qlora_operator.lifecycle.observed import Job, Observed
from qlora_operator.lifecycle.pending import Wait
from qlora_operator.lifecycle.standing import NOW, WHEN_CLAIMS_CHANGE, fail, say, underway
from qlora_operator.lifecycle.step import CreateWorkVolume, Step
from qlora_operator.lifecycle.tasks import TRAIN, is_done


def work_claim(job: Job) -> str:
    """Name of the claim that the stages work in: the user's, or the job's own."""
    return job.spec.storage.claim_name or f"{job.metadata.name}-work"


def output_claim(job: Job) -> str | None:
    """Name of the claim that the results go to; None where they go elsewhere."""
    uri = job.spec.output.uri
    return claim_of(uri)[0] if uri.startswith("pvc://") else None


def output_claim_is_missing(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Say so before anything is trained, instead of when there is a result to be published."""
    claim = output_claim(job)
    if job.status.work_volume is not None or claim is None or seen.claims.get(claim, True):
        return None
    message = f"spec.output.uri: there is no PersistentVolumeClaim {claim} in this namespace; create it"
    return say(job, seen, now, Situation(Phase.SCHEDULING, "ClaimMissing", message), after=WHEN_CLAIMS_CHANGE)


def work_volume_is_missing(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Claim it, with its size known; a claim that the user named must be there."""
    claim = work_claim(job)
    if seen.claims.get(claim):
        if job.status.work_volume is not None:
            return None
        volume = job.status.model_copy(update={"work_volume": WorkVolume(claim_name=claim)})
        return say(Job(job.metadata, job.spec, volume), seen, now, underway(job, seen), after=NOW)
    if job.status.work_volume is not None and is_done(job.status, TRAIN):
        message = f"the work volume {claim} is gone, and the adapter with it; apply the job anew under another name"
        return fail(job, seen, now, "WorkVolumeLost", message)
    if job.spec.storage.claim_name is not None:
        message = f"spec.storage.claimName: there is no PersistentVolumeClaim {claim} in this namespace; create it"
        return say(job, seen, now, Situation(Phase.SCHEDULING, "ClaimMissing", message), after=WHEN_CLAIMS_CHANGE)
    situation = Situation(Phase.SCHEDULING, "Claiming", f"claiming the work volume {claim}")
    return say(job, seen, now, situation, actions=(CreateWorkVolume(),), after=NOW)


def work_volume_is_not_shared(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Every node of the training writes to it: the user's claim must allow that, or our own, made for a plan on one."""
    plan, claim = job.status.plan, work_claim(job)
    if plan is None or plan.nodes == 1 or claim in seen.shared_claims or is_done(job.status, TRAIN):
        return None
    named = "spec.storage.claimName" if job.spec.storage.claim_name else "spec.hardware.nodes"
    message = (
        f"{named}: the training is planned on {plan.nodes} nodes, and the claim {claim} can be written from one alone "
        "(it lacks the access mode ReadWriteMany): suspend the job, set spec.hardware.nodes to 1 and resume"
    )
    return say(job, seen, now, Situation(Phase.SCHEDULING, Wait.VOLUME, message), after=WHEN_CLAIMS_CHANGE)
