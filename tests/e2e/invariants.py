"""What must hold of a job and its children at any time, whatever has happened to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable

from qlora_operator.lifecycle.observed import OVER
from tests.cluster.client import Cluster, Manifest

FINAL = ("Succeeded", "Failed")


def check(cluster: Cluster, job: Manifest) -> None:
    """Nothing doubled or lost, at once; nothing left over, as soon as what is to be deleted is gone."""
    name, namespace = job["metadata"]["name"], job["metadata"]["namespace"]
    status = job["status"]
    assert status["message"], "no message"
    assert status["observedGeneration"] == job["metadata"]["generation"]

    # each attempt once, numbered without a gap, and nothing after a success
    attempts = status.get("attempts", [])
    assert _doubles(a["job"] for a in attempts) == []
    for task in {_task(a["stage"], a.get("artifact")) for a in attempts}:
        mine = [a for a in attempts if _task(a["stage"], a.get("artifact")) == task]
        older = [a for a in status.get("olderAttempts", []) if _task(a["stage"], a.get("artifact")) == task]
        numbers = [a["number"] for a in mine]
        assert numbers == sorted(set(numbers)), task
        assert numbers[-1] == len(mine) + sum(a["count"] for a in older), task
        assert [a for a in mine[:-1] if a.get("outcome") in (None, "Succeeded")] == [], task

    # at most one Job and one pod alive for each task
    assert _doubles(_task_of(j) for j in cluster.list("job", namespace, _of(name)) if not _is_over(j)) == []
    assert _doubles(_task_of(p) for p in cluster.list("pod", namespace, _of(name)) if _lives(p)) == []

    cluster.wait(
        f"{name} has the children that its status tells of, and no other",
        lambda: strays(cluster, name, namespace),
        lambda found: not found,
        namespace=namespace,
        interval=1,
    )


def strays(cluster: Cluster, name: str, namespace: str) -> list[str]:
    """What differs between the children that are there and those that the status tells of."""
    job = cluster.get("qlorajobs.qlora.dev", name, namespace)
    jobs = cluster.list("job", namespace, _of(name))
    known = {a["job"] for a in job["status"].get("attempts", ())}
    alive = {j["metadata"]["name"] for j in jobs if not _is_over(j)}
    over = {j["metadata"]["name"] for j in jobs} - alive
    found = [f"Job {other}: no attempt tells of it" for other in over - known]
    if job["status"]["phase"] in FINAL:
        found += [f"Job {other}: runs on" for other in alive]
    owners = {j["metadata"]["uid"] for j in jobs}
    pods = cluster.list("pod", namespace, _of(name))
    found += [f"pod {pod['metadata']['name']}: without its Job" for pod in pods if _owner(pod) not in owners]
    orders = {c["metadata"]["name"] for c in cluster.list("configmap", namespace, _of(name))}
    found += [f"ConfigMap {other}: without an attempt" for other in orders - known - alive]
    volume = job["status"].get("workVolume", {})
    theirs = job["spec"].get("storage", {}).get("claimName")
    promised = {volume["claimName"]} - {theirs} if volume.get("retained") else set()
    claims = {c["metadata"]["name"] for c in cluster.list("persistentvolumeclaim", namespace, _of(name))}
    return found + [f"claim {claim}: the status says otherwise" for claim in promised ^ claims]


def left_of(cluster: Cluster, name: str, namespace: str) -> list[str]:
    """What is there of a job that was deleted: itself and its children, as kind/name."""
    children = cluster.list("job,pod,configmap,persistentvolumeclaim", namespace, _of(name))
    itself = cluster.find("qlorajobs.qlora.dev", name, namespace)
    return sorted(f"{o['kind']}/{o['metadata']['name']}" for o in [*children, *([itself] if itself else [])])


def _of(name: str) -> str:
    return f"qlora.dev/job={name}"


def _doubles(values: Iterable[Hashable]) -> list[Hashable]:
    return [value for value, times in Counter(values).items() if times > 1]


def _task(stage: str, artifact: str | None) -> str:
    return f"{stage}-{artifact}" if artifact else stage


def _task_of(child: Manifest) -> str:
    labels = child["metadata"]["labels"]
    return _task(labels["qlora.dev/stage"], labels.get("qlora.dev/artifact"))


def _is_over(job: Manifest) -> bool:
    return any(
        c["type"] in ("Complete", "Failed") and c["status"] == "True" for c in job["status"].get("conditions", ())
    )


def _owner(pod: Manifest) -> str:
    return pod["metadata"]["ownerReferences"][0]["uid"]


def _lives(pod: Manifest) -> bool:
    return pod["status"]["phase"] not in OVER
