"""Small pods for tests, allowed under the restricted Pod Security Standard."""

from tests.cluster.client import Manifest
from tests.cluster.registry import BUSYBOX_IMAGE

USER = 65532


def restricted(
    name: str,
    command: list[str],
    image: str = BUSYBOX_IMAGE,
    resources: dict[str, str] | None = None,
    claim: str | None = None,
    **spec: object,
) -> Manifest:
    """A pod that runs `command` once.

    `resources` are limits, a claim is mounted at /data, and the rest goes into the pod's spec.
    """
    limits = {"limits": resources} if resources else {}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "main",
                    "image": image,
                    "command": command,
                    "resources": limits,
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": [{"name": "data", "mountPath": "/data"}] if claim else [],
                }
            ],
            "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": claim}}] if claim else [],
            **spec,
        },
    }
