"""What of all that the watches and the lists tell makes the operator look at a job."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from qlora_operator.news import News

Raw = dict[str, Any]

KEY = ("team-a", "support-bot")


def thing(uid: str, *, name: str = "support-bot", **parts: Any) -> Raw:
    metadata = {"uid": uid, "namespace": "team-a", "name": name, "labels": {"qlora.dev/job": name}}
    return {"metadata": metadata | parts.pop("metadata", {}), **parts}


def listed(news: News, kind: str, *things: Raw, breaks: bool = False) -> set[tuple[str, str]]:
    concerned: set[tuple[str, str]] = set()

    async def pages() -> AsyncIterator[Raw]:
        for one in things:
            yield one
        if breaks:
            raise TimeoutError

    with contextlib.suppress(TimeoutError):
        asyncio.run(news.hear_all(kind, pages(), concerned))
    return concerned


def test_a_job_is_news_when_its_spec_changes_or_it_is_deleted_and_not_when_we_write_its_status() -> None:
    news = News()
    first = thing("1", metadata={"generation": 1})
    assert news.hear("QLoRAJob", first) == KEY
    assert news.hear("QLoRAJob", first | {"status": {"phase": "Inspecting"}}) is None
    assert news.hear("QLoRAJob", thing("1", metadata={"generation": 2})) == KEY
    assert news.hear("QLoRAJob", thing("1", metadata={"generation": 2, "deletionTimestamp": "now"})) == KEY
    assert news.hear("QLoRAJob", thing("2", metadata={"generation": 2})) == KEY  # another one of that name


def test_of_jobs_that_are_over_only_those_are_news_for_which_something_is_left_to_do() -> None:
    def first_heard(spec: Raw, generation: int = 1, **status: Any) -> bool:
        over = {"phase": "Succeeded", "observedGeneration": 1, **status}
        job = thing("1", metadata={"generation": generation}, spec=spec, status=over)
        return News().hear("QLoRAJob", job) is not None

    assert not first_heard({}, workVolume={"retained": False})
    assert not first_heard({"ttlSecondsAfterFinished": 60}, cleanupTime="now")
    assert first_heard({}, workVolume={"retained": True})
    assert first_heard({"ttlSecondsAfterFinished": 60})
    assert first_heard({}, generation=2)
    assert first_heard({}, phase="Training")
    news, over = News(), {"phase": "Failed", "observedGeneration": 1}
    assert news.hear("QLoRAJob", thing("1", metadata={"generation": 1}, spec={}, status=over)) is None
    assert news.hear("QLoRAJob", thing("1", metadata={"generation": 2}, spec={}, status=over)) == KEY


def test_a_stage_is_news_once_it_has_a_verdict_or_is_gone_and_not_when_we_have_created_it() -> None:
    news = News()
    assert news.hear("Job", thing("1")) is None
    assert news.hear("Job", thing("1", status={"active": 1})) is None
    complete = thing("1", status={"conditions": [{"type": "Complete", "status": "True"}]})
    assert news.hear("Job", complete) == KEY
    assert news.hear("Job", complete) is None
    assert news.hear("Job", thing("2", status=complete["status"])) == KEY  # ended before it was first heard of
    assert news.hear_the_end("Job", complete) == KEY


def test_a_pod_is_news_when_where_it_is_or_why_it_waits_changes() -> None:
    news = News()
    waits = {"phase": "Pending", "containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]}
    refused = {"phase": "Pending", "containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff"}}}]}
    assert news.hear("Pod", thing("1", spec={})) == KEY
    assert news.hear("Pod", thing("1", spec={"nodeName": "node-1"}, status=waits)) == KEY
    assert news.hear("Pod", thing("1", spec={"nodeName": "node-1"}, status=waits | {"hostIP": "10.0.0.1"})) is None
    assert news.hear("Pod", thing("1", spec={"nodeName": "node-1"}, status=refused)) == KEY


def test_a_list_tells_what_a_watch_has_missed_and_nothing_else() -> None:
    news = News()
    kept, lost = thing("1"), thing("2", name="other")
    assert listed(news, "QLoRAJob", kept, lost) == {KEY, ("team-a", "other")}
    assert listed(news, "QLoRAJob", kept, lost) == set()
    assert listed(news, "QLoRAJob", kept) == {("team-a", "other")}  # deleted, and no event said so
    assert listed(news, "QLoRAJob", kept) == set()
    assert listed(news, "QLoRAJob", thing("1", metadata={"generation": 2})) == {KEY}
    assert listed(news, "Job", thing("3", status={"conditions": [{"type": "Failed", "status": "True"}]})) == {KEY}


def test_a_list_that_breaks_off_loses_nothing_and_takes_nothing_for_gone() -> None:
    news = News()
    assert listed(news, "QLoRAJob", thing("1"), breaks=True) == {KEY}
    assert listed(news, "QLoRAJob", breaks=True) == set()
    assert listed(news, "QLoRAJob", thing("1")) == set()
