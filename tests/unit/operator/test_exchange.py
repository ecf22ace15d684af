"""What operator and trainer say to each other: nothing is lost on the way, and what cannot be read says why."""

from __future__ import annotations

import json
import warnings
from pathlib import PurePosixPath
from typing import Any, Literal

import pytest
from hypothesis import example
from hypothesis import given as for_all
from hypothesis import strategies as st

from qlora_api.exchange import (
    REPORT_MAX_BYTES,
    RESULT_OF,
    DataOrder,
    DataSource,
    InspectOrder,
    MergeOrder,
    Order,
    PublishOrder,
    Recipe,
    Report,
    Stage,
    TrainOrder,
    bucket_of,
    claim_of,
    failed,
    hub_repo_of,
    mounted_path,
    parse_order,
    parse_report,
    succeeded,
)
from tests.unit.operator import given

ENVELOPE: dict[str, Any] = {
    "namespace": "team-a",
    "job": "support-bot",
    "job_uid": given.UID,
    "attempt": 2,
    "work_dir": "/work/support-bot.1b9f7c52",
}
DATA = DataOrder(train=[DataSource(uri="pvc://data/train.jsonl", format="messages")], eval_fraction=0.1)
TRAIN_ORDER = TrainOrder(
    **ENVELOPE,
    model_uri="pvc://models/base",
    model_digest="sha256:model",
    data=DATA,
    data_digest="sha256:data",
    recipe=given.recipe(),
    micro_batch_size=8,
    gradient_accumulation=4,
    accelerator="nvidia",
    checkpoint_every_seconds=900,
    checkpoint_keep=2,
)
ORDERS: list[Order] = [
    InspectOrder(**ENVELOPE, model_uri="pvc://models/base", data=DATA),
    TRAIN_ORDER,
    MergeOrder(
        **ENVELOPE, model_uri="pvc://m/b", model_digest="sha256:m", recipe=given.recipe(), adapter_digest="sha256:a"
    ),
    PublishOrder(
        **ENVELOPE, artifact="merged", artifact_digest="sha256:x", output_uri="pvc://r/t/merged", provenance={"ü": [1]}
    ),
]


def changed(order: Order, **fields: Any) -> str:
    return json.dumps(json.loads(order.to_json()) | fields)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.stage)
def test_an_order_arrives_as_it_was_sent(order: Order) -> None:
    found = parse_order(order.to_json())
    assert found == order
    assert type(found) is type(order)
    assert found.to_json() == order.to_json()


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.stage)
def test_a_result_arrives_as_it_was_sent(order: Order) -> None:
    result = given.RESULTS[order.stage]
    report = parse_report(succeeded(order, result).fitted())
    assert (report.stage, report.attempt, report.job_uid) == (order.stage, 2, given.UID)
    assert RESULT_OF[order.stage].model_validate(report.result) == result
    assert parse_report(failed(order, "no CUDA").fitted()).failure == "no CUDA"


UNREADABLE = [
    pytest.param("", "not a JSON object", id="nothing"),
    pytest.param("{", "not a JSON object", id="half of it"),
    pytest.param("[]", "not a JSON object", id="a list"),
    pytest.param("3", "not a JSON object", id="a number"),
    pytest.param(changed(TRAIN_ORDER, version="v1beta1"), "use operator and trainer images of one release", id="newer"),
    pytest.param("{}", "the order has version None, this image reads 'v1alpha1'", id="no version"),
    pytest.param(changed(TRAIN_ORDER, stage="quantize"), "does not fit version v1alpha1", id="a stage of later"),
    pytest.param(changed(TRAIN_ORDER, surprise=1), "surprise", id="a field that this image would ignore"),
    pytest.param(changed(TRAIN_ORDER, microBatchSize=0), "microBatchSize", id="out of bounds"),
]


@pytest.mark.parametrize(("text", "says"), UNREADABLE)
def test_an_order_that_cannot_be_obeyed_says_why(text: str, says: str) -> None:
    with pytest.raises(ValueError, match="order") as refused:
        parse_order(text)
    assert says in str(refused.value)


@pytest.mark.parametrize("text", ["", "Killed", "{}", '{"version":"v9","stage":"train","attempt":1,"jobUid":"u"}'])
def test_what_is_no_report_is_not_taken_for_one(text: str) -> None:
    with pytest.raises(ValueError, match="not a report"):
        parse_report(text)


@pytest.mark.parametrize("stage", list(Stage))
def test_a_result_of_another_stage_is_no_result(stage: Stage) -> None:
    other = given.RESULTS[Stage.PUBLISH if stage is Stage.TRAIN else Stage.TRAIN]
    data = other.model_dump(mode="json", by_alias=True, exclude_none=True)
    text = Report(stage=stage, attempt=1, job_uid=given.UID, result=data).to_json()
    with pytest.raises(ValueError, match="not a report"):
        parse_report(text)


@for_all(st.text(max_size=20), st.integers(1, 600))
@example("日本", 200)  # under 4096 characters, and over 4096 bytes
@example("日本", 1000)
def test_every_failure_fits_the_termination_message(text: str, times: int) -> None:
    """The kubelet cuts at 4096 bytes, and half a JSON document is none."""
    failure = (text + 'ä日本🙂"\\\n\x00') * times
    report = failed(TRAIN_ORDER, failure)
    message = report.fitted()
    assert len(message.encode()) <= REPORT_MAX_BYTES
    found = parse_report(message).failure
    assert found is not None
    if len(report.to_json().encode()) <= REPORT_MAX_BYTES:
        assert found == failure
    else:
        assert found.endswith(" …")
        assert failure.startswith(found.removesuffix(" …"))
        assert len(message.encode()) > REPORT_MAX_BYTES // 2, "not more is cut than needed, by much"


def test_a_result_is_never_cut() -> None:
    big = succeeded(TRAIN_ORDER, given.RESULTS[Stage.TRAIN]).model_copy(update={"result": {"device": "x" * 5000}})
    with pytest.raises(ValueError, match="termination messages hold 4096"):
        big.fitted()


def test_numbers_that_json_does_not_know_are_refused() -> None:
    """A loss of NaN would make a report that the operator cannot read."""
    with pytest.raises(ValueError, match="finite"):
        given.RESULTS[Stage.TRAIN].model_validate(
            given.RESULTS[Stage.TRAIN].model_dump() | {"train_loss": float("nan")}
        )


# --- addresses ---

URIS = [
    ("pvc://models/llama/base", ("models", "llama/base"), "/claims/models/llama/base"),
    ("pvc://models/", ("models", ""), "/claims/models"),
    ("pvc://models", ("models", ""), "/claims/models"),
    ("pvc://my.claim/a..b/.hidden", ("my.claim", "a..b/.hidden"), "/claims/my.claim/a..b/.hidden"),
    ("pvc://models//etc/passwd", ("models", "etc/passwd"), "/claims/models/etc/passwd"),
]


@pytest.mark.parametrize(("uri", "parts", "path"), URIS)
def test_where_an_address_is_mounted(uri: str, parts: tuple[str, str], path: str) -> None:
    assert claim_of(uri) == parts
    assert mounted_path(uri) == PurePosixPath(path)


@pytest.mark.parametrize(
    "uri",
    ["", "models/base", "s3://bucket/key", "pvc://", "pvc:///x", "pvc://c/../../etc", "pvc://c/a/..", "pvc://../x"],
)
def test_what_is_no_address_of_a_claim_is_refused(uri: str) -> None:
    for reads in (claim_of, mounted_path):
        with pytest.raises(ValueError, match="expected pvc://<claim>/<path>"):
            reads(uri)


@for_all(st.text(alphabet="ab./", max_size=12))
def test_no_address_leads_out_of_its_claim(path: str) -> None:
    try:
        found = mounted_path(f"pvc://models/{path}")
    except ValueError:
        return
    assert found.is_relative_to("/claims/models")
    assert ".." not in found.parts


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("s3://models/base", ("models", "base")),
        ("s3://my.bucket/team/a..b/.hidden/", ("my.bucket", "team/a..b/.hidden")),
    ],
)
def test_where_in_which_bucket(uri: str, parts: tuple[str, str]) -> None:
    assert bucket_of(uri) == parts


@pytest.mark.parametrize(
    "uri", ["", "models/base", "pvc://claim/x", "s3://", "s3://bucket", "s3://bucket/", "s3:///x", "s3://b/../x", "s3://b/a//c"]
)  # fmt: skip
def test_what_is_no_address_in_a_bucket_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="expected s3://<bucket>/<path>"):
        bucket_of(uri)


@pytest.mark.parametrize(
    ("uri", "kind", "parts"),
    [
        ("hf://meta-llama/Llama-3.1-8B-Instruct", "model", ("meta-llama/Llama-3.1-8B-Instruct", "")),
        ("hf://team/chats/2026/train.jsonl", "dataset", ("team/chats", "2026/train.jsonl")),
        ("hf://team/chats/.hidden/a b/", "dataset", ("team/chats", ".hidden/a b")),
        ("hf://datasets/team/chats", "dataset", ("team/chats", "")),
        ("hf://datasets/team/chats/train.jsonl", "dataset", ("team/chats", "train.jsonl")),
        ("hf://models/team/base", "model", ("team/base", "")),
        ("hf://models/base", "model", ("models/base", "")),
        ("hf://datasets/team/chats", "model", ("datasets/team", "chats")),
    ],
)
def test_which_repository_of_the_hub(uri: str, kind: Literal["model", "dataset"], parts: tuple[str, str]) -> None:
    assert hub_repo_of(uri, kind) == parts


@pytest.mark.parametrize(
    "uri",
    [
        "", "team/base", "s3://team/base", "hf://", "hf://base", "hf://team/", "hf://team/base@v1", "hf://team/base/..",
        "hf://../base", "hf://team/base//a", "hf://team/base/./a", "hf://team/b\u00e4se", "hf://te am/base",
    ],
)  # fmt: skip
def test_what_is_no_repository_of_the_hub_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match=r"expected hf://<owner>/<name>, or .*goes into revision"):
        hub_repo_of(uri, "model")


@for_all(st.text(alphabet="ab./%@- ", max_size=16), st.sampled_from(["model", "dataset"]))
def test_no_address_leads_out_of_its_repository(rest: str, kind: Literal["model", "dataset"]) -> None:
    try:
        repo, path = hub_repo_of(f"hf://{rest}", kind)
    except ValueError:
        return
    assert f"hf://{rest}".rstrip("/") == "hf://" + "/".join(filter(None, (repo, path)))
    assert not {"", ".", ".."} & set(f"{repo}/{path or 'x'}".split("/"))


# --- what a checkpoint is bound to ---

MAY_CHANGE: dict[str, Any] = {
    "attempt": 3,
    "micro_batch_size": 1,
    "gradient_accumulation": 32,
    "accelerator": "cpu",
    "cpu_allowed": True,
    "checkpoint_every_seconds": 60,
    "checkpoint_keep": 9,
    "model_uri": "pvc://moved/base",
    "work_dir": "/work/elsewhere",
    "model_secret": "another",
    "model_revision": "0123abcd",  # the digest says which model it is
    "data": DATA.model_copy(
        update={"train": [DATA.train[0].model_copy(update={"secret": "another", "revision": "0123abcd"})]}
    ),
    "recipe": TRAIN_ORDER.recipe.model_copy(update={"offload": "activations", "gradient_checkpointing": False}),
}
MAY_NOT: dict[str, Any] = {
    "model_digest": "sha256:other",
    "data_digest": "sha256:other",
    "data": DATA.model_copy(update={"eval_fraction": 0.2}),
    "recipe": given.recipe(seed=43),
}


@pytest.mark.parametrize("field", MAY_CHANGE)
def test_a_checkpoint_survives_a_change_of(field: str) -> None:
    assert TRAIN_ORDER.model_copy(update={field: MAY_CHANGE[field]}).binding() == TRAIN_ORDER.binding()


def test_the_binding_of_an_order_stays_what_it_was() -> None:
    """The digest of this very order. A change here takes every training on its way its checkpoints: add fields of the
    recipe with a default that means what was done before, and they bind nobody who does not use them."""
    assert TRAIN_ORDER.binding() == "sha256:8c5214387181d993d6d267bf143f8a9141cf33bf366739a880558b918794def7"


def test_what_differs_can_be_named() -> None:
    """Each bound fact has a name that a user knows from the spec or from the plan."""
    bound = TRAIN_ORDER.bound()
    assert (bound["model"], bound["dataset"]) == (TRAIN_ORDER.model_digest, TRAIN_ORDER.data_digest)
    assert bound["dataset.train[0].uri"] == DATA.train[0].uri
    assert bound["recipe.rank"] == 16
    assert "recipe.rslora" not in bound, "at its default"


@pytest.mark.parametrize("field", MAY_NOT)
def test_a_checkpoint_is_not_taken_for_one_of_another(field: str) -> None:
    assert TRAIN_ORDER.model_copy(update={field: MAY_NOT[field]}).binding() != TRAIN_ORDER.binding()


def test_every_field_of_the_recipe_binds_but_what_is_kept_where() -> None:
    order = TRAIN_ORDER.model_copy(update={"recipe": given.recipe(max_steps=5)})
    # where a tensor lies, or that it is computed twice, changes nothing of what is learned
    for name in Recipe.model_fields.keys() - {"offload", "gradient_checkpointing"}:
        recipe = order.recipe.model_copy(update={name: "something else"})
        with warnings.catch_warnings():  # it is dumped, not validated: any other value will do
            warnings.simplefilter("ignore", UserWarning)
            assert order.model_copy(update={"recipe": recipe}).binding() != order.binding(), name


# --- the number of steps, which plan and trainer must agree on ---

STEPS = [
    # sequences, effective batch, epochs, max steps, steps
    (1000, 32, 3.0, None, 96),
    (32, 32, 1.0, None, 1),
    (33, 32, 1.0, None, 2),
    (1, 32, 0.1, None, 1),
    (1000, 32, None, 7, 7),
]


@pytest.mark.parametrize(("sequences", "batch", "epochs", "max_steps", "expected"), STEPS)
def test_steps(sequences: int, batch: int, epochs: float | None, max_steps: int | None, expected: int) -> None:
    recipe = given.recipe(effective_batch_size=batch, epochs=epochs, max_steps=max_steps)
    assert recipe.steps(sequences) == expected
