"""Every Kubernetes call, raw dicts in and out. The client's errors become `ApiError` here, once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.config import ConfigException

from qlora_api.v1alpha1 import API_VERSION, GROUP, KIND, PLURAL, VERSION
from qlora_operator.leadership import PatientLease, Replica
from qlora_operator.manifests.names import JOB_LABEL

FIELD_MANAGER = "qlora-operator"
APPLY = "application/apply-patch+yaml"
TIMEOUT_SECONDS = 30

Raw = dict[str, Any]


class ApiError(Exception):
    """The API server answered with an error, or not at all (code 0)."""

    def __init__(self, call: str, code: int, body: str) -> None:
        self.code = code
        try:
            message = json.loads(body).get("message", body)
        except (json.JSONDecodeError, AttributeError):
            message = body
        super().__init__(f"{call}: {code} {message[:500]}")


async def connect() -> Cluster:
    """The cluster that this process runs in, or the one of the current kubeconfig. Raises SystemExit without either."""
    try:
        config.load_incluster_config()
    except ConfigException:
        try:
            await config.load_kube_config()
        except ConfigException as error:
            raise SystemExit(f"no cluster: not in a pod, and {error}") from error
    return Cluster(client.ApiClient())


class Cluster:
    """The calls that the operator makes, and no other."""

    def __init__(self, api: client.ApiClient) -> None:
        self._api = api
        self._core = client.CoreV1Api(api)
        self._batch = client.BatchV1Api(api)
        self._authentication = client.AuthenticationV1Api(api)
        self._custom = client.CustomObjectsApi(api)

    async def close(self) -> None:
        await self._api.close()

    # --- QLoRAJobs ---

    async def job(self, namespace: str, name: str) -> Raw | None:
        call = self._custom.get_namespaced_custom_object_without_preload_content
        return await _found(f"get {KIND} {name}", call(GROUP, VERSION, namespace, PLURAL, name))

    async def jobs(self, namespace: str | None) -> list[Raw]:
        """All of a namespace, or of all namespaces."""
        if namespace is None:
            call = self._custom.list_cluster_custom_object_without_preload_content(GROUP, VERSION, PLURAL)
        else:
            call = self._custom.list_namespaced_custom_object_without_preload_content(GROUP, VERSION, namespace, PLURAL)
        return (await _answered(f"list {KIND}s", call))["items"]

    async def apply_status(self, metadata: Mapping[str, Any], status: Mapping[str, Any]) -> bool:
        """Server-side apply of the whole status, as its only writer, to the version of the job that `metadata` is of.

        False when the job is gone. An older version raises `ApiError` (409): the decision may be outdated.
        """
        namespace, name = metadata["namespace"], metadata["name"]
        version = {"name": name, "resourceVersion": metadata["resourceVersion"]}
        body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": version, "status": status}
        call = self._custom.patch_namespaced_custom_object_status_without_preload_content(
            GROUP, VERSION, namespace, PLURAL, name, body, field_manager=FIELD_MANAGER, force=True, _content_type=APPLY
        )
        return await _found(f"apply status of {name}", call) is not None

    # --- children ---

    async def stage_job(self, namespace: str, name: str) -> Raw | None:
        call = self._batch.read_namespaced_job_without_preload_content
        return await _found(f"get Job {name}", call(name, namespace))

    async def pods(self, namespace: str, stage_job: str) -> list[Raw]:
        """The pods of Jobs of that name: of one that is there, and of one that was deleted before."""
        call = self._core.list_namespaced_pod_without_preload_content
        selector = f"batch.kubernetes.io/job-name={stage_job},{JOB_LABEL}"
        return (await _answered(f"list pods of {stage_job}", call(namespace, label_selector=selector)))["items"]

    async def claim(self, namespace: str, name: str) -> Raw | None:
        call = self._core.read_namespaced_persistent_volume_claim_without_preload_content
        return await _found(f"get PersistentVolumeClaim {name}", call(name, namespace))

    async def create(self, manifest: Raw) -> None:
        """Create a child. One of that name that is ours counts as created, with two exceptions.

        An order that says something else is replaced (its attempt has not started), and one that is being deleted or
        belongs to somebody else raises `ApiError`.
        """
        kind, metadata = manifest["kind"], manifest["metadata"]
        namespace, name = metadata["namespace"], metadata["name"]
        what = f"create {kind} {name}"
        try:
            await _answered(what, self._creates(kind)(namespace, manifest, field_manager=FIELD_MANAGER))
        except ApiError as refused:
            if refused.code != 409:
                raise
            there = await _found(f"get {kind} {name}", self._reads(kind)(name, namespace))
            if there is None:
                raise
            owner = metadata["ownerReferences"][0]["uid"]
            require_ours(there, owner)
            if there["metadata"].get("deletionTimestamp"):
                raise ApiError(what, 409, f"{kind} {name} of before is still being deleted") from refused
            if kind == "ConfigMap" and there.get("data") != manifest["data"]:
                await self.delete(kind, namespace, name, owner)
                await _answered(what, self._creates(kind)(namespace, manifest, field_manager=FIELD_MANAGER))

    async def delete(self, kind: str, namespace: str, name: str, owner: str) -> None:
        """Delete the child of the job with the uid `owner`, its dependents first: a Job stays until its pods are gone.

        One that is not there counts as deleted; one that is somebody else's raises `ApiError`.
        """
        there = await _found(f"get {kind} {name}", self._reads(kind)(name, namespace))
        if there is None:
            return
        require_ours(there, owner)
        body: Raw = {"preconditions": {"uid": there["metadata"]["uid"]}}
        if kind == "Job":
            body["propagationPolicy"] = "Foreground"
        await _found(f"delete {kind} {name}", self._deletes(kind)(name, namespace, body=body))

    def _creates(self, kind: str) -> Any:
        return {
            "ConfigMap": self._core.create_namespaced_config_map_without_preload_content,
            "PersistentVolumeClaim": self._core.create_namespaced_persistent_volume_claim_without_preload_content,
            "Job": self._batch.create_namespaced_job_without_preload_content,
        }[kind]

    def _reads(self, kind: str) -> Any:
        return {
            "ConfigMap": self._core.read_namespaced_config_map_without_preload_content,
            "PersistentVolumeClaim": self._core.read_namespaced_persistent_volume_claim_without_preload_content,
            "Job": self._batch.read_namespaced_job_without_preload_content,
        }[kind]

    def _deletes(self, kind: str) -> Any:
        return {
            "ConfigMap": self._core.delete_namespaced_config_map_without_preload_content,
            "PersistentVolumeClaim": self._core.delete_namespaced_persistent_volume_claim_without_preload_content,
            "Job": self._batch.delete_namespaced_job_without_preload_content,
        }[kind]

    # --- trainers that report ---

    async def pod(self, namespace: str, name: str) -> Raw | None:
        call = self._core.read_namespaced_pod_without_preload_content
        return await _found(f"get Pod {name}", call(name, namespace))

    async def review_token(self, token: str, audience: str) -> Raw:
        """The status of a TokenReview: whether the API server has issued `token` for `audience`, and to whom."""
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [audience]},
        }
        create: Any = self._authentication.create_token_review_without_preload_content
        return (await _answered("review a token", create(body)))["status"]

    # --- the operator's own ---

    def lease(self, name: str, replica: Replica, answered: Callable[[], None]) -> PatientLease:
        return PatientLease(name, replica, self._api, answered)

    async def secret(self, namespace: str, name: str) -> Raw | None:
        call = self._core.read_namespaced_secret_without_preload_content
        return await _found(f"get Secret {name}", call(name, namespace))

    async def put_secret(self, secret: Raw) -> None:
        """Create `secret`, or, where it has a resourceVersion, replace that version of it."""
        metadata = secret["metadata"]
        namespace, name = metadata["namespace"], metadata["name"]
        if "resourceVersion" in metadata:
            replace: Any = self._core.replace_namespaced_secret_without_preload_content
            await _answered(f"replace Secret {name}", replace(name, namespace, secret, field_manager=FIELD_MANAGER))
        else:
            create: Any = self._core.create_namespaced_secret_without_preload_content
            await _answered(f"create Secret {name}", create(namespace, secret, field_manager=FIELD_MANAGER))

    async def label_pod(self, namespace: str, name: str, labels: Mapping[str, str | None]) -> None:
        """Set labels of a pod; None takes one away."""
        patch: Any = self._core.patch_namespaced_pod_without_preload_content
        body = {"metadata": {"labels": dict(labels)}}
        call = patch(name, namespace, body, field_manager=FIELD_MANAGER, _content_type="application/merge-patch+json")
        await _answered(f"label Pod {name}", call)

    # --- the cluster at large ---

    async def nodes(self) -> list[Raw]:
        return (await _answered("list nodes", self._core.list_node_without_preload_content()))["items"]

    async def create_event(self, namespace: str, event: Raw) -> None:
        create: Any = self._core.create_namespaced_event_without_preload_content  # its stub asks for a typed event
        await _answered("create event", create(namespace, event))


def require_ours(child: Mapping[str, Any], owner: str) -> None:
    """Raises `ApiError` unless the job with the uid `owner` owns `child`."""
    metadata = child["metadata"]
    if owner not in {reference["uid"] for reference in metadata.get("ownerReferences", ())}:
        whose = "an earlier job of this name" if metadata.get("ownerReferences") else "somebody else"
        text = f"{metadata['name']} is there and belongs to {whose}; delete it, or wait until it is gone"
        raise ApiError(f"use {child.get('kind', 'object')} {metadata['name']}", 409, text)


async def _answered(what: str, call: Any) -> Any:
    """The JSON body of a call's answer. Raises `ApiError` for a status of 300 and above."""
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            response = await call
            body = await response.read()
    except TimeoutError as error:
        raise ApiError(what, 0, f"no answer within {TIMEOUT_SECONDS} s") from error
    except aiohttp.ClientError as error:
        raise ApiError(what, 0, str(error)) from error
    if response.status >= 300:
        raise ApiError(what, response.status, body.decode(errors="replace"))
    return json.loads(body)


async def _found(what: str, call: Any) -> Any | None:
    """As `_answered`, and None for 404."""
    try:
        return await _answered(what, call)
    except ApiError as refused:
        if refused.code == 404:
            return None
        raise
