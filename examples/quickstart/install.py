"""Installs the product into a cluster: the chart, with the images to run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.client import Cluster
from tests.cluster.console import step

REPOSITORY = Path(__file__).resolve().parents[2]
CHART = REPOSITORY / "charts" / "qlora-operator"
NAMESPACE = "qlora-system"


class InstallError(Exception):
    """helm refused; the message is its own."""


@dataclass(frozen=True)
class Images:
    """References by digest (`…@sha256:…`) or by tag (`…:v1`)."""

    operator: str
    trainer: str


def image_values(reference: str) -> dict[str, str]:
    """The chart's `image` values for a reference."""
    repository, at, digest = reference.partition("@")
    if at:
        return {"repository": repository, "digest": digest}
    repository, _, tag = reference.rpartition(":")
    return {"repository": repository, "tag": tag}


def install(cluster: Cluster, images: Images, values: Mapping[str, Any] | None = None) -> None:
    """Install or upgrade the release `qlora-operator` and wait until it is ready. Raises InstallError."""
    if cluster.find("namespace", NAMESPACE) is None:
        cluster.create_namespace(NAMESPACE)
    document: dict[str, Any] = dict(values or {})
    for name, reference in (("operator", images.operator), ("trainer", images.trainer)):
        document[name] = {**document.get(name, {}), "image": image_values(reference)}
    command = ["helm", "upgrade", "--install", "qlora-operator", str(CHART), "--namespace", NAMESPACE]
    # the definition may have been applied by hand before
    command += ["--values", "-", "--wait", "--timeout", "5m", "--force-conflicts"]
    environment = {**os.environ, **cluster.environment()}
    with step("helm upgrade --install, until the operator is ready"):
        done = subprocess.run(command, input=yaml.safe_dump(document), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise InstallError(f"helm upgrade --install: {(done.stderr or done.stdout).strip()}")
