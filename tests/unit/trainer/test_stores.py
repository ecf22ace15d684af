"""Models, data and output in a real S3 server with a certificate of its own, and all that can go wrong there."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file

from qlora_api.exchange import DataOrder, DataSource, ExitCode, PublishOrder
from qlora_trainer import inputs, stores
from qlora_trainer.artifacts import digests_of, directory_digest, file_digest
from qlora_trainer.environment import Pod
from qlora_trainer.failures import BadInput, Interrupted, StageError, Unavailable, describe
from qlora_trainer.inspection import inspect
from qlora_trainer.interruption import Interruption
from qlora_trainer.merge import merge
from qlora_trainer.publish import MANIFEST_NAME, publish
from qlora_trainer.training import train
from tests.cluster.s3 import S3, serving

from .conftest import Place
from .test_main import finish, start

SECRET = "store"
MODEL = "s3://models/team/base"
DATA = DataOrder(
    train=[DataSource(uri="s3://data/train.jsonl", secret=SECRET)],
    golden=DataSource(uri="s3://data/held-out", secret=SECRET),
)
OUTPUT = "s3://results/tune/merged"
MIB = 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with serving(tmp_path_factory.mktemp("s3") / "server") as server:
        yield server


class Shop(NamedTuple):
    """The job's place, whose model, data and results are in buckets of a server."""

    place: Place
    server: S3

    @property
    def pod(self) -> Pod:
        claims, credentials = str(self.place.claims), str(self.place.root / "credentials")
        return Pod(Interruption(), claims, credentials=credentials)

    def secret(self, name: str = SECRET, /, **changes: str | None) -> None:
        """Write the Secret as the kubelet mounts it."""
        directory = self.place.root / "credentials" / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        for key, value in self.server.secret(**changes).items():
            (directory / key).write_text(value + "\n")

    def bucket(self, name: str) -> Path:
        return self.server.buckets / name

    def published(self) -> Path:
        return self.bucket("results") / "tune" / "merged"

    def uploads_left(self) -> list[Path]:
        """Parts of uploads that were neither completed nor aborted."""
        return [path for path in (self.bucket("results") / ".sgwtmp").rglob("*") if path.is_file()]


@pytest.fixture
def shop(place: Place, server: S3) -> Iterator[Shop]:
    shop = Shop(place, server)
    shop.secret()
    for bucket in ("models", "data", "results"):
        server.create_bucket(bucket)
    server.put_directory(place.claims / "base" / "model", "models", "team/base")
    server.store("data").put("train.jsonl", place.claims / "data" / "train.jsonl")
    server.store("data").put("held-out/golden.jsonl", place.claims / "data" / "golden.jsonl")
    server.store("data").put("held-out/README.md", b"not data")
    yield shop
    for bucket in ("models", "data", "results"):
        shutil.rmtree(server.buckets / bucket)


def in_store(**changes: Any) -> dict[str, Any]:
    return {"model_uri": MODEL, "model_secret": SECRET, **changes}


# --- what is read ---


def test_inspection_sees_in_a_store_what_it_sees_on_a_claim(shop: Shop) -> None:
    from_claims = inspect(shop.place.inspect_order(), shop.pod)
    found = inspect(shop.place.inspect_order(DATA, **in_store()), shop.pod)
    for name in type(found).model_fields.keys() - {"model_digest", "download_bytes", "data_digest"}:
        assert getattr(found, name) == getattr(from_claims, name), name
    model = [path for path in shop.bucket("models").rglob("*") if path.is_file() and ".sgwtmp" not in path.parts]
    data = [shop.bucket("data") / "train.jsonl", shop.bucket("data") / "held-out" / "golden.jsonl"]
    assert found.download_bytes == sum(path.stat().st_size for path in (*model, *data))
    assert from_claims.download_bytes == 0


def test_inspection_reads_no_weights(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "FIRST_BYTES", 64)  # less than a header: the rest of it takes a second request
    inspect(shop.place.inspect_order(DATA, **in_store()), shop.pod)
    shards = sorted((shop.place.work / "inputs" / "model").glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        whole = (shop.bucket("models") / "team" / "base" / shard.name).read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        found = shard.read_bytes()
        assert len(found) == len(whole)
        assert found[:header] == whole[:header]
        assert not any(found[header:])


def test_from_store_to_store_learns_what_from_claim_to_claim_does(shop: Shop) -> None:
    claims = train(shop.place.train_order(recipe={"max_steps": 2}), shop.pod)
    on_claims = load_file(shop.place.work / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(shop.place.work)

    seen = inspect(shop.place.inspect_order(DATA, **in_store()), shop.pod)
    order = shop.place.train_order(recipe={"max_steps": 2}).model_copy(
        update=in_store(model_digest=seen.model_digest, data=DATA, data_digest=seen.data_digest)
    )
    result = train(order, shop.pod)
    assert result.train_loss == claims.train_loss
    adapter = load_file(shop.place.work / "adapter" / "adapter_model.safetensors")
    assert all((adapter[name] == weight).all() for name, weight in on_claims.items())
    again = order.model_copy(update={"model_secret": "another", "attempt": 2})
    assert train(again, shop.pod) == result, "which Secret is used decides nothing"

    shop.server.stop()  # what train has downloaded, merge finds
    try:
        merged = merge(shop.place.merge_order(order, result.adapter_digest, model_secret=SECRET), shop.pod)
    finally:
        shop.server.start()
    assert publish(publish_order(shop), shop.pod).uri == OUTPUT
    published = digests_of(shop.published())
    manifest = json.loads((shop.published() / MANIFEST_NAME).read_text())
    assert manifest["digest"] == merged.digest
    assert {name: entry["digest"] for name, entry in manifest["files"].items()} | {
        MANIFEST_NAME: published[MANIFEST_NAME]
    } == published
    assert ".qlora-download.json" not in published


def test_another_model_of_the_same_shapes_is_noticed(shop: Shop) -> None:
    seen = inspect(shop.place.inspect_order(DATA, **in_store()), shop.pod)
    order = shop.place.train_order().model_copy(
        update=in_store(model_digest=seen.model_digest, data=DATA, data_digest=seen.data_digest)
    )
    shutil.rmtree(shop.place.work)
    shard = min((shop.bucket("models") / "team" / "base").glob("*.safetensors"))
    changed = shard.read_bytes()[:-1] + b"!"
    shop.server.store("models").put(f"team/base/{shard.name}", changed)
    with pytest.raises(BadInput, match=r"model\.uri: s3://models/team/base has changed since inspection"):
        train(order, shop.pod)


def test_data_that_changed_is_noticed(shop: Shop) -> None:
    seen = inspect(shop.place.inspect_order(DATA, **in_store()), shop.pod)
    order = shop.place.train_order().model_copy(
        update=in_store(model_digest=seen.model_digest, data=DATA, data_digest=seen.data_digest)
    )
    shutil.rmtree(shop.place.work)
    text = shop.bucket("data").joinpath("train.jsonl").read_bytes()
    shop.server.store("data").put("train.jsonl", text + text.splitlines(keepends=True)[0])
    with pytest.raises(BadInput, match="the data has changed since inspection"):
        train(order, shop.pod)


def test_a_download_that_was_cut_short_goes_on_where_it_was(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "CHUNK_BYTES", 4096)
    seen = inspect(shop.place.inspect_order(DATA, **in_store()), shop.pod)
    shutil.rmtree(shop.place.work)
    order = shop.place.merge_order(shop.place.train_order(), "sha256:a", **in_store(model_digest=seen.model_digest))
    directory = shop.place.work / "inputs" / "model"

    whole: Callable[..., Iterator[Any]] = stores.Store.chunks
    begun: list[str] = []

    def dies_in_the_second_shard(store: stores.Store, wanted: stores.Object) -> Iterator[Any]:
        begun.append(wanted.key)
        for number, chunk in enumerate(whole(store, wanted)):
            if number == 1 and sum(key.endswith(".safetensors") for key in begun) == 2:
                raise Interrupted("killed")
            yield chunk

    monkeypatch.setattr(stores.Store, "chunks", dies_in_the_second_shard)
    with pytest.raises(Interrupted):
        inputs.with_inputs(order, shop.pod)
    first = {path.name: path.stat().st_mtime_ns for path in directory.iterdir() if path.name in _done(directory)}
    assert sum(name.endswith(".safetensors") for name in first) == 1

    begun.clear()
    monkeypatch.setattr(stores.Store, "chunks", lambda store, wanted: begun.append(wanted.key) or whole(store, wanted))
    inputs.with_inputs(order, shop.pod)
    assert all(not key.endswith(tuple(first)) for key in begun)
    for name, moment in first.items():
        assert (directory / name).stat().st_mtime_ns == moment, name
    for path in (shop.place.claims / "base" / "model").iterdir():
        assert file_digest(directory / path.name) == file_digest(path)

    # what was whole once and is not any more is brought again, and only that
    damaged = directory / min(name for name in first if name.endswith(".safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    begun.clear()
    inputs.with_inputs(order, shop.pod)
    assert [key.rpartition("/")[2] for key in begun] == [damaged.name]


def _done(directory: Path) -> set[str]:
    record = inputs.read_record(directory)
    return {name for name, file in record.files.items() if file.digest} if record else set()


def test_a_model_that_does_not_fit_the_volume_is_said_before_it_is_downloaded(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = inspect(shop.place.inspect_order(DATA, **in_store()), shop.pod)
    order = shop.place.merge_order(shop.place.train_order(), "sha256:a", **in_store(model_digest=seen.model_digest))
    free = shutil.disk_usage(shop.place.root)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(
        BadInput, match=r"model\.uri: s3://models/team/base takes .* GiB and the work volume has 0\.00 G"
    ):
        inputs.with_inputs(order, shop.pod)


def test_data_that_would_get_the_pod_evicted_is_refused(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    train_bytes = (shop.bucket("data") / "train.jsonl").stat().st_size
    monkeypatch.setattr(inputs, "SCRATCH_DATA_BYTES", train_bytes + 10)
    with pytest.raises(
        BadInput, match=r"evaluation\.golden\.uri: s3://data/held-out is .* GiB, and inspect has room for"
    ):
        inspect(shop.place.inspect_order(DATA, **in_store()), shop.pod)
    assert not (shop.place.work / "inputs" / "evaluation-golden").exists()


@pytest.mark.parametrize(
    ("keys", "uri", "says"),
    [
        (["only.bin"], "s3://models/team/pickled", "has only pickled weights (only.bin), which can run code"),
        (["model.safetensors"], "s3://models/team/no-config", "has no config.json"),
        (["x"], "s3://models/team/bass", "there is no directory s3://models/team/bass at https://127.0.0.1"),
    ],
)
def test_a_model_that_cannot_work_is_refused_as_on_a_claim(shop: Shop, keys: list[str], uri: str, says: str) -> None:
    place = uri.removeprefix("s3://models/") if "bass" not in uri else "team/other"
    for key in keys:
        shop.server.store("models").put(f"{place}/{key}", b"x")
    if "pickled" in uri:
        for path in (shop.place.claims / "base" / "model").glob("*.json"):
            if "index" not in path.name:
                shop.server.store("models").put(f"{place}/{path.name}", path)
    with pytest.raises(BadInput) as refused:
        inspect(shop.place.inspect_order(DATA, **in_store(model_uri=uri)), shop.pod)
    assert says in str(refused.value)
    if "bass" in uri:
        assert str(refused.value).endswith("; beside it: base, other")


# --- what can go wrong ---


class Wrong(NamedTuple):
    """What is wrong, how it ends, and what the message says of it."""

    secret: dict[str, str | None] | None
    order: dict[str, Any]
    kind: type[StageError]
    says: tuple[str, ...]


WRONG = {
    "secret key": Wrong(
        {"secretKey": "not-the-secret"},
        {},
        BadInput,
        ("model.uri: https://127.0.0.1:", "does not know the credentials of Secret store", "SignatureDoesNotMatch",
         "bucket models", "check accessKey and secretKey"),
    ),
    "access key": Wrong(
        {"accessKey": "nobody"}, {}, BadInput, ("does not know the credentials of Secret store", "check accessKey")
    ),
    "bucket": Wrong(
        {}, {"model_uri": "s3://no-such-bucket/base"}, BadInput,
        ("model.uri: https://127.0.0.1:", "has no bucket no-such-bucket: check its name, or create it"),
    ),
    "output bucket": Wrong(
        {}, {"output_uri": "s3://no-such-bucket/out", "output_secret": SECRET}, BadInput,
        ("output.uri: https://127.0.0.1:", "has no bucket no-such-bucket"),
    ),
    "data": Wrong(
        {}, {"data": DATA.model_copy(update={"train": [DataSource(uri="s3://data/trian.jsonl", secret=SECRET)]})},
        BadInput, ("dataset.train[0].uri: there is no s3://data/trian.jsonl", "beside it: held-out, train.jsonl"),
    ),
    "authority": Wrong(
        {"caBundle": None}, {}, BadInput,
        ("model.uri: https://127.0.0.1:", "has a certificate that is not trusted (UnknownIssuer)",
         "key caBundle of Secret store"),
    ),
    "region": Wrong(
        {"region": "eu-west-9"}, {}, BadInput, ("AuthorizationHeaderMalformed", "check endpoint and region of"),
    ),
    "no Secret": Wrong(
        None, {}, Unavailable,
        ("model.credentialsSecretRef: there is no Secret store in the job's namespace", "create it, with accessKey"),
    ),
    "half a Secret": Wrong(
        {"secretKey": None}, {}, BadInput,
        ("model.credentialsSecretRef: Secret store lacks secretKey; it has accessKey, caBundle, endpoint",),
    ),
    "no certificate": Wrong(
        {"caBundle": "MIIB"}, {}, BadInput, ("the key caBundle of Secret store holds no certificate (PEM)",)
    ),
    "a damaged certificate": Wrong(
        {"caBundle": "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----"}, {}, BadInput,
        ("the key caBundle of Secret store holds no certificate (PEM)",),
    ),
    "endpoint": Wrong(
        {"endpoint": "s3.example.com"}, {}, BadInput, ("the key endpoint of Secret store must be https://host",)
    ),
    "server": Wrong(
        {"endpoint": "https://127.0.0.1:1"}, {}, Unavailable,
        ("model.uri: https://127.0.0.1:1 cannot be reached or used now (connection refused; bucket models)",),
    ),
    "name": Wrong(
        {"endpoint": "https://store.invalid"}, {}, Unavailable, ("its name is not known",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG.values(), ids=list(WRONG))
def test_what_is_wrong_is_said_with_field_and_cure(
    wrong: Wrong, shop: Shop, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stores, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setitem(stores._QUICK_RETRIES, "max_retries", 0)
    if wrong.secret is None:
        shutil.rmtree(shop.place.root / "credentials")
    else:
        shop.secret(**wrong.secret)
    order = shop.place.inspect_order(**{"data": DATA, **in_store(**wrong.order)})
    with pytest.raises(wrong.kind) as refused:
        inspect(order, shop.pod)
    told = str(refused.value)
    for part in wrong.says:
        assert part in told
    assert describe(refused.value) == (ExitCode.BAD_INPUT if wrong.kind is BadInput else 1, told)
    chain: list[BaseException] = [refused.value]
    while before := chain[-1].__cause__ or (None if chain[-1].__suppress_context__ else chain[-1].__context__):
        chain.append(before)
    for text in (*map(str, chain), *capfd.readouterr()):
        assert shop.server.secret_key not in text
        assert "not-the-secret" not in text
        assert "StringToSign" not in text


@pytest.mark.parametrize(("tls", "says"), [(True, "speaks https://"), (False, "connection")])
def test_the_wrong_protocol(tls: bool, says: str, shop: Shop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stores, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setitem(stores._QUICK_RETRIES, "max_retries", 0)
    with serving(tmp_path / "other", tls=tls) as other:
        scheme = "http" if tls else "https"
        shop.secret(endpoint=f"{scheme}://127.0.0.1:{other.port}")
        with pytest.raises(Unavailable, match=says):
            inspect(shop.place.inspect_order(DATA, **in_store()), shop.pod)


def test_http_works_where_the_endpoint_says_so(shop: Shop, tmp_path: Path) -> None:
    with serving(tmp_path / "plain", tls=False) as plain:
        plain.create_bucket("models")
        plain.put_directory(shop.place.claims / "base" / "model", "models", "team/base")
        shop.secret(
            "plain", caBundle=None, endpoint=plain.endpoint, accessKey=plain.access_key, secretKey=plain.secret_key
        )
        order = shop.place.inspect_order(DATA, **in_store(model_secret="plain"))
        assert inspect(order, shop.pod).examples == 48


def test_keys_from_the_environment_are_not_mixed_with_those_of_a_secret(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody-else")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of-another-session")
    assert inspect(shop.place.inspect_order(DATA, **in_store()), shop.pod).examples == 48


def test_without_a_secret_the_environment_is_used(shop: Shop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with serving(tmp_path / "plain", tls=False) as plain:
        plain.create_bucket("models")
        plain.put_directory(shop.place.claims / "base" / "model", "models", "team/base")
        monkeypatch.setenv("AWS_ENDPOINT_URL", plain.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", plain.access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", plain.secret_key)
        order = shop.place.inspect_order(model_uri=MODEL)
        assert inspect(order, shop.pod).examples == 48


def test_a_process_that_is_refused_tells_nobody_the_key(shop: Shop) -> None:
    shop.secret(secretKey="not-the-secret")
    order = shop.place.inspect_order(DATA, **in_store())
    code, report, log = finish(shop.place, order)
    assert code == ExitCode.BAD_INPUT, log
    assert "SignatureDoesNotMatch" in report
    for text in (order.to_json(), report, log):
        assert "not-the-secret" not in text
    assert "Traceback" not in log


def test_a_server_that_stops_and_comes_back_is_waited_for(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stores, "CHUNK_BYTES", 1 * MIB)
    monkeypatch.setitem(stores._QUICK_RETRIES, "max_retries", 0)
    content = bytes(range(256)) * 4096 * 40
    shop.server.store("data").put("large", content)
    store = stores.open_store("model", "s3://data/large", SECRET, shop.pod)
    wanted = store.object_itself()
    assert wanted
    received = b""
    restarted = threading.Timer(2.0, shop.server.start)
    with caplog.at_level("INFO", logger="qlora_trainer"):
        for number, chunk in enumerate(store.chunks(wanted)):
            received += bytes(chunk)
            if number == 5:
                shop.server.stop()
                restarted.start()
            time.sleep(0)
    restarted.join()
    assert received == content
    assert "cannot be reached or used now (connection refused; bucket data); asking again in 1 s" in caplog.text


ANSWERS = [
    ("404 Not Found: <Error><Code>NoSuchUpload</Code></Error>", Unavailable, "(404 NoSuchUpload; bucket models)"),
    ("400 Bad Request: <Error><Code>RequestTimeout</Code></Error>", Unavailable, "(400 RequestTimeout; bucket models)"),
    ("409 Conflict: <Error><Code>ConditionalRequestConflict</Code></Error>", Unavailable, "ConditionalRequestConflict"),
    ("503 Service Unavailable: <Error><Code>SlowDown</Code></Error>", Unavailable, "(503 SlowDown; bucket models)"),
    ("500 Internal Server Error: gone mad", Unavailable, "(500; bucket models)"),
    ("301 Moved Permanently: <Error><Code>PermanentRedirect</Code></Error>", BadInput, "check endpoint and region"),
    ("403 Forbidden: <Error><Code>AccessDenied</Code></Error>", BadInput, "give them the right to list and read it"),
    ("403 Forbidden: <Error><Code>ExpiredToken</Code></Error>", BadInput, "check accessKey and secretKey of Secret"),
]


@pytest.mark.parametrize(
    ("answer", "kind", "says"), ANSWERS, ids=[answer.partition("<Code>")[2][:16] for answer, *_ in ANSWERS]
)
def test_answers_that_this_server_never_gives(shop: Shop, answer: str, kind: type[StageError], says: str) -> None:
    """In the client's own words, with what stores answer after the status."""
    store = stores.open_store("model", MODEL, SECRET, shop.pod)
    told = store._explained(f"Generic S3 error: Server returned non-2xx status code: {answer}")
    assert type(told) is kind
    assert says in str(told)


def test_an_object_that_changes_while_it_is_read_is_not_half_one_half_the_other(shop: Shop) -> None:
    store = stores.open_store("model", "s3://data/train.jsonl", SECRET, shop.pod)
    wanted = store.object_itself()
    assert wanted
    shop.server.store("data").put("train.jsonl", b"{}\n" * 5000)
    with pytest.raises(Unavailable, match=r"s3://data/train\.jsonl was changed while it was read"):
        store.read(wanted, 0, 10)


# --- what is published ---


def publish_order(shop: Shop, **changes: Any) -> PublishOrder:
    return PublishOrder(
        **{
            **shop.place.envelope(),
            "artifact": "merged",
            "artifact_digest": directory_digest(shop.place.work / "merged"),
            "output_uri": OUTPUT,
            "output_secret": SECRET,
            "provenance": {"modelDigest": "sha256:1"},
            **changes,
        }
    )


@pytest.fixture
def artifact(shop: Shop) -> Path:
    """A small file, one below a directory, and one of three parts."""
    directory = shop.place.work / "merged"
    (directory / "deep").mkdir(parents=True)
    (directory / "a-config.json").write_text("{}")
    (directory / "deep" / "notes").write_text("x")
    (directory / "model.safetensors").write_bytes(bytes(range(256)) * 4096 * 40)  # 40 MiB
    return directory


def moments(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


def test_what_is_published_is_whole_and_once_is_enough(shop: Shop, artifact: Path) -> None:
    result = publish(publish_order(shop), shop.pod)
    found = digests_of(shop.published())
    assert found.pop(MANIFEST_NAME) == result.digest
    assert found == digests_of(artifact)
    assert result.files == 4
    assert result.bytes == sum(path.stat().st_size for path in shop.published().rglob("*") if path.is_file())
    assert shop.uploads_left() == []
    before = moments(shop.published())
    assert publish(publish_order(shop, attempt=2), shop.pod) == result
    assert moments(shop.published()) == before


def test_what_lies_there_is_kept_unless_told_otherwise(shop: Shop, artifact: Path) -> None:
    shop.server.store("results").put("tune/merged/precious", b"x")
    shop.server.store("results").put("tune/merged-2/beside", b"x")
    with pytest.raises(BadInput, match=r"output\.uri: s3://results/tune/merged exists and holds something else"):
        publish(publish_order(shop), shop.pod)
    assert [path.name for path in shop.published().iterdir()] == ["precious"]
    publish(publish_order(shop, overwrite=True), shop.pod)
    assert set(digests_of(shop.published())) == {*digests_of(artifact), MANIFEST_NAME}
    assert (shop.bucket("results") / "tune" / "merged-2" / "beside").exists()


@pytest.mark.parametrize("harm", ["a-config.json", "model.safetensors", MANIFEST_NAME, "deep/notes"])
def test_what_was_changed_there_does_not_pass_for_published(shop: Shop, artifact: Path, harm: str) -> None:
    publish(publish_order(shop), shop.pod)
    if harm == "deep/notes":
        shop.server.store("results").delete(f"tune/merged/{harm}")
    else:
        size = (shop.published() / harm).stat().st_size
        shop.server.store("results").put(f"tune/merged/{harm}", b"!" * size)
    with pytest.raises(BadInput, match="holds something else"):
        publish(publish_order(shop), shop.pod)
    result = publish(publish_order(shop, overwrite=True), shop.pod)
    assert file_digest(shop.published() / MANIFEST_NAME) == result.digest
    assert digests_of(artifact).items() <= digests_of(shop.published()).items()


def test_another_artifact_of_the_same_files_is_something_else(shop: Shop, artifact: Path) -> None:
    publish(publish_order(shop), shop.pod)
    (artifact / "a-config.json").write_text("[]")
    with pytest.raises(BadInput, match="holds something else"):
        publish(publish_order(shop), shop.pod)
    assert (shop.published() / "a-config.json").read_text() == "{}"
    kept = (shop.published() / "model.safetensors").stat().st_mtime_ns
    publish(publish_order(shop, overwrite=True), shop.pod)
    assert digests_of(artifact).items() <= digests_of(shop.published()).items()
    assert (shop.published() / "model.safetensors").stat().st_mtime_ns == kept, "what is the same is not uploaded again"


def test_an_upload_that_is_cut_off_is_aborted_and_the_next_attempt_completes_it(
    shop: Shop, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stores._parts

    def told_to_stop(path: Path, size: int) -> Iterator[bytes]:
        for number, part in enumerate(whole(path, size)):
            if number == 2:
                raise Interrupted("told to stop (SIGTERM)")
            yield part

    monkeypatch.setattr(stores, "_parts", told_to_stop)
    with pytest.raises(Interrupted):
        publish(publish_order(shop), shop.pod)
    before = moments(shop.published())
    assert [Path(path).name for path in before if MANIFEST_NAME in path or "model" in path] == []
    assert before
    assert len(shop.uploads_left()) <= stores.AT_ONCE, "aborted, but for parts that were on their way"
    monkeypatch.setattr(stores, "_parts", whole)
    publish(publish_order(shop, attempt=2), shop.pod)
    assert digests_of(artifact).items() <= digests_of(shop.published()).items()
    assert before.items() <= moments(shop.published()).items(), "what was whole is not uploaded again"


@pytest.mark.parametrize(
    ("number", "ends"), [(signal.SIGTERM, ExitCode.INTERRUPTED), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_process_that_is_ended_in_an_upload_leaves_nothing_that_passes_for_published(
    shop: Shop, artifact: Path, number: signal.Signals, ends: int
) -> None:
    with (artifact / "model.safetensors").open("wb") as file:
        file.truncate(256 * MIB)
    process = start(shop.place, publish_order(shop))
    assert process.stdout
    deadline = time.monotonic() + 60
    while not shop.uploads_left() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    said = process.stdout.read()
    assert process.wait(timeout=60) == ends, said
    assert not (shop.published() / MANIFEST_NAME).exists()
    if number is signal.SIGTERM:  # it is aborted, but parts that were on their way may arrive after that
        assert len(shop.uploads_left()) <= stores.AT_ONCE
    code, _, log = finish(shop.place, publish_order(shop, attempt=2))
    assert code == ExitCode.SUCCEEDED, log
    assert digests_of(artifact).items() <= digests_of(shop.published()).items()


def test_a_server_that_stops_in_an_upload_and_comes_back(
    shop: Shop, artifact: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(stores._QUICK_RETRIES, "max_retries", 0)
    whole, stopped = stores._parts, threading.Event()

    def with_an_outage(path: Path, size: int) -> Iterator[bytes]:
        for number, part in enumerate(whole(path, size)):
            if number == 1 and not stopped.is_set():
                stopped.set()
                shop.server.stop()
                threading.Timer(1.5, shop.server.start).start()
            yield part

    monkeypatch.setattr(stores, "_parts", with_an_outage)
    with caplog.at_level("INFO", logger="qlora_trainer"):
        publish(publish_order(shop), shop.pod)
    assert stopped.is_set()
    assert "output.uri: https://127.0.0.1" in caplog.text
    assert "asking again" in caplog.text
    assert digests_of(artifact).items() <= digests_of(shop.published()).items()


def test_bytes_that_change_on_the_way_are_noticed(shop: Shop, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_parts", lambda path, size: iter([path.read_bytes()[:-1] + b"!"]))
    with pytest.raises(OSError, match=r"s3://results/tune/merged/model\.safetensors: the bytes that arrived are not"):
        publish(publish_order(shop), shop.pod)
    assert not (shop.published() / MANIFEST_NAME).exists()


def test_results_in_a_claim_need_no_store(shop: Shop, artifact: Path) -> None:
    publish(publish_order(shop, output_uri="pvc://models/tune/merged", output_secret=None), shop.place.pod)
    assert digests_of(artifact).items() <= digests_of(shop.place.claims / "models" / "tune" / "merged").items()
