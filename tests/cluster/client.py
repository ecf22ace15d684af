"""What tests and the demo do with the cluster: kubectl, apply, find, wait."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

Seen = TypeVar("Seen")
Manifest = dict[str, Any]


class KubectlError(Exception):
    """kubectl ended with an error; the message is its own."""


class NotInTimeError(AssertionError):
    """What was waited for did not come; the message says what was seen last."""


@dataclass(frozen=True)
class Cluster:
    """A running cluster. `binaries` holds kubectl, helm and the rest."""

    kubeconfig: Path
    binaries: Path

    def environment(self) -> dict[str, str]:
        """What to add to the environment of a program that is to use the cluster."""
        return {"KUBECONFIG": str(self.kubeconfig), "PATH": f"{self.binaries}:{os.environ['PATH']}"}

    def kubectl(self, *arguments: str, namespace: str | None = None, stdin: str | None = None) -> str:
        """Run kubectl and return its output.

        Raises:
            KubectlError: it failed.
        """
        command = [f"{self.binaries}/kubectl", f"--kubeconfig={self.kubeconfig}"]
        command += [f"--namespace={namespace}"] if namespace else []
        result = subprocess.run([*command, *arguments], input=stdin, capture_output=True, text=True, timeout=600)
        if result.returncode:
            raise KubectlError(f"kubectl {' '.join(arguments)}: {(result.stderr or result.stdout).strip()}")
        return result.stdout

    def apply(self, *manifests: Manifest, namespace: str | None = None) -> None:
        """Server-side apply."""
        documents = yaml.safe_dump_all(manifests)
        self.kubectl(
            "apply", "--server-side", "--force-conflicts", "--filename=-", namespace=namespace, stdin=documents
        )

    def create(self, manifest: Manifest, namespace: str | None = None) -> Manifest:
        """Create one object and return it as the server stored it."""
        return json.loads(
            self.kubectl("create", "--filename=-", "--output=json", namespace=namespace, stdin=json.dumps(manifest))
        )

    def get(self, kind: str, name: str, namespace: str | None = None) -> Manifest:
        return json.loads(self.kubectl("get", kind, name, "--output=json", namespace=namespace))

    def find(self, kind: str, name: str, namespace: str | None = None) -> Manifest | None:
        """Like `get`, but None if there is no such object."""
        answer = self.kubectl("get", kind, name, "--output=json", "--ignore-not-found", namespace=namespace)
        return json.loads(answer) if answer else None

    def list(self, kind: str, namespace: str | None = None, selector: str = "") -> list[Manifest]:
        """All of a kind, in one namespace or, without one, in all."""
        arguments = ["get", kind, "--output=json", f"--selector={selector}"]
        if not namespace:
            arguments.append("--all-namespaces")
        return json.loads(self.kubectl(*arguments, namespace=namespace))["items"]

    def patch(self, kind: str, name: str, change: Manifest, namespace: str | None = None, status: bool = False) -> None:
        """Merge patch of the object or, with `status`, of its status."""
        where = ["--subresource=status"] if status else []
        self.kubectl("patch", kind, name, "--type=merge", *where, "--patch", json.dumps(change), namespace=namespace)

    def delete(self, kind: str, name: str, namespace: str | None = None, wait: bool = True) -> None:
        """Delete one object if it exists; with `wait`, return once it is gone."""
        flags = ["--ignore-not-found", f"--wait={str(wait).lower()}"]
        self.kubectl("delete", kind, name, *flags, namespace=namespace)

    def logs(self, pod: str, namespace: str, *flags: str) -> str:
        return self.kubectl("logs", pod, *flags, namespace=namespace)

    def wait(
        self,
        expected: str,
        probe: Callable[[], Seen],
        until: Callable[[Seen], Any] = bool,
        timeout: float = 60.0,
        namespace: str | None = None,
        interval: float = 0.25,
    ) -> Seen:
        """Look with `probe` again and again, and return what it saw once `until` holds of it.

        A probe may fail with KubectlError: that counts as not yet.

        Raises:
            NotInTimeError: `timeout` seconds went by; says what was seen last and, given a namespace, its events.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                seen = probe()
                if until(seen):
                    return seen
                last = _brief(seen)
            except KubectlError as error:
                last = str(error)
            if time.monotonic() > deadline:
                raise NotInTimeError(
                    f"not within {timeout:.0f} s: {expected}. Last seen: {last}{self._recent(namespace)}"
                )
            time.sleep(interval)

    def wait_pod(self, name: str, namespace: str, *phases: str, timeout: float = 60.0) -> Manifest:
        """The pod, once it is in one of `phases`."""
        return self.wait(
            f"pod {name} is {' or '.join(phases)}",
            lambda: self.get("pod", name, namespace),
            lambda pod: pod["status"]["phase"] in phases,
            timeout=timeout,
            namespace=namespace,
        )

    def create_namespace(self, name: str, pod_security: str = "restricted") -> None:
        """A namespace that enforces a Pod Security Standard; returns once pods can be created in it."""
        labels = {"pod-security.kubernetes.io/enforce": pod_security}
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        # a second or so passes before its default ServiceAccount exists, and until then pods are refused
        self.wait(
            f"namespace {name} has its default ServiceAccount",
            lambda: self.find("serviceaccount", "default", name),
            interval=0.1,
        )

    def _recent(self, namespace: str | None) -> str:
        if not namespace:
            return ""
        events = ""
        with contextlib.suppress(KubectlError):
            events = self.kubectl("get", "events", "--sort-by=.lastTimestamp", namespace=namespace)
        return f"\nEvents in {namespace}:\n" + "\n".join(events.splitlines()[-15:])


def _brief(seen: object) -> str:
    """An object's status rather than all of it, and not too long."""
    if isinstance(seen, dict) and "status" in seen:
        seen = seen["status"]
    text = seen if isinstance(seen, str) else json.dumps(seen, indent=1, default=str)
    return text if len(text) <= 3000 else f"{text[:3000]} ..."
