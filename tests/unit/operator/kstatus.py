"""How kstatus (Flux, Argo CD, helm --wait) reads an object: its rules, for tests that hold the status against them.

After sigs.k8s.io/cli-utils, pkg/kstatus/status/generic.go and core.go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def kstatus(document: Mapping[str, Any]) -> str:
    """Terminating, InProgress, Failed or Current: the first rule that applies."""
    if document["metadata"].get("deletionTimestamp"):
        return "Terminating"
    status = document.get("status", {})
    if status.get("observedGeneration", document["metadata"]["generation"]) != document["metadata"]["generation"]:
        return "InProgress"
    conditions = {condition["type"]: condition["status"] for condition in status.get("conditions", ())}
    if conditions.get("Reconciling") == "True":
        return "InProgress"
    if conditions.get("Stalled") == "True":
        return "Failed"
    if conditions.get("Ready") in ("False", "Unknown"):
        return "InProgress"
    return "Current"  # also when nothing is set
