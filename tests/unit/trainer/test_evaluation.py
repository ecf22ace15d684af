"""Trainings that are looked at on their way: the best adapter leaves, what does not gain ends, what is bad stays."""

from __future__ import annotations

import json
import weakref
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_api.exchange import DataSource, EvaluationOrder, ExitCode, GateOrder, JudgeOrder, Score, TrainResult
from qlora_trainer import examination, training
from qlora_trainer.artifacts import directory_digest
from qlora_trainer.checkpoint import Progress
from qlora_trainer.environment import Pod
from qlora_trainer.examination import SLICE, KnownAnswers, Sample
from qlora_trainer.failures import GateFailed, Interrupted, describe
from qlora_trainer.formats import parse_line
from qlora_trainer.inspection import inspect
from qlora_trainer.model import open_base
from qlora_trainer.prepared import Rows, directory_of, open_prepared
from qlora_trainer.report_page import page, write_report
from qlora_trainer.selection import Selection
from qlora_trainer.sequences import NO_LOSS, Sequence
from qlora_trainer.training import train

from .conftest import THINGS, Place, chat, examples, recipe_of, write_jsonl
from .test_judging import Endpoint, endpoint, judge_at
from .test_training import InterruptedAfter

__all__ = ["endpoint"]  # a fixture


def newest(place: Place, file: str = "adapter.safetensors") -> Path:
    return sorted(place.work.glob("checkpoints/*/step-*"))[-1] / file


def progress_of(place: Place) -> dict[str, Any]:
    return json.loads(newest(place, "progress.json").read_text())


def test_what_is_held_out_is_read_a_batch_at_a_time(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Callable[[Rows, int], Sequence] = Rows.__getitem__
    held, most, reads = 0, 0, 0

    def forgotten() -> None:
        nonlocal held
        held -= 1

    def counted(rows: Rows, index: int) -> Sequence:
        nonlocal held, most, reads
        row = read(rows, index)
        held, reads = held + 1, reads + 1
        most = max(most, held)
        weakref.finalize(row, forgotten)
        return row

    monkeypatch.setattr(Rows, "__getitem__", counted)
    order = place.train_order(
        place.data(eval_fraction=0.5), {"packing": False, "max_steps": 1},
        evaluation=EvaluationOrder(metrics=["perplexity"]),
    )  # fmt: skip
    train(order, place.pod)
    rows = open_prepared(directory_of(order))
    assert reads >= order.recipe.effective_batch_size + len(rows.eval) + len(rows.golden_rows)
    assert most <= order.recipe.effective_batch_size + 2 * order.micro_batch_size < len(rows.golden_rows)
    assert len(rows.golden_rows) < len(rows.eval)


def unlearnable(place: Place) -> dict[str, Any]:
    """Data whose held-out answers contradict what is learned: the held-out loss gets worse from some step on."""
    wrong = [chat(f"What is a {thing}?", "a thing that nobody knows") for thing in THINGS]
    write_jsonl(place.claims / "data" / "eval.jsonl", wrong)
    recipe = {"max_steps": None, "epochs": 12.0, "best_metric": "evalLoss", "early_stopping_epochs": 1}
    return {"data": place.data(golden=None, eval=DataSource(uri="pvc://data/eval.jsonl")), "recipe": recipe}


def test_a_training_that_gains_no_more_ends_and_its_best_adapter_leaves(place: Place) -> None:
    order = place.train_order(**unlearnable(place))
    result = train(order, place.pod)
    looks = progress_of(place)["looks"]
    best = min(looks, key=lambda look: look["evalLoss"])
    assert result.stopped_early
    assert result.steps < order.recipe.steps(8), "or the data is too easy for this test"
    assert result.selected_step == best["step"] < result.steps == looks[-1]["step"] == best["step"] + 2
    assert result.eval_loss == best["evalLoss"]

    left = load_file(place.work / "adapter" / "adapter_model.safetensors")
    kept, last = (load_file(file) for file in (place.work / "best" / "adapter.safetensors", newest(place)))
    assert left.keys() == kept.keys() == last.keys()
    assert all(torch.equal(left[name], kept[name]) for name in kept)
    assert not all(torch.equal(left[name], last[name]) for name in last)

    assert train(order.model_copy(update={"attempt": 2}), place.pod) == result, "it is not done again"
    (place.work / "adapter" / "adapter_config.json").write_text("{}")
    again = train(order, place.pod)  # from the last checkpoint, which notes that it has ended
    assert (again.adapter_digest, again.resumed_from_step) == (result.adapter_digest, result.steps)
    assert (again.steps, again.selected_step) == (result.steps, result.selected_step)


def test_an_interruption_changes_nothing_of_what_is_selected(place: Place) -> None:
    order = place.train_order(**unlearnable(place))
    whole = train(order, place.pod)
    stopped_at = whole.steps - 1  # after the best step, before the end
    for file in ("results/train.json", "adapter/adapter_config.json", "best/selection.json"):
        (place.work / file).unlink()
    for checkpoint in place.work.glob("checkpoints/*/*/manifest.json"):
        checkpoint.unlink()
    with pytest.raises(Interrupted, match=f"at step {stopped_at} of"):
        train(order, Pod(InterruptedAfter(3 * stopped_at + 1), place.pod.claims))
    assert (place.work / "best" / "selection.json").is_file()
    resumed = train(order, place.pod)
    assert resumed.resumed_from_step == stopped_at
    assert (resumed.adapter_digest, resumed.steps) == (whole.adapter_digest, whole.steps)
    assert resumed.selected_step == whole.selected_step


def test_the_best_by_a_golden_metric_leaves(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the golden set is asked at each evaluation for it, base and tuned model once more at the end."""
    given: Callable[..., list[str]] = examination.answers_to
    asked: list[int] = []

    def right_at_the_second_look(model: Any, tokenizer: Any, of: list[Any], *rest: Any) -> list[str]:
        asked.append(len(of))
        if len(asked) == 2:
            return [example.expected for example in of]
        return ["" for _ in given(model, tokenizer, of[:1], *rest) for _ in of]

    monkeypatch.setattr(examination, "answers_to", right_at_the_second_look)
    result = train(place.train_order(recipe={"best_metric": "exactMatch", "evals_per_epoch": 1}), place.pod)
    looks = progress_of(place)["looks"]
    assert [look["exactMatch"] for look in looks] == [0.0, 1.0, 0.0]
    assert result.selected_step == looks[1]["step"] == 4
    assert len(asked) == len(looks) + 2
    assert not result.stopped_early


def test_the_same_few_examples_are_looked_at_wherever_they_stand(place: Place) -> None:
    tokenizer = open_base(place.claims / "base" / "model", "x").tokenizer
    rows = [parse_line(json.dumps(example).encode(), None)[0] for example in examples()]
    known, turned = (KnownAnswers.of("", each, tokenizer, 128) for each in (rows, rows[::-1]))
    few = known.slice(tokenizer, 128)
    assert len(rows) > len(few.examples) == len(few.rows) == SLICE
    assert few.examples == turned.slice(tokenizer, 128).examples
    row = KnownAnswers.of("", rows[:1], tokenizer, 128).rows[0]
    carrying = [token for token, label in zip(row.ids, row.labels, strict=True) if label != NO_LOSS]
    assert tokenizer.decode(carrying).strip() == "bird<|end|>", "the answer and its end, nothing of the question"


def selection(place: Place, progress: Progress, *, binding: str = "sha256:1", patience: int | None = 1) -> Selection:
    return Selection(
        recipe_of(best_metric="evalLoss", early_stopping_epochs=patience),
        progress,
        place.work / "best",
        binding=binding,
        steps_per_epoch=2,
        weights=lambda: {"a": torch.full((2,), float(progress.step))},
    )


def test_a_best_adapter_newer_than_the_checkpoint_is_not_lost(place: Place) -> None:
    """Killed between an evaluation and the checkpoint: the steps are done again, and the adapter stays."""
    progress = Progress(step=4)
    assert selection(place, progress).looked(progress, 1.0) == "go on"
    behind = Progress(step=2, best_step=2, best_value=2.0)
    watch = selection(place, behind)
    assert (behind.best_step, behind.best_value) == (4, 1.0)
    assert watch.looked(behind, 1.5) == "go on"

    other = Progress(step=2)
    selection(place, other, binding="sha256:2")
    assert other.best_step is None, "that of another training is none"
    (place.work / "best" / "adapter.safetensors").write_bytes(b"torn")
    damaged = Progress(step=4, best_step=4, best_value=1.0)
    selection(place, damaged)
    assert damaged.best_step is None


def test_a_gate_that_does_not_hold_keeps_the_adapter_here(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(place.claims / "data" / "canary.jsonl", examples()[:6])
    gates = [GateOrder(metric="exactMatch", min=1.0), GateOrder(metric="canary.perplexity", max_drop_from_base=1e9)]
    asked = EvaluationOrder(metrics=["exactMatch", "tokenF1", "rougeL", "perplexity", "jsonSchema"], answer_schema="{}",
                            gates=gates)  # fmt: skip
    data = place.data(canary=DataSource(uri="pvc://data/canary.jsonl"), eval_fraction=0.1)
    assert inspect(place.inspect_order(data), place.pod).canary_examples == 6
    assert inspect(place.inspect_order(data), place.pod).leakage >= 5
    order = place.train_order(data, {"max_steps": 4}, evaluation=asked)
    with pytest.raises(
        GateFailed, match=r"evaluation\.gates: exactMatch is to be at least 1 and is 0; nothing is"
    ) as e:
        train(order, place.pod)
    assert describe(e.value)[0] == ExitCode.GATE_FAILED
    result = e.value.result
    assert [verdict.passed for verdict in result.gates] == [False, True]
    assert directory_digest(place.work / "adapter") == result.adapter_digest
    scores = {score.metric: score for score in result.scores}
    assert scores.keys() == {*asked.metrics, "canary.exactMatch", "canary.perplexity"}
    assert scores["perplexity"].tuned < scores["perplexity"].base
    assert (scores["exactMatch"].examples, scores["canary.perplexity"].examples) == (12, 6)
    assert {"evalLoss", "perplexity", "canary.perplexity"} < progress_of(place)["looks"][-1].keys()

    with pytest.raises(GateFailed) as again:
        train(order.model_copy(update={"attempt": 2}), place.pod)
    assert again.value.result == result, "an attempt that finds the result does not pass either"

    report = json.loads((place.work / "report" / "evaluation.json").read_text())
    assert report["result"]["gates"] == [verdict.model_dump(mode="json", by_alias=True) for verdict in result.gates]
    assert len(report["losses"]) == 4
    samples = [sample for sample in report["samples"] if sample["set"] == "golden"]
    assert {sample["expected"] for sample in samples} == {"bird", "fish", "rock", "tree", "flower"}
    assert samples[0]["prompt"] == "user: And a sparrow, what is that?"
    assert len(report["samples"]) == 12 + 6
    ET.parse(place.work / "report" / "evaluation.html")


def test_the_judge_has_its_say_and_one_that_fails_is_left_out(
    place: Place, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training, "open_judge", lambda order, seed, pod: replace(judge_at(order.endpoint), seed=seed))
    asked = EvaluationOrder(judge=JudgeOrder(endpoint=endpoint.url, model="big"))
    endpoint.reply = lambda prompt: (200, "no idea" if "robin" in prompt else "Grade: 2")
    order = place.train_order(recipe={"max_steps": 1}, evaluation=asked)
    result = train(order, place.pod)
    assert result.scores[-1] == Score(metric="judge", base=2, tuned=2, examples=11)
    assert {body["seed"] for _, _, body in endpoint.requests} == {7}
    assert "1 of 12 answers got no mark" in caplog.text

    (place.work / "results" / "train.json").unlink()
    endpoint.reply = lambda prompt: (403, None)
    assert [score.metric for score in train(order, place.pod).scores] == ["exactMatch"]
    assert "evaluation.judge: no marks:" in caplog.text


def test_the_page_is_whole_shows_the_curves_and_escapes_what_was_answered(place: Place) -> None:
    order = place.train_order(recipe={"max_steps": 2})
    result = TrainResult(
        adapter_digest="sha256:0", adapter_bytes=1, steps=3000, epochs=1, train_loss=1, tokens=1, tokens_per_second=1,
        seconds=1, device="cpu", peak_memory_bytes=1, selected_step=2, stopped_early=True,
        scores=[Score(metric="exactMatch", base=0.1, tuned=0.25, examples=4)],
    )  # fmt: skip
    progress = Progress(step=3000, losses=[3.0, float("nan"), *[2.0] * 2998], eval_losses=[(2, 2.5), (3000, 2.25)])
    progress.looks = [{"step": 2, "perplexity": 9.0}, {"step": 3000, "perplexity": float("inf")}]
    samples = [Sample("golden", "<script>alert(1)</script>\x00", "a & b", "]]>", '"holds"')] * 60
    written = page(order, result, progress, samples)
    root = ET.fromstring(written.partition("\n")[2])
    name = "{http://www.w3.org/1999/xhtml}"
    svg = "{http://www.w3.org/2000/svg}"
    assert not list(root.iter(f"{name}script")), "nothing that was answered becomes a part of the page"
    cells = ["".join(cell.itertext()) for cell in root.iter(f"{name}td")]
    assert cells.count("<script>alert(1)</script>\ufffd") == 50
    assert {"exactMatch", "0.1", "0.25"} <= set(cells)
    lines = [line.get("points", "").split() for line in root.iter(f"{svg}polyline")]
    assert [len(points) for points in lines] == [600, 2], "the training loss thinned out, and the held-out loss"
    assert len(list(root.iter(f"{svg}circle"))) == 1, "of the perplexities one is a number"
    assert "http" not in written.replace("http://www.w3.org/", "")
    write_report(place.root / "report", order, result, progress, samples)
    told = json.loads((place.root / "report" / "evaluation.json").read_text())
    assert told["losses"][:3] == [3.0, None, 2.0]
    assert len(told["samples"]) == 60
