"""What an installation decides: read once at start from the file that the chart writes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from qlora_api.v1alpha1 import BackEnd, JobSpec
from qlora_operator.placement.nodes import amount

DEFAULT_PATH = "/etc/qlora-operator/config.yaml"


class _Strict(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="forbid")


class StageResources(_Strict):
    """Requests and limits of a stage's container, in Kubernetes quantities."""

    requests: dict[str, str] = Field(default_factory=dict)
    limits: dict[str, str] = Field(default_factory=dict)

    @property
    def memory_bytes(self) -> int:
        """What the container asks for of a node's memory; a limit alone is asked for, too. 0: nothing."""
        asked = self.requests.get("memory") or self.limits.get("memory")
        return amount(asked) if asked else 0


class Settings(_Strict):
    """The installation. Every field is a value of the chart."""

    trainer_image: str = Field(description="The image that every stage runs, by digest or tag.")
    amd_trainer_image: str | None = Field(
        default=None, description="The image that trains on AMD's GPUs; absent: no training is placed there."
    )
    back_ends: list[BackEnd] = Field(
        default_factory=list, description="Optional packages that the trainer images were built with."
    )
    gpu_prices: dict[str, float] = Field(
        default_factory=dict,
        description="Price of one GPU for an hour, by product: of GPUs that are as good, the cheaper.",
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    image_pull_secrets: list[str] = Field(default_factory=list)
    namespaces: list[str] = Field(default_factory=list, description="Namespaces to serve; empty: all.")
    cpu_allowed: bool = Field(
        default=False, description="A job that asks for a GPU may train on the CPU where the container sees no device."
    )
    storage_class: str | None = Field(default=None, description="For work volumes; absent: the cluster's default.")
    cpu_stages: StageResources = Field(
        default_factory=lambda: StageResources(requests={"cpu": "500m", "memory": "2Gi"}),
        description="Resources of inspect, merge and publish.",
    )
    train_stage: StageResources = Field(
        default_factory=lambda: StageResources(requests={"cpu": "1"}),
        description="Resources of train besides GPUs and the host memory that the plan computes.",
    )
    stage_env: dict[str, str] = Field(
        default_factory=dict, description="Environment of every stage, e.g. OMP_NUM_THREADS."
    )
    tolerations: list[dict[str, Any]] = Field(
        default_factory=list, description="For every stage, besides the job's own."
    )
    grace_seconds: int = Field(default=120, ge=5, description="What a stage gets to write its checkpoint on SIGTERM.")
    workers: int = Field(default=8, ge=1, le=64, description="Jobs looked at concurrently.")
    resync_seconds: int = Field(default=60, ge=5, description="How often everything is listed anew.")
    lease: str = Field(default="qlora-operator", description="Name of the Lease by which replicas agree on a leader.")
    report_service: str = Field(
        default="qlora-operator-reports", description="Name of the Service that leads trainers' reports to the leader."
    )
    report_port: int = Field(default=8443, ge=1, le=65535, description="Takes the trainers' reports, over HTTPS.")
    probe_port: int = Field(default=8080, ge=1, le=65535, description="Serves /healthz, /readyz and /metrics.")

    def image_of(self, spec: JobSpec, *, trains: bool = True) -> str:
        """The image of the job's training, or of its other stages."""
        amd = self.amd_trainer_image if trains and spec.hardware.accelerator == "amd" else None
        return spec.pod_template.image or amd or self.trainer_image


def load(path: str | None = None) -> Settings:
    """The settings in `path` (default: $QLORA_CONFIG or `DEFAULT_PATH`). Raises SystemExit with the cure when unfit."""
    file = Path(path or os.environ.get("QLORA_CONFIG", DEFAULT_PATH))
    try:
        return Settings.model_validate(yaml.safe_load(file.read_text()) or {})
    except OSError as error:
        raise SystemExit(f"{file}: {error.strerror}; name the configuration file in QLORA_CONFIG") from error
    except yaml.YAMLError as error:
        raise SystemExit(f"{file}: not YAML: {error}") from error
    except ValidationError as error:
        lines = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise SystemExit(f"{file}: " + "; ".join(lines)) from error
