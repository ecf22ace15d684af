"""What the rest of the tests rely on: the cluster behaves like a real one, because it is."""

import pytest

from tests.cluster import gpus, kwok, lifecycle, state, volumes
from tests.cluster.client import Cluster, KubectlError, NotInTimeError
from tests.cluster.pods import USER, restricted

pytestmark = pytest.mark.cluster


def test_a_second_up_finds_the_cluster_and_starts_nothing(cluster: Cluster) -> None:
    before = state.load()
    assert lifecycle.ensure_up() == cluster
    after = state.load()
    assert before and after and after.processes == before.processes
    assert not after.dead


def test_a_restricted_pod_runs_and_can_be_read_and_entered(cluster: Cluster, namespace: str) -> None:
    cluster.create(restricted("talker", ["sh", "-c", "echo hello; exec sleep 600"]), namespace)
    cluster.wait_pod("talker", namespace, "Running")
    cluster.wait("its log says hello", lambda: cluster.logs("talker", namespace), lambda log: log == "hello\n")
    assert f"uid={USER}" in cluster.kubectl("exec", "talker", "--", "id", namespace=namespace)
    with pytest.raises(KubectlError, match="Read-only file system"):
        cluster.kubectl("exec", "talker", "--", "touch", "/etc/x", namespace=namespace)


def test_a_pod_that_may_be_root_is_refused(cluster: Cluster, namespace: str) -> None:
    pod = restricted("root", ["id"])
    del pod["spec"]["securityContext"]["runAsNonRoot"]
    pod["spec"]["securityContext"]["runAsUser"] = 0
    with pytest.raises(KubectlError, match='violates PodSecurity "restricted'):
        cluster.create(pod, namespace)


def test_waiting_in_vain_says_what_was_seen(cluster: Cluster, namespace: str) -> None:
    cluster.create(restricted("picky", ["id"], nodeSelector={"no": "such-node"}), namespace)
    with pytest.raises(NotInTimeError) as failure:
        cluster.wait_pod("picky", namespace, "Running", timeout=3)
    assert "Pending" in str(failure.value)
    assert "didn't match Pod's node affinity/selector" in str(failure.value)


def test_fake_gpus_are_scheduled_by_memory_and_accounted(
    cluster: Cluster, namespace: str, fake_gpus: gpus.Product
) -> None:
    def enough_memory(mib: int) -> dict[str, object]:
        term = {"matchExpressions": [{"key": "nvidia.com/gpu.memory", "operator": "Gt", "values": [str(mib)]}]}
        return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}

    hold, both = ["sleep", "600"], {gpus.RESOURCE: "2"}
    fits, too_big = enough_memory(fake_gpus.memory_mib - 1), enough_memory(fake_gpus.memory_mib)
    cluster.create(restricted("first", hold, resources=both, affinity=fits), namespace)
    cluster.wait_pod("first", namespace, "Running")

    cluster.create(restricted("second", hold, resources=both, affinity=fits), namespace)
    cluster.create(restricted("third", hold, resources=both, affinity=too_big), namespace)
    assert "Insufficient nvidia.com/gpu" in _why_pending(cluster, "second", namespace)
    assert "didn't match Pod's node affinity" in _why_pending(cluster, "third", namespace)

    cluster.delete("pod", "first", namespace)
    cluster.wait_pod("second", namespace, "Running")
    gpus.take(cluster)
    node = cluster.get("node", "node1")
    assert gpus.RESOURCE not in node["status"]["allocatable"]
    assert not [label for label in node["metadata"]["labels"] if label.startswith("nvidia.com/")]


def _why_pending(cluster: Cluster, pod: str, namespace: str) -> str:
    def scheduled() -> dict[str, str]:
        conditions = cluster.get("pod", pod, namespace)["status"].get("conditions", [])
        return next((c for c in conditions if c["type"] == "PodScheduled"), {})

    unscheduled = cluster.wait(f"pod {pod} is unschedulable", scheduled, lambda c: c.get("status") == "False")
    return unscheduled["message"]


def test_fake_nodes_are_ready_and_run_jobs_only_for_those_who_tolerate_them(
    cluster: Cluster, namespace: str, fake_nodes
) -> None:
    product = gpus.H100
    names = fake_nodes(f"{namespace}-h100", 3, labels=gpus.labels(product, 8), allocatable={gpus.RESOURCE: "8"})
    assert len(names) == 3
    cluster.create(_claim("work", "1Ti"), namespace)
    pod = restricted("worker", ["ignored"], resources={gpus.RESOURCE: "8"}, claim="work")
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "train"},
        "spec": {"backoffLimit": 0, "template": {"spec": pod["spec"] | {"tolerations": [kwok.TOLERATION]}}},
    }
    cluster.create(job, namespace)
    cluster.wait(
        "the fake node's kubelet completes the Job",
        lambda: cluster.get("job", "train", namespace),
        lambda seen: seen["status"].get("succeeded") == 1,
        namespace=namespace,
    )
    (done,) = cluster.list("pods", namespace)
    assert done["spec"]["nodeName"] in names

    cluster.create(restricted("stranger", ["id"], resources={gpus.RESOURCE: "8"}), namespace)
    assert "untolerated taint" in _why_pending(cluster, "stranger", namespace)


def _claim(name: str, size: str) -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size}}},
    }


def test_a_claim_is_bound_written_by_its_group_and_given_back(cluster: Cluster, namespace: str) -> None:
    cluster.create(_claim("work", "2Gi"), namespace)
    writer = restricted("writer", ["sh", "-c", "id > /data/who"], claim="work")
    cluster.create(writer, namespace)
    cluster.wait_pod("writer", namespace, "Succeeded")
    place = volumes.directory(cluster, "work", namespace)
    assert f"uid={USER}" in (place / "who").read_text()
    assert (place / "who").stat().st_gid == USER

    volume = cluster.get("persistentvolumeclaim", "work", namespace)["spec"]["volumeName"]
    cluster.delete("pod", "writer", namespace)
    cluster.delete("persistentvolumeclaim", "work", namespace)
    cluster.wait("the keeper removed the volume", lambda: cluster.find("persistentvolume", volume), lambda v: v is None)
    cluster.wait("its files are gone", place.exists, lambda there: not there)
    wanted = sum(offer.free for offer in volumes.OFFERS)
    cluster.wait("there are as many free volumes as before", lambda: volumes.free(cluster), lambda v: len(v) >= wanted)


def test_a_service_is_found_by_name_and_reached_from_another_pod(cluster: Cluster, namespace: str) -> None:
    serve = "mkdir /tmp/www && echo served > /tmp/www/index.html && exec busybox httpd -f -p 8080 -h /tmp/www"
    server = restricted("server", ["sh", "-c", serve])
    server["spec"]["containers"][0]["volumeMounts"] = [{"name": "scratch", "mountPath": "/tmp"}]
    server["spec"]["volumes"] = [{"name": "scratch", "emptyDir": {}}]
    cluster.create(server, namespace)
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"selector": {"app": "server"}, "ports": [{"port": 80, "targetPort": 8080}]},
    }
    address = cluster.create(service, namespace)["spec"]["clusterIP"]
    cluster.wait_pod("server", namespace, "Running")
    cluster.create(restricted("client", ["sleep", "600"]), namespace)
    cluster.wait_pod("client", namespace, "Running")

    def inside(*command: str) -> str:
        return cluster.kubectl("exec", "client", "--", *command, namespace=namespace)

    cluster.wait(
        "the name resolves", lambda: inside("nslookup", f"web.{namespace}.svc.cluster.local"), lambda a: address in a
    )
    # not with busybox's wget: linked statically, it crashes in the C library's look-up of names
    ask = f"printf 'GET / HTTP/1.0\\r\\n\\r\\n' | busybox nc -w 5 {address} 80"
    cluster.wait("the service answers", lambda: inside("sh", "-c", ask), lambda a: a.endswith("\n\nserved\n"))
