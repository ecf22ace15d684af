"""Every Kubernetes call, raw dicts in and out. The client's errors become `ApiError` here, once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.config import ConfigException

from qlora_api.v1alpha1 import API_VERSION, GROUP, KIND, PLURAL, VERSION
from qlora_operator.leadership import PatientLease, Replica
from qlora_operator.manifests.names import JOB_LABEL

FIELD_MANAGER = "qlora-operator"
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
TIMEOUT_SECONDS = 30
#: Objects of a list that are held at a time.
PAGE = 100

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
    configuration = client.Configuration.get_default()
    # the API server is reached directly, or by the proxy that the kubeconfig names: looking into the environment for
    # another costs two turns of a thread for each request
    configuration.client_session_kwargs = {"trust_env": False}
    return Cluster(client.ApiClient(configuration))


#: Where the objects of a kind are: their API's path, and their name in it.
RESOURCES: dict[str, tuple[str, str]] = {
    KIND: (f"/apis/{GROUP}/{VERSION}", PLURAL),
    "ConfigMap": ("/api/v1", "configmaps"),
    "Event": ("/api/v1", "events"),
    "Job": ("/apis/batch/v1", "jobs"),
    "Node": ("/api/v1", "nodes"),
    "PersistentVolumeClaim": ("/api/v1", "persistentvolumeclaims"),
    "Pod": ("/api/v1", "pods"),
    "ResourceClaimTemplate": ("/apis/resource.k8s.io/v1", "resourceclaimtemplates"),
    "Secret": ("/api/v1", "secrets"),
    "Service": ("/api/v1", "services"),
    "TokenReview": ("/apis/authentication.k8s.io/v1", "tokenreviews"),
}


def path(kind: str, namespace: str | None = None, name: str | None = None) -> str:
    """The path of an object, or without `name` of all of a namespace, or of all there are."""
    api, plural = RESOURCES[kind]
    return "/".join((api, *(("namespaces", namespace) if namespace else ()), plural, *((name,) if name else ())))


#: Kinds that cannot be changed, and are made anew when an attempt is planned anew.
REPLACED = ("ConfigMap", "ResourceClaimTemplate")


class Cluster:
    """The calls that the operator makes, and no other.

    Of the client only what connects and signs in is used: its classes for each API hold 95 MiB of models, and would
    build and check one of everything that is sent.
    """

    def __init__(self, api: client.ApiClient) -> None:
        self._api = api

    async def close(self) -> None:
        await self._api.close()

    # --- QLoRAJobs ---

    async def job(self, namespace: str, name: str) -> Raw | None:
        return await self._get(KIND, namespace, name)

    async def apply_status(self, metadata: Mapping[str, Any], status: Mapping[str, Any]) -> bool:
        """Server-side apply of the whole status, as its only writer, to the version of the job that `metadata` is of.

        False when the job is gone. An older version raises `ApiError` (409): the decision may be outdated.
        """
        namespace, name = metadata["namespace"], metadata["name"]
        version = {"name": name, "resourceVersion": metadata["resourceVersion"]}
        body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": version, "status": status}
        where = f"{path(KIND, namespace, name)}/status"
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        return await self._find(f"apply status of {name}", "PATCH", where, body, query, APPLY) is not None

    # --- everything ---

    async def everything(self, kind: str, namespaces: Sequence[str]) -> AsyncIterator[Raw]:
        """All QLoRAJobs, or all their Jobs or pods, in `namespaces`, or without any in all; or all nodes. Read page by
        page, so that memory does not grow with their number."""
        ours = {"labelSelector": JOB_LABEL} if kind in ("Job", "Pod") else {}
        for namespace in namespaces or [None]:
            more: dict[str, str] | None = {}
            while more is not None:
                query = ours | more | {"limit": str(PAGE)}
                page = await self._call(f"list {kind}s", "GET", path(kind, namespace), query=query)
                for item in page["items"]:
                    yield item
                token = page["metadata"].get("continue")
                more = {"continue": token} if token else None

    # --- children ---

    async def stage_job(self, namespace: str, name: str) -> Raw | None:
        return await self._get("Job", namespace, name)

    async def pods(self, namespace: str, stage_job: str) -> list[Raw]:
        """The pods of Jobs of that name: of one that is there, and of one that was deleted before."""
        query = {"labelSelector": f"batch.kubernetes.io/job-name={stage_job},{JOB_LABEL}"}
        return (await self._call(f"list pods of {stage_job}", "GET", path("Pod", namespace), query=query))["items"]

    async def claim(self, namespace: str, name: str) -> Raw | None:
        return await self._get("PersistentVolumeClaim", namespace, name)

    async def create(self, manifest: Raw) -> None:
        """Create a child. One of that name that is ours counts as created, with two exceptions.

        An order that says something else is replaced, and so is a template of claims (the attempt has not started); one
        that is being deleted or belongs to somebody else raises `ApiError`.
        """
        kind, metadata = manifest["kind"], manifest["metadata"]
        namespace, name = metadata["namespace"], metadata["name"]
        try:
            await self._post(kind, namespace, manifest)
        except ApiError as refused:
            if refused.code != 409:
                raise
            there = await self._get(kind, namespace, name)
            if there is None:
                raise
            owner = metadata["ownerReferences"][0]["uid"]
            require_ours(there, owner)
            if there["metadata"].get("deletionTimestamp"):
                text = f"{kind} {name} of before is still being deleted"
                raise ApiError(f"create {kind} {name}", 409, text) from refused
            if kind == "ConfigMap" and there.get("data") == manifest["data"]:
                return
            if kind in REPLACED:
                await self.delete(kind, namespace, name, owner)
                await self._post(kind, namespace, manifest)

    async def delete(self, kind: str, namespace: str, name: str, owner: str) -> None:
        """Delete the child of the job with the uid `owner`, its dependents first: a Job stays until its pods are gone.

        One that is not there counts as deleted; one that is somebody else's raises `ApiError`.
        """
        there = await self._get(kind, namespace, name)
        if there is None:
            return
        require_ours(there, owner)
        body: Raw = {"preconditions": {"uid": there["metadata"]["uid"]}}
        if kind == "Job":
            body["propagationPolicy"] = "Foreground"
        await self._find(f"delete {kind} {name}", "DELETE", path(kind, namespace, name), body)

    # --- trainers that report ---

    async def pod(self, namespace: str, name: str) -> Raw | None:
        return await self._get("Pod", namespace, name)

    async def review_token(self, token: str, audience: str) -> Raw:
        """The status of a TokenReview: whether the API server has issued `token` for `audience`, and to whom."""
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [audience]},
        }
        return (await self._call("review a token", "POST", path("TokenReview"), body))["status"]

    # --- the operator's own ---

    def lease(self, name: str, replica: Replica, answered: Callable[[], None]) -> PatientLease:
        return PatientLease(name, replica, self._api, answered)

    async def secret(self, namespace: str, name: str) -> Raw | None:
        return await self._get("Secret", namespace, name)

    async def put_secret(self, secret: Raw) -> None:
        """Create `secret`, or, where it has a resourceVersion, replace that version of it."""
        metadata = secret["metadata"]
        namespace, name = metadata["namespace"], metadata["name"]
        if "resourceVersion" in metadata:
            where, query = path("Secret", namespace, name), {"fieldManager": FIELD_MANAGER}
            await self._call(f"replace Secret {name}", "PUT", where, secret, query)
        else:
            await self._post("Secret", namespace, secret)

    async def label_pod(self, namespace: str, name: str, labels: Mapping[str, str | None]) -> None:
        """Set labels of a pod; None takes one away."""
        body, query = {"metadata": {"labels": dict(labels)}}, {"fieldManager": FIELD_MANAGER}
        await self._call(f"label Pod {name}", "PATCH", path("Pod", namespace, name), body, query, MERGE)

    # --- the cluster at large ---

    async def create_event(self, namespace: str, event: Raw) -> None:
        await self._post("Event", namespace, event)

    # --- any call ---

    async def _get(self, kind: str, namespace: str, name: str) -> Raw | None:
        return await self._find(f"get {kind} {name}", "GET", path(kind, namespace, name))

    async def _post(self, kind: str, namespace: str, manifest: Raw) -> None:
        what = f"create {kind} {manifest['metadata'].get('name', '')}".rstrip()
        await self._call(what, "POST", path(kind, namespace), manifest, {"fieldManager": FIELD_MANAGER})

    async def _find(self, what: str, *request: Any) -> Raw | None:
        """As `_call`, and None for 404."""
        try:
            return await self._call(what, *request)
        except ApiError as refused:
            if refused.code == 404:
                return None
            raise

    async def _call(
        self,
        what: str,
        method: str,
        where: str,
        body: Raw | None = None,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Raw:
        """The JSON body of the answer. Raises `ApiError` for a status of 300 and above, and where there is none."""
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                request = await self._api.param_serialize(
                    method,
                    where,
                    query_params=dict(query or {}),
                    header_params={"Accept": "application/json", "Content-Type": content_type},
                    body=body,
                    auth_settings=["BearerToken"],
                )
                response = await self._api.call_api(*request)
                answer = await response.read()
        except TimeoutError as error:
            raise ApiError(what, 0, f"no answer within {TIMEOUT_SECONDS} s") from error
        except aiohttp.ClientError as error:
            raise ApiError(what, 0, str(error)) from error
        if response.status >= 300:
            raise ApiError(what, response.status, answer.decode(errors="replace"))
        return json.loads(answer)


def require_ours(child: Mapping[str, Any], owner: str) -> None:
    """Raises `ApiError` unless the job with the uid `owner` owns `child`."""
    metadata = child["metadata"]
    if owner not in {reference["uid"] for reference in metadata.get("ownerReferences", ())}:
        whose = "an earlier job of this name" if metadata.get("ownerReferences") else "somebody else"
        text = f"{metadata['name']} is there and belongs to {whose}; delete it, or wait until it is gone"
        raise ApiError(f"use {child.get('kind', 'object')} {metadata['name']}", 409, text)
