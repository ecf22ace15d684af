"""What stands for Kueue, of which no part can run here: what it does to a Job, in the order in which it does it.

Kueue has two parts that touch a Job with its label. Its webhook suspends the Job as it is created; here an admission
policy of the API server does, so that the Job never exists unsuspended, as with Kueue. Its controller, once a
ClusterQueue has room, merges the flavour's node labels into the pod template and unsuspends, in one write; when it
takes the room back it suspends the Job, resets its start time and restores the template (kubernetes-sigs/kueue,
pkg/controller/jobs/job: RunWithPodSetsInfo and Stop). `admit` and `preempt` make those writes. When they are made a
test decides, in place of quotas, priorities and the Workload object, of which the operator knows nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from qlora_operator.lifecycle.observed import QUEUE_LABEL
from tests.cluster.client import Cluster, Manifest

MANAGER = "stands-for-kueue"
POLICY = "stands-for-kueues-webhook"


@dataclass
class Kueue:
    """Its controller, in one namespace; `writes` counts its changes of Jobs' specs."""

    cluster: Cluster
    namespace: str
    writes: int = 0

    def admit(self, job: str, flavour: dict[str, str]) -> None:
        """Let the Job run on nodes with the labels of `flavour`."""
        self._write(job, {"suspend": False, "template": {"spec": {"nodeSelector": flavour}}})

    def preempt(self, job: str) -> None:
        """Take the room of the Job back; its pods go."""
        self._write(job, {"suspend": True})
        self.cluster.patch("job", job, {"status": {"startTime": None}}, self.namespace, status=True)
        self._write(job, {"template": {"spec": {"nodeSelector": None}}})

    def _write(self, job: str, spec: Manifest) -> None:
        change = json.dumps({"spec": spec})
        patch = ["patch", "job", job, "--type=merge", f"--field-manager={MANAGER}", "--patch", change]
        self.cluster.kubectl(*patch, namespace=self.namespace)
        self.writes += 1


@contextmanager
def installed(cluster: Cluster, namespace: str) -> Iterator[Kueue]:
    """Jobs of the namespace that name a queue are created suspended meanwhile."""
    rule = {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
    suspend = {"expression": "Object{spec: Object.spec{suspend: true}}"}
    named = f"has(object.metadata.labels) && '{QUEUE_LABEL}' in object.metadata.labels"
    policy: Manifest = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingAdmissionPolicy",
        "metadata": {"name": POLICY},
        "spec": {
            "failurePolicy": "Fail",
            "reinvocationPolicy": "Never",
            "matchConstraints": {"resourceRules": [rule]},
            "matchConditions": [{"name": "names-a-queue", "expression": named}],
            "mutations": [{"patchType": "ApplyConfiguration", "applyConfiguration": suspend}],
        },
    }
    here = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}
    binding: Manifest = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingAdmissionPolicyBinding",
        "metadata": {"name": POLICY},
        "spec": {"policyName": POLICY, "matchResources": here},
    }
    try:
        cluster.apply(policy, binding)
        cluster.wait("the API server has taken up the policy", lambda: _suspends(cluster, namespace), interval=0.5)
        yield Kueue(cluster, namespace)
    finally:
        for one in (binding, policy):
            cluster.delete(one["kind"], one["metadata"]["name"])


def _suspends(cluster: Cluster, namespace: str) -> bool:
    """Whether a Job that names a queue would be suspended."""
    container = {"name": "any", "image": "any"}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "any", "labels": {QUEUE_LABEL: "any"}},
        "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [container]}}},
    }
    dry = ["create", "--dry-run=server", "--output=json", "--filename=-"]
    return json.loads(cluster.kubectl(*dry, namespace=namespace, stdin=json.dumps(job)))["spec"]["suspend"]
