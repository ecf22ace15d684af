"""What must hold of a job and its children at any time, whatever has happened to them."""

from __future__ import annotations

from collections import Counter

from qlora_operator.lifecycle.observed import OVER
from tests.cluster.client import Cluster, Manifest

FINAL = ("Succeeded", "Failed")


def check(cluster: Cluster, job: Manifest) -> None:
    """Nothing doubled, lost or left over. `job` is as it was read before the children are."""
    name, namespace = job["metadata"]["name"], job["metadata"]["namespace"]
    status = job["status"]
    selector = f"qlora.dev/job={name}"
    assert status["message"], "no message"
    assert status["observedGeneration"] == job["metadata"]["generation"]

    # attempts: each once, numbered without a gap, and nothing after a success
    attempts = status.get("attempts", [])
    assert _doubles(a["job"] for a in attempts) == []
    tasks = {_task(a["stage"], a.get("artifact")) for a in attempts}
    for task in tasks:
        mine = [a for a in attempts if _task(a["stage"], a.get("artifact")) == task]
        assert [a["number"] for a in mine] == list(range(1, len(mine) + 1)), task
        assert [a for a in mine[:-1] if a.get("outcome") in (None, "Succeeded")] == [], task

    # Jobs: those of the attempts, and at most one alive for each task
    jobs = cluster.list("job", namespace, selector)
    known = {a["job"] for a in attempts}
    alive = [j for j in jobs if not _is_over(j)]
    assert {j["metadata"]["name"] for j in jobs if _is_over(j)} <= known, "a Job that no attempt tells of"
    assert _doubles(_task_of(j) for j in alive) == []
    assert {j["metadata"]["uid"] for j in jobs} >= {_owner(p) for p in cluster.list("pod", namespace, selector)}
    assert _doubles(_task_of(p) for p in cluster.list("pod", namespace, selector) if _lives(p)) == []
    names = known | {j["metadata"]["name"] for j in jobs}
    assert {c["metadata"]["name"] for c in cluster.list("configmap", namespace, selector)} <= names
    if status["phase"] in FINAL:
        assert [j["metadata"]["name"] for j in alive] == [], "it is over, and something runs on"

    # the work volume: one, and there if and only if the status says so
    volume = status.get("workVolume", {})
    claims = [c["metadata"]["name"] for c in cluster.list("persistentvolumeclaim", namespace, selector)]
    kept = [volume["claimName"]] if volume.get("retained") else []
    own = [claim for claim in kept if claim != job["spec"].get("storage", {}).get("claimName")]
    assert claims == own


def left_of(cluster: Cluster, name: str, namespace: str) -> list[str]:
    """What is there of a job that was deleted: itself and its children, as kind/name."""
    children = cluster.list("job,pod,configmap,persistentvolumeclaim", namespace, f"qlora.dev/job={name}")
    itself = cluster.find("qlorajobs.qlora.dev", name, namespace)
    return sorted(f"{o['kind']}/{o['metadata']['name']}" for o in [*children, *([itself] if itself else [])])


def _doubles(values: object) -> list[object]:
    return [value for value, times in Counter(values).items() if times > 1]  # type: ignore[arg-type]


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
