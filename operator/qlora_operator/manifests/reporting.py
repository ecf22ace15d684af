"""What a train pod reports with: where to, whom to trust there, and a token that is good for nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_api.exchange import (
    METRICS_PORT,
    PROGRESS_AUDIENCE,
    PROGRESS_CA_ENV,
    PROGRESS_MOUNT,
    PROGRESS_TOKEN_ENV,
    PROGRESS_URL_ENV,
)
from qlora_operator.lifecycle.observed import Job

AUTHORITY_KEY = "ca.crt"
TOKEN_KEY = "token"
TOKEN_SECONDS = 3600  # the kubelet renews it in time

PORT = {"name": "metrics", "containerPort": METRICS_PORT}
MOUNT = {"name": "progress", "mountPath": PROGRESS_MOUNT, "readOnly": True}


@dataclass(frozen=True)
class Endpoint:
    """The progress endpoint, as trainers see it: its address, and its certificate authority as PEM."""

    url: str
    authority: str

    def url_of(self, namespace: str, job: str) -> str:
        """Where the trainers of `job` report."""
        return f"{self.url}/v1alpha1/namespaces/{namespace}/qlorajobs/{job}/progress"


def environment(job: Job, endpoint: Endpoint) -> dict[str, str]:
    """What Kubeflow's trainers, and transformers' own callback, look for in their environment."""
    return {
        PROGRESS_URL_ENV: endpoint.url_of(job.metadata.namespace, job.metadata.name),
        PROGRESS_CA_ENV: f"{PROGRESS_MOUNT}/{AUTHORITY_KEY}",
        PROGRESS_TOKEN_ENV: f"{PROGRESS_MOUNT}/{TOKEN_KEY}",
    }


def volume(order: str) -> dict[str, Any]:
    """Token and authority; the latter travels in the attempt's ConfigMap `order`."""
    token = {"audience": PROGRESS_AUDIENCE, "expirationSeconds": TOKEN_SECONDS, "path": TOKEN_KEY}
    authority = {"name": order, "items": [{"key": AUTHORITY_KEY, "path": AUTHORITY_KEY}]}
    return {"name": MOUNT["name"], "projected": {"sources": [{"serviceAccountToken": token}, {"configMap": authority}]}}
