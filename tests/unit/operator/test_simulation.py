"""Whatever dies when, no work is lost, doubled or endless: the real reconciler on a world that misbehaves at random.

The world stands in for the API server, the Job controller and the kubelet: `World` implements the calls of `Cluster` by
their docstrings, over plain dicts. Between any two of the operator's calls it can die; Jobs end in every way that there
is; users suspend, resume, edit and delete. Each status that is written is held against what a user relies on.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import given as for_all
from hypothesis import strategies as st

from qlora_api.exchange import ExitCode, MergeOrder, ProgressName, TrainOrder, parse_order
from qlora_api.v1alpha1 import Attempt, JobStatus
from qlora_operator.cluster import ApiError, Cluster, require_ours
from qlora_operator.lifecycle.answers import COUNTED
from qlora_operator.lifecycle.observed import Reported
from qlora_operator.lifecycle.tasks import Task, tasks
from qlora_operator.metrics import ATTEMPTS, Metrics
from qlora_operator.placement.inventory import Inventory
from qlora_operator.reconcile import Reconciler
from qlora_operator.reports import Reports
from qlora_operator.settings import Settings
from qlora_operator.waiting import Waiting
from qlora_operator.workqueue import WorkQueue
from tests.unit.operator import given
from tests.unit.operator.kstatus import kstatus

Raw = dict[str, Any]

SETTINGS = Settings(trainer_image="trainer:1")
OWN_CLAIM = {"claimName": "scratch", "retain": "Delete"}
OVER = ("Succeeded", "Failed")
#: How a Job's pod can end such that the job may go on: its exit code, or whether its result is there.
CURABLE = ["result", "lost result", "result, pod gone", "pod gone", 1, 13, 13, 14, 15, 16, 137, "OOMKilled", "Unknown"]


class Died(BaseException):
    """The operator was killed: nothing after this call has happened."""


class Heard(Reports):
    """What the world's trainer has said, without the way over the network."""

    def __init__(self, world: World) -> None:
        super().__init__(world, lambda key: None)
        self._world = world

    def newest(self, job_uid: str) -> Reported | None:
        return self._world.reported


def stamp(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def now_stamp() -> str:
    return stamp(datetime.now(UTC))


class World(Cluster):
    """One QLoRAJob and its children."""

    def __init__(self, document: Raw) -> None:
        self.object = document | {"status": JobStatus().to_api()}
        self.object["metadata"]["resourceVersion"] = "1"
        self.children: dict[tuple[str, str], Raw] = {}
        self.pods_of: dict[str, list[Raw]] = {}
        self.inventory = Inventory.of([given.gpu_node("node-1", *given.L40S)])
        self.calls_until_death: int | None = None
        self.refuses: int | None = None
        self.bindings: set[str] = set()
        self.reported: Reported | None = None
        self.writes = 0

    # --- what the operator calls ---

    async def job(self, namespace: str, name: str) -> Raw | None:
        return copy.deepcopy(self.object)

    async def stage_job(self, namespace: str, name: str) -> Raw | None:
        return copy.deepcopy(self.children.get(("Job", name)))

    async def pods(self, namespace: str, stage_job: str) -> list[Raw]:
        return copy.deepcopy(self.pods_of.get(stage_job, []))

    async def claim(self, namespace: str, name: str) -> Raw | None:
        return copy.deepcopy(self.children.get(("PersistentVolumeClaim", name)))

    async def create_event(self, namespace: str, event: Raw) -> None:
        self._change("create event")

    async def create(self, manifest: Raw) -> None:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        self._change(f"create {kind} {name}")
        if there := self.children.get((kind, name)):
            require_ours(there, given.UID)
            if there["metadata"].get("deletionTimestamp"):
                raise ApiError(f"create {kind} {name}", 409, "being deleted")
            if kind != "ConfigMap":
                return
        if kind == "Job":
            self._may_start(manifest)
        child = copy.deepcopy(manifest)
        child["metadata"]["uid"] = f"uid-{kind}-{name}-{len(self.children)}-{self.writes}"
        self.children[kind, name] = child

    async def delete(self, kind: str, namespace: str, name: str, owner: str) -> None:
        self._change(f"delete {kind} {name}")
        there = self.children.get((kind, name))
        if there is None:
            return
        require_ours(there, owner)
        self.terminate(kind, name)

    async def apply_status(self, metadata: Mapping[str, Any], status: Mapping[str, Any]) -> bool:
        self._change("apply status")
        if metadata["resourceVersion"] != self.object["metadata"]["resourceVersion"]:
            raise ApiError("apply status", 409, "the object has been modified")
        self._may_write(json.loads(json.dumps(status)))
        self.object["status"] = json.loads(json.dumps(status))
        self._touched()
        return True

    def _change(self, call: str) -> None:
        if self.calls_until_death is not None:
            self.calls_until_death -= 1
            if self.calls_until_death < 0:
                raise Died(call)
        if self.refuses is not None:
            code, self.refuses = self.refuses, None
            raise ApiError(call, code, "not now")

    def _touched(self) -> None:
        self.writes += 1
        self.object["metadata"]["resourceVersion"] = str(self.writes + 1)

    # --- what must hold ---

    def task_of(self, child: Raw) -> str:
        labels = child["metadata"]["labels"]
        artifact = labels.get("qlora.dev/artifact")
        return labels["qlora.dev/stage"] + (f"-{artifact}" if artifact else "")

    def alive(self, name: str) -> bool:
        """Whether a pod of the Job `name` may still write, or come to be."""
        job = self.children.get(("Job", name))
        starts_more = job is not None and not verdict(job) and not job["metadata"].get("deletionTimestamp")
        return starts_more or any(pod["status"]["phase"] not in OVER for pod in self.pods_of.get(name, []))

    def _may_start(self, manifest: Raw) -> None:
        name, task = manifest["metadata"]["name"], self.task_of(manifest)
        rivals = [other for kind, other in self.children if kind == "Job" and self.alive(other)]
        assert [r for r in rivals if self.task_of(self.children["Job", r]) == task] == [], f"two pods of {task}"
        assert not self.alive(name), f"{name} still has a pod"
        status = self.status
        done = {a.job for a in status.attempts if a.outcome}
        assert name not in done, f"{name} has ended and is recorded"
        self._has_waited([a for a in status.attempts if named(a) == task and a.outcome])
        assert task not in {named(a) for a in status.attempts if a.outcome == "Succeeded"}, f"{task} again"
        assert status.phase not in OVER, "a finished job starts nothing"
        assert not self.object["spec"].get("suspend") or task == "inspect", "suspended"
        order = parse_order(self.children["ConfigMap", name]["data"]["order.json"])
        if isinstance(order, TrainOrder):
            self.bindings.add(order.binding())
            assert len(self.bindings) == 1, "another recipe: the checkpoint is thrown away"
            assert order.micro_batch_size * order.gradient_accumulation == order.recipe.effective_batch_size
        if isinstance(order, MergeOrder):
            assert self.status.plan is not None
            assert order.recipe == self.status.plan.recipe

    def _has_waited(self, before: list[Attempt]) -> None:
        """Twice as long with each end, until a step is done that was not done before."""
        if not before or before[-1].change or before[-1].ended is None:
            return
        in_vain = [a for a in before if a.step == before[-1].step and not a.change]
        least = min(2 ** len(in_vain), 300)
        assert datetime.now(UTC) - before[-1].ended >= timedelta(seconds=least), "a busy loop"

    def _may_write(self, document: Raw) -> None:
        before, after = self.status, JobStatus.model_validate(document, by_alias=True, by_name=False)
        generation = self.object["metadata"]["generation"]
        assert after.observed_generation == generation
        recorded = {a.job: a for a in before.attempts if a.outcome}
        for attempt in after.attempts:
            if attempt.outcome == "VolumeFull" and attempt.change and attempt.job in recorded:  # the user's, and later
                recorded[attempt.job] = recorded[attempt.job].model_copy(update={"change": attempt.change})
        assert all(recorded.get(a.job, a) == a for a in after.attempts), "an ended attempt was changed"
        assert not ends(before) - ends(after), "an ended attempt was lost"
        assert len(json.dumps(document)) < 60_000
        assert len({a.job for a in after.attempts}) == len(after.attempts), "an attempt is there twice"
        for task in {named(a) for a in after.attempts}:
            listed = [a for a in after.attempts if named(a) == task and a.outcome]
            numbers = [a.number for a in listed]
            assert numbers == sorted(set(numbers)), "out of order"
            assert max(numbers, default=0) == sum(n for (of, _), n in ends(after).items() if of == task)
            assert sum(a.change is None for a in listed) <= 11, "the status grows for ever"
        successes = [named(a) for a in after.attempts if a.outcome == "Succeeded"]
        assert len(set(successes)) == len(successes), "a result was recorded twice"
        for task in {named(a) for a in after.attempts}:
            failures = sum(n for (of, outcome), n in ends(after).items() if of == task and outcome in COUNTED)
            assert failures <= self.max_restarts + 1, f"{task} restarted too often"
        if after.plan is not None:
            plan = after.plan
            assert plan.recipe.effective_batch_size == self.effective_batch_size
            assert plan.micro_batch_size * plan.gradient_accumulation == self.effective_batch_size
        if before.phase in OVER:
            assert after.phase == before.phase, "finished is finished"
            assert after.completion_time == before.completion_time
        if after.phase == "Succeeded":
            published = {a.name for a in after.artifacts if a.state == "Published" and a.uri}
            assert published == set(self.object["spec"]["output"].get("formats", ["adapter"]))
        old = {condition.type: condition for condition in before.conditions}
        for condition in after.conditions:
            if condition.type in old and condition.status == old[condition.type].status:
                assert condition.last_transition_time == old[condition.type].last_transition_time, condition.type
        verdicts = {"Succeeded": "Current", "Planned": "Current", "Failed": "Failed"}
        if any(c.type == "Stalled" and c.reason == "VolumeFull" and c.status == "True" for c in after.conditions):
            verdicts[str(after.phase)] = "Failed"  # until somebody has made room
        read = kstatus({"metadata": {"generation": generation}, "status": document})
        refused = any(c.reason == "ApiError" for c in after.conditions)  # then the phase is the last one known
        assert read == ("InProgress" if refused else verdicts.get(str(after.phase), "InProgress")), after.message

    # --- reading it ---

    @property
    def status(self) -> JobStatus:
        return JobStatus.model_validate(self.object["status"], by_alias=True, by_name=False)

    @property
    def storage(self) -> Raw:
        return self.object["spec"]["storage"]

    @property
    def max_restarts(self) -> int:
        return self.object["spec"]["retry"]["maxRestarts"]

    @property
    def effective_batch_size(self) -> int:
        return self.object["spec"]["training"]["effectiveBatchSize"]

    def jobs_where(self, holds: Callable[[Raw], bool]) -> list[str]:
        return sorted(name for (kind, name), child in self.children.items() if kind == "Job" and holds(child))

    # --- what happens to it ---

    def edit(self, change: Callable[[Raw], None]) -> None:
        change(self.object["spec"])
        self.object["metadata"]["generation"] += 1
        self._touched()

    def terminate(self, kind: str, name: str) -> None:
        """Marked as being deleted while something still runs; gone where nothing does."""
        if kind == "Job" and any(pod["status"]["phase"] not in OVER for pod in self.pods_of.get(name, [])):
            self.children[kind, name]["metadata"]["deletionTimestamp"] = now_stamp()
        else:
            self.gone(kind, name)

    def gone(self, kind: str, name: str) -> None:
        self.children.pop((kind, name), None)
        if kind == "Job":
            self.pods_of.pop(name, None)

    def pod_appears(self, name: str) -> None:
        owner = self.children["Job", name]["metadata"]["uid"]
        pods = self.pods_of.setdefault(name, [])
        created = datetime.now(UTC) + timedelta(seconds=len(pods))
        pods.append(
            {
                "metadata": {"creationTimestamp": stamp(created), "ownerReferences": [{"uid": owner}]},
                "spec": {"nodeName": "node-1"},
                "status": {
                    "phase": "Running",
                    "startTime": now_stamp(),
                    "containerStatuses": [{"name": "stage", "state": {"running": {"startedAt": now_stamp()}}}],
                },
            }
        )

    def pod_is_replaced(self, name: str) -> None:
        """A disruption took it; the Job controller makes another."""
        self.pods_of[name][-1]["status"] = {"phase": "Failed"}
        self.pod_appears(name)

    def ends(self, name: str, how: str | int) -> None:
        job, task = self.children["Job", name], self.task_of(self.children["Job", name])
        if not self.pods_of.get(name):
            self.pod_appears(name)
        n = int(name.rpartition("-")[2])
        succeeded = isinstance(how, str) and "result" in how
        job["status"] = {
            "startTime": now_stamp(),
            "conditions": [
                {
                    "type": "Complete" if succeeded else "Failed",
                    "status": "True",
                    "lastTransitionTime": now_stamp(),
                }
            ],
        }
        killed = how in ("OOMKilled", "Unknown")
        terminated: Raw = {
            "exitCode": 0 if succeeded else 137 if killed else how,
            "finishedAt": now_stamp(),
            "startedAt": now_stamp(),
        }
        if how == "result":
            terminated["message"] = given.report(TASKS[task], n).to_json()
        elif killed:
            terminated["reason"] = how
        elif how in set(ExitCode):
            terminated["message"] = given.report(TASKS[task], n, failure="it says why").to_json()
        self.pods_of[name][-1]["status"] = {
            "phase": "Succeeded" if succeeded else "Failed",
            "containerStatuses": [{"name": "stage", "state": {"terminated": terminated}}],
        }
        if how in ("pod gone", "result, pod gone"):
            del self.pods_of[name]

    def age(self, seconds: int) -> None:
        """Time passes: everything that is noted happened `seconds` earlier."""

        def shifted(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: shifted(item) for key, item in value.items()}
            if isinstance(value, list):
                return [shifted(item) for item in value]
            if isinstance(value, str) and len(value) == 20 and value.endswith("Z"):
                return stamp(datetime.fromisoformat(value) - timedelta(seconds=seconds))
            return value

        self.object = shifted(self.object)
        self.children = {key: shifted(child) for key, child in self.children.items()}
        self.pods_of = {key: shifted(pods) for key, pods in self.pods_of.items()}


TASKS: dict[str, Task] = {task.name: task for task in tasks(given.job({"output.formats": given.BOTH}).spec)}


def ends(status: JobStatus) -> Counter[tuple[str, str | None]]:
    """How attempts have ended, by task and outcome: those that are listed, and those that are only counted."""
    found: Counter[tuple[str, str | None]] = Counter((named(a), a.outcome) for a in status.attempts if a.outcome)
    for older in status.older_attempts:
        found[named(older), older.outcome] += older.count
    return found


def named(attempt: Any) -> str:
    return attempt.stage + (f"-{attempt.artifact}" if attempt.artifact else "")


def verdict(job: Raw) -> bool:
    return bool(job.get("status", {}).get("conditions"))


def finished(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that never waits: nothing in this world takes time."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits for something outside the world")


class Story:
    """Passes of the operator, and what happens to its job meanwhile. An event takes a number, to choose by."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.world = World(given.document(spec))
        self.metrics = Metrics()  # of all the operators there will be
        self.operator = self.an_operator()
        for name in ("results", *(["scratch"] if "claimName" in self.world.storage else [])):
            claim: Raw = {"kind": "PersistentVolumeClaim", "metadata": {"name": name, "uid": f"their {name}"}}
            self.world.children["PersistentVolumeClaim", name] = claim

    def an_operator(self) -> Reconciler:
        reports, waiting = Heard(self.world), Waiting(WorkQueue())
        return Reconciler(self.world, SETTINGS, self.world.inventory, waiting, reports, metrics=self.metrics)

    def running(self) -> list[str]:
        return self.world.jobs_where(lambda job: not verdict(job) and not job["metadata"].get("deletionTimestamp"))

    def stopping(self) -> list[str]:
        return self.world.jobs_where(lambda job: "deletionTimestamp" in job["metadata"])

    def one_running(self, n: int) -> list[str]:
        """The n-th of the Jobs that run, if any."""
        running = self.running()
        return [running[n % len(running)]] if running else []

    def image_of(self, name: str) -> str:
        pod: Raw = self.world.children["Job", name]["spec"]["template"]["spec"]
        return pod["containers"][0]["image"]

    # --- the operator ---

    def a_pass(self) -> None:
        try:
            finished(self.operator(("team-a", given.NAME)))
        except ApiError as error:
            assert "not now" in str(error) or "being deleted" in str(error), error

    def passes(self, n: int) -> None:
        for _ in range(1 + n % 6):
            self.a_pass()

    def dies_in_a_pass(self, n: int) -> None:
        self.world.calls_until_death = n % 5
        try:
            self.a_pass()
        except Died:
            self.operator = self.an_operator()
        self.world.calls_until_death = None

    def is_refused_a_call(self, n: int) -> None:
        self.world.refuses = [403, 409, 500][n % 3]
        self.a_pass()
        self.world.refuses = None

    # --- the cluster ---

    def goes_well(self, n: int) -> None:
        """What can run runs, and ends with its result."""
        self.passes(5)  # record, plan, claim, note the claim, start
        for name in self.running():
            self.world.ends(name, "result")

    def a_pod_appears(self, n: int) -> None:
        for name in self.one_running(n):
            if not self.world.pods_of.get(name):
                self.world.pod_appears(name)

    def a_pod_is_disrupted(self, n: int) -> None:
        for name in self.one_running(n):
            if self.world.pods_of.get(name):
                self.world.pod_is_replaced(name)

    def a_job_ends(self, n: int) -> None:
        for name in self.one_running(n):
            how = CURABLE[n // 7 % len(CURABLE)]
            self.world.ends(name, 1 if how == 13 and "-train-" not in name else how)

    def a_trainer_reports(self, n: int) -> None:
        for name in self.running():
            if "-train-" in name and self.world.pods_of.get(name):
                numbers = {ProgressName.STEP: float(n % 12), ProgressName.STEPS: 12.0}
                self.world.reported = Reported(name, datetime.now(UTC), None, None, numbers)

    def is_interrupted_again_and_again(self, n: int) -> None:
        """More often than is listed, and by turns for another reason."""
        self.passes(3)
        for times in range(12 + n % 3):
            for name in self.one_running(0):
                self.world.ends(name, (14, "Unknown")[times % 2])
            self.a_pass()  # records it
            self.world.age(600)
            self.a_pass()  # starts the next

    def a_job_fails_for_good(self, n: int) -> None:
        for name in self.one_running(n):
            self.world.ends(name, [10, 11, 12, 13, 17][n // 7 % 5])

    def somebody_deletes_a_stage(self, n: int) -> None:
        for name in self.one_running(n):
            self.world.terminate("Job", name)

    def stopped_pods_are_gone(self, n: int) -> None:
        for name in self.stopping():
            self.world.gone("Job", name)

    def time_passes(self, n: int) -> None:
        self.world.age([1, 15, 600][n % 3])

    def gpus_come_and_go(self, n: int) -> None:
        self.world.inventory.put(given.gpu_node("node-1", *given.L40S, ready=n % 2 == 0))

    # --- the user ---

    def suspends_or_resumes(self, n: int) -> None:
        self.world.edit(lambda spec: spec.update(suspend=not spec.get("suspend")))

    def releases_the_plan(self, n: int) -> None:
        if self.world.object["spec"].get("planOnly"):
            self.world.edit(lambda spec: spec.update(planOnly=False))

    def edits_hardware(self, n: int) -> None:
        if self.world.object["spec"].get("suspend"):
            hardware = {"headroomPercent": [10, 15, 20][n % 3]}
            self.world.edit(lambda spec: spec.update(hardware=hardware, suspend=n % 2 == 0))

    def edits_pod_template(self, n: int) -> None:
        if self.world.object["spec"].get("suspend"):
            self.world.edit(lambda spec: spec.update(podTemplate={"image": f"trainer:{n % 3}"}, suspend=n % 2 == 0))

    # --- the end ---

    def come_to_an_end(self, deaths: int) -> None:
        """With a willing user and healthy GPUs, it ends; then nothing is left running, and all is quiet.

        Before each good pass the operator dies in one, after so many calls: `deaths` more each time.
        """
        world = self.world
        self.gpus_come_and_go(0)
        world.edit(lambda spec: spec.update(suspend=False, planOnly=False))
        for n in self.until_finished():
            self.dies_in_a_pass(n + deaths)
            self.a_pass()
            self.stopped_pods_are_gone(0)
            if any(c.type == "Stalled" and c.status == "True" for c in world.status.conditions):
                world.edit(lambda spec: spec.update(suspend=True))
                self.passes(2)
                world.edit(lambda spec: spec.update(suspend=False))
            for name in self.running():
                assert self.image_of(name) == world.object["spec"].get("podTemplate", {}).get("image", "trainer:1")
                world.ends(name, "result")
            world.age(600)
        for n in range(6):
            self.dies_in_a_pass(n + deaths)
            self.a_pass()
            self.stopped_pods_are_gone(0)
        assert [name for name in world.jobs_where(lambda job: True) if world.alive(name)] == []
        keeping = ("Keep", "OnFailure") if world.status.phase == "Failed" else ("Keep",)
        full = any(attempt.outcome == "VolumeFull" for attempt in world.status.attempts)
        if full and world.status.phase == "Failed":
            keeping = ("Keep", "OnFailure", "Delete")
        if "claimName" in world.storage:
            assert ("PersistentVolumeClaim", "scratch") in world.children, "the user's own claim is theirs"
        elif world.status.work_volume is not None:
            there = ("PersistentVolumeClaim", f"{given.NAME}-work") in world.children
            assert there == (world.storage["retain"] in keeping)
        recorded: Counter[tuple[str, str | None]] = Counter()
        for (task, outcome), count in ends(world.status).items():
            recorded[TASKS[task].stage, outcome] += count
        listed = {a.job for a in world.status.attempts}
        assert {name for kind, name in world.children if kind == "Job"} <= listed, "left of what is listed no longer"
        assert self.counted() == recorded, "an attempt is missing from the metrics, or counted twice"
        writes = world.writes
        self.a_pass()
        assert world.writes == writes, "a finished job is written again and again"

    def counted(self) -> dict[tuple[str, str], float]:
        """Ends of attempts in the metrics, by stage and outcome."""
        samples = [sample for family in self.metrics.registry.collect() for sample in family.samples]
        attempts = [sample for sample in samples if sample.name == ATTEMPTS.name and sample.value]
        return {(s.labels["stage"], s.labels["outcome"]): s.value for s in attempts}

    def until_finished(self) -> Iterator[int]:
        for n in range(80):
            if self.world.status.phase in OVER:
                return
            yield n
        raise AssertionError(f"it never ends: {self.world.status.phase}, {self.world.status.message}")


#: What can happen, and how often in comparison.
EVENTS: dict[Callable[[Story, int], None], int] = {
    Story.passes: 8,
    Story.goes_well: 2,
    Story.a_job_ends: 6,
    Story.dies_in_a_pass: 3,
    Story.time_passes: 3,
    Story.a_pod_appears: 2,
    Story.stopped_pods_are_gone: 2,
    Story.releases_the_plan: 2,
    Story.suspends_or_resumes: 1,
    Story.edits_hardware: 1,
    Story.edits_pod_template: 1,
    Story.is_refused_a_call: 1,
    Story.a_pod_is_disrupted: 1,
    Story.somebody_deletes_a_stage: 1,
    Story.gpus_come_and_go: 1,
    Story.a_job_fails_for_good: 1,
    Story.a_trainer_reports: 1,
    Story.is_interrupted_again_and_again: 1,
}
EVENT = st.sampled_from([event for event, weight in EVENTS.items() for _ in range(weight)])
SPECS = st.fixed_dictionaries(
    {
        "output.formats": st.sampled_from([["adapter"], ["merged"], given.BOTH]),
        "training.effectiveBatchSize": st.sampled_from([32, 12, 7]),
        "retry.maxRestarts": st.sampled_from([0, 2, 5]),
        "retry.onOutOfMemory": st.sampled_from(["halveMicroBatch", "halveMicroBatch", "fail"]),
        "storage": st.sampled_from([{"retain": "Delete"}, {"retain": "OnFailure"}, {"retain": "Keep"}, OWN_CLAIM]),
        "planOnly": st.sampled_from([False, False, True]),
        "suspend": st.sampled_from([False, False, True]),
    }
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@for_all(
    SPECS,
    st.sampled_from([0, 1, 1, 1, 2]),
    st.integers(0, 4),
    st.lists(st.tuples(EVENT, st.integers(0, 999)), min_size=15, max_size=50),
)
def test_no_work_is_lost_doubled_or_endless(
    spec: Mapping[str, Any], head_start: int, deaths: int, events: list[tuple[Callable[[Story, int], None], int]]
) -> None:
    story = Story(spec)
    for _ in range(head_start):
        story.goes_well(0)
    for happens, n in events:
        happens(story, n)
    story.come_to_an_end(deaths)


def test_an_edited_pod_template_reaches_an_inspection_that_suspending_does_not_stop() -> None:
    """Its image may be the very thing that is wrong: the pod would wait for ever."""
    story = Story({"storage": {"retain": "Delete"}, "retry": {"maxRestarts": 3}, "training.effectiveBatchSize": 32})
    story.passes(0)
    (inspect,) = story.running()
    story.a_pod_appears(0)
    story.suspends_or_resumes(0)
    story.passes(0)
    assert story.running() == [inspect]
    story.edits_pod_template(2)
    story.passes(0)
    assert story.stopping() == [inspect]
    story.stopped_pods_are_gone(0)
    story.passes(0)
    assert story.image_of(inspect) == "trainer:2"
    story.come_to_an_end(0)
