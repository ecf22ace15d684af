"""Models and data on a hub, at one commit, and all that can go wrong there."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from huggingface_hub import HfApi, HfFileSystem, RepoFile, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from peft import PeftConfig
from safetensors.torch import load_file

from qlora_api.exchange import (
    EVAL_FIELD,
    GOLDEN_FIELD,
    DataOrder,
    DataSource,
    ExitCode,
    SourceShare,
    succeeded,
    train_field,
)
from qlora_trainer import inputs, stores
from qlora_trainer.artifacts import file_digest
from qlora_trainer.environment import Pod
from qlora_trainer.failures import BadInput, StageError, Unavailable, describe
from qlora_trainer.hub import MIRROR_ENV, open_hub
from qlora_trainer.inspection import inspect, that_fits
from qlora_trainer.interruption import Interruption
from qlora_trainer.merge import merge
from qlora_trainer.training import train
from tests.cluster.hub import Fault, Hub, directory_files, in_lfs, serving
from tests.cluster.olah import mirroring

from .conftest import Place
from .test_main import finish

SECRET = "hub"
MODEL = "hf://team/base"
DATA = DataOrder(
    train=[DataSource(uri="hf://team/chats/train.jsonl")],
    golden=DataSource(uri="hf://datasets/team/chats/held-out"),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with serving(tmp_path_factory.mktemp("hub")) as server:
        yield server


class Shop(NamedTuple):
    """The job's place, whose model and data are on a hub."""

    place: Place
    hub: Hub

    @property
    def pod(self) -> Pod:
        return Pod(Interruption(), str(self.place.claims), credentials=str(self.place.root / "credentials"))

    def secret(self, name: str = SECRET, /, **keys: str) -> None:
        """Write the Secret as the kubelet mounts it."""
        directory = self.place.root / "credentials" / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        for key, value in keys.items():
            (directory / key).write_text(value + "\n")

    @property
    def model(self) -> dict[str, bytes]:
        """The files of the base model."""
        return directory_files(self.place.claims / "base" / "model")

    @property
    def files(self) -> Path:
        """Where the model is downloaded to."""
        return self.place.work / "inputs" / "model"


@pytest.fixture
def shop(place: Place, server: Hub, monkeypatch: pytest.MonkeyPatch) -> Shop:
    server.repositories.clear()
    server.tokens.clear()
    server.faults.clear()
    server.requests.clear()
    monkeypatch.setenv(MIRROR_ENV, server.endpoint)
    shop = Shop(place, server)
    server.create("model", "team/base", shop.model | {".gitattributes": b"", "original/notes.txt": b"not wanted"})
    data = directory_files(place.claims / "data")
    held_out = {"held-out/golden.jsonl": data["golden.jsonl"], "held-out/README.md": b"not data"}
    server.create("dataset", "team/chats", {"train.jsonl": data["train.jsonl"], "README.md": b"#", **held_out})
    return shop


def on_hub(**changes: Any) -> dict[str, Any]:
    return {"data": DATA, "model_uri": MODEL, **changes}


# --- the server is what the hub's own client takes for a hub ---


def test_the_clients_of_the_hub_take_the_server_for_one(shop: Shop, tmp_path: Path) -> None:
    api, token = HfApi(shop.hub.endpoint, token=False), shop.hub.token()
    sha = shop.hub.head("model", "team/base")
    assert api.model_info("team/base").sha == sha
    assert api.dataset_info("team/chats", revision="main").sha
    listed = {each.path: each for each in api.list_repo_tree("team/base", recursive=True) if isinstance(each, RepoFile)}
    assert {name: each.size for name, each in listed.items()} == {
        name: len(content) for name, content in shop.hub.repositories["model", "team/base"].commits[sha].items()
    }
    lfs = next(name for name, content in shop.model.items() if in_lfs(content))
    (info,) = api.get_paths_info("team/base", [lfs])
    assert isinstance(info, RepoFile)
    assert info.lfs
    seen = get_hf_file_metadata(hf_hub_url("team/base", lfs, endpoint=shop.hub.endpoint), token=False)
    assert (seen.commit_hash, seen.etag, seen.size) == (sha, info.lfs.sha256, info.size)
    copy = snapshot_download("team/base", cache_dir=tmp_path / "cache", endpoint=shop.hub.endpoint, token=False)
    assert {name: (Path(copy) / name).read_bytes() for name in shop.model} == shop.model
    system = HfFileSystem(endpoint=shop.hub.endpoint, token=False, skip_instance_cache=True)
    assert system.read_bytes("datasets/team/chats/held-out/README.md") == b"not data"

    shop.hub.create("model", "team/gated", {"config.json": b"{}"}, gated=True)
    for repository, revision, error in (
        ("team/nothing", "main", RepositoryNotFoundError),
        ("team/base", "nowhere", RevisionNotFoundError),
    ):
        for asked_with in (False, token):
            with pytest.raises(error):
                api.model_info(repository, revision=revision, token=asked_with)
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("team/base", "no/such"))
    for asked_with in (False, token):
        with pytest.raises(GatedRepoError):
            api.hf_hub_download("team/gated", "config.json", cache_dir=tmp_path / "cache", token=asked_with)


# --- what is read ---


def test_inspection_sees_on_a_hub_what_it_sees_on_a_claim(shop: Shop) -> None:
    from_claims = inspect(shop.place.inspect_order(), shop.pod)
    found = inspect(shop.place.inspect_order(**on_hub()), shop.pod)
    differing = {"model_digest", "download_bytes", "data_digest", "model_revision", "data_revisions"}
    for name in type(found).model_fields.keys() - differing:
        assert getattr(found, name) == getattr(from_claims, name), name
    model, data = shop.hub.head("model", "team/base"), shop.hub.head("dataset", "team/chats")
    assert found.model_revision == model
    assert found.data_revisions == {"dataset.train[0]": data, "evaluation.golden": data}
    assert (from_claims.model_revision, from_claims.data_revisions) == (None, {})
    sizes = [len(content) for name, content in shop.model.items()]
    sizes += [path.stat().st_size for path in (shop.place.claims / "data").iterdir()]
    assert found.download_bytes == sum(sizes)
    assert not (shop.files / "original").exists()


def test_inspection_reads_no_weights(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "FIRST_BYTES", 64)  # less than a header: the rest of it takes a second request
    inspect(shop.place.inspect_order(**on_hub()), shop.pod)
    shards = sorted(name for name in shop.model if name.endswith(".safetensors"))
    assert len(shards) > 1
    for shard in shards:
        header = 8 + int.from_bytes(shop.model[shard][:8], "little")
        found = (shop.files / shard).read_bytes()
        assert found[:header] == shop.model[shard][:header]
        assert len(found) == len(shop.model[shard])
        assert not any(found[header:])
        ranges = [each.range for each in shop.hub.requests if each.at_cdn and f"name={shard}" in each.path]
        assert ranges == ["bytes=0-63", f"bytes=64-{header - 1}"]


def test_a_job_stays_at_the_commit_that_was_inspected(shop: Shop) -> None:
    claims = train(shop.place.train_order(recipe={"max_steps": 2}), shop.pod)
    on_claims = load_file(shop.place.work / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(shop.place.work)

    seen = inspect(shop.place.inspect_order(**on_hub()), shop.pod)
    other = {
        name: content[:-1] + b"!" if name.endswith(".safetensors") else content for name, content in shop.model.items()
    }
    shop.hub.repositories["model", "team/base"].commit(other)
    shop.hub.repositories["dataset", "team/chats"].commit({"train.jsonl": b'{"prompt": "a", "completion": "b"}\n'})

    at = seen.data_revisions
    pinned = DATA.model_copy(
        update={
            "train": [DATA.train[0].model_copy(update={"revision": at["dataset.train[0]"]})],
            "golden": DATA.golden and DATA.golden.model_copy(update={"revision": at["evaluation.golden"]}),
        }
    )
    changes = {
        "model_revision": seen.model_revision,
        "model_digest": seen.model_digest,
        "data_digest": seen.data_digest,
    }
    order = shop.place.train_order(recipe={"max_steps": 2}).model_copy(update=on_hub(**changes, data=pinned))
    result = train(order, shop.pod)
    assert result.train_loss == claims.train_loss
    adapter = load_file(shop.place.work / "adapter" / "adapter_model.safetensors")
    assert all((adapter[name] == weight).all() for name, weight in on_claims.items())
    config = PeftConfig.from_pretrained(str(shop.place.work / "adapter"))
    assert (config.base_model_name_or_path, config.revision) == ("team/base", seen.model_revision)

    shop.hub.stop()  # what train has downloaded, the next attempt and merge find
    try:
        assert train(order.model_copy(update={"attempt": 2}), shop.pod) == result
        to_merge = shop.place.merge_order(order, result.adapter_digest, model_revision=seen.model_revision)
        assert merge(to_merge, shop.pod).digest
    finally:
        shop.hub.start()

    # an order without the commit would have read what the branch is now
    moved = inspect(shop.place.inspect_order(model_uri=MODEL), shop.pod)
    assert moved.model_digest != seen.model_digest
    with pytest.raises(BadInput, match=r"model\.uri: hf://team/base has changed since inspection"):
        inputs.with_inputs(
            to_merge.model_copy(update={"model_revision": None, "work_dir": f"{shop.place.work}-2"}), shop.pod
        )


def test_a_revision_is_a_branch_a_tag_or_a_commit(shop: Shop) -> None:
    repository = shop.hub.repositories["model", "team/base"]
    first = repository.names["v1"] = repository.names["main"]
    repository.commit({"config.json": b"{}"})
    branch = repository.commit(shop.model | {"README.md": b"of the branch"}, "wip/of me")
    for revision, commit in (("v1", first), (first, first), ("wip/of me", branch)):
        found = inspect(shop.place.inspect_order(model_uri=MODEL, model_revision=revision), shop.pod)
        assert found.model_revision == commit
        shutil.rmtree(shop.place.work)


WHERE = {
    "a file": ("hf://team/data/train.jsonl", {"train.jsonl": 20}),
    "a directory": ("hf://team/data/more", {"more.jsonl": 8}),
    "a repository with files at the top": ("hf://team/data", {"train.jsonl": 20}),
    "a repository with files further below": ("hf://team/deep", {"a%2Ftrain.jsonl": 20, "b%2Fc%2Ftrain.jsonl": 8}),
    "a file without a known ending": ("hf://team/odd/examples", {"examples": 8}),
}


@pytest.mark.parametrize(("uri", "files"), WHERE.values(), ids=list(WHERE))
def test_data_is_a_file_a_directory_or_a_repository(shop: Shop, uri: str, files: dict[str, int]) -> None:
    lines = (shop.place.claims / "data" / "train.jsonl").read_bytes().splitlines(keepends=True)
    some, rest = b"".join(lines[:20]), b"".join(lines[20:28])
    shop.hub.create("dataset", "team/data", {"train.jsonl": some, "more/more.jsonl": rest, "more/notes.md": b"x"})
    shop.hub.create("dataset", "team/deep", {"a/train.jsonl": some, "b/c/train.jsonl": rest, "README.md": b"x"})
    shop.hub.create("dataset", "team/odd", {"examples": rest})
    found = inspect(shop.place.inspect_order(DataOrder(train=[DataSource(uri=uri)])), shop.pod)
    assert found.examples == sum(files.values())
    directory = shop.place.work / "inputs" / "dataset-train-0"
    assert {path.name for path in directory.iterdir() if path.name[0] != "."} == files.keys()


def test_long_listings_and_repositories_that_moved(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path / "small", page=3) as small:
        small.create("model", "team/base", shop.model)
        small.create("model", "old/name", {}, moved_to="team/base")
        monkeypatch.setenv(MIRROR_ENV, small.endpoint + "/")
        hub = open_hub("model", "hf://old/name", "model", None, None, shop.pod)
        assert hub.objects().keys() == shop.model.keys()
        assert len(shop.model) > 2 * small.page
        name = min(shop.model)
        assert b"".join(hub.chunks(hub.objects()[name])) == shop.model[name]


def test_what_reaches_whom(shop: Shop) -> None:
    """The token goes to the hub and no further, and nothing is asked for but what the order names."""
    token = shop.hub.token()
    for repository in shop.hub.repositories.values():
        repository.private, repository.readers = True, {token}
    shop.secret(token=token)
    data = DataOrder(train=[DATA.train[0].model_copy(update={"secret": SECRET})])
    order = shop.place.inspect_order(data, model_uri=MODEL, model_secret=SECRET)
    code, report, log = finish(shop.place, order, {MIRROR_ENV: shop.hub.endpoint})
    assert code == ExitCode.SUCCEEDED, log
    assert token not in log + report
    assert {each.at_cdn for each in shop.hub.requests} == {True, False}
    assert all(each.authorized != each.at_cdn for each in shop.hub.requests)
    assert {each.method for each in shop.hub.requests} == {"GET"}
    asked = [each.path for each in shop.hub.requests if not each.at_cdn]
    assert all("team/base" in path or "datasets/team/chats" in path for path in asked)
    assert sum("resolve" in path and "train.jsonl" in path for path in asked) == 1
    assert not any("original" in path or "gitattributes" in path for path in asked)
    assert f"{MODEL} is read at commit {shop.hub.head('model', 'team/base')} (main)" in log


def test_large_files_are_asked_for_once_and_read_in_parts(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "CHUNK_BYTES", 5000)
    content = bytes(range(256)) * 100
    token = shop.hub.token()
    shop.secret(token=token)
    shop.hub.create("model", "team/large", {"large": content}, private=True, readers={token})
    hub = open_hub("model", "hf://team/large", "model", None, SECRET, shop.pod)
    wanted = hub.objects()["large"]
    chunks = hub.chunks(wanted)
    received = next(chunks)
    shop.hub.tickets.clear()  # the way there is good for a while only
    received += b"".join(chunks)
    assert received == content
    assert sum("resolve" in each.path for each in shop.hub.requests) <= 2 * stores.AT_ONCE
    assert all(each.range for each in shop.hub.requests if "resolve" in each.path or each.at_cdn)
    assert all(each.authorized != each.at_cdn for each in shop.hub.requests)


@pytest.mark.soak
def test_through_a_mirror_that_people_run(shop: Shop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is a client of the test's hub, and a hub for ours: both speak as it expects."""
    monkeypatch.setattr(stores, "PATIENCE_SECONDS", 0.0)
    token = shop.hub.token()
    shop.hub.create("model", "team/private", shop.model, private=True, readers={token})
    shop.secret(token=token)
    orders = [
        shop.place.inspect_order(**on_hub()),
        shop.place.inspect_order(model_uri="hf://team/private", model_secret=SECRET),
    ]
    direct = []
    for order in orders:
        direct.append(inspect(order, shop.pod))
        shutil.rmtree(shop.place.work)
    with mirroring(shop.hub, tmp_path / "mirror") as endpoint:
        monkeypatch.setenv(MIRROR_ENV, endpoint)
        for order, expected in zip(orders, direct, strict=True):
            assert inspect(order, shop.pod) == expected
            shutil.rmtree(shop.place.work)
        for changes, says in (
            ({"model_uri": "hf://team/private"}, "has no model team/private that anybody may read (401)"),
            ({"model_revision": "v9"}, "has no branch, tag or commit v9"),
        ):
            with pytest.raises(BadInput) as refused:
                inspect(shop.place.inspect_order(**on_hub(**changes)), shop.pod)
            assert says in str(refused.value)


# --- what can go wrong ---


class Wrong(NamedTuple):
    """What is wrong, how it ends, and what the message says of it."""

    order: dict[str, Any]
    kind: type[StageError]
    says: tuple[str, ...]
    secret: dict[str, str] | None = None
    prepare: Callable[[Shop], Any] = lambda shop: None


def of_data(uri: str, revision: str | None = None) -> dict[str, Any]:
    return {"data": DataOrder(train=[DataSource(uri=uri, revision=revision)])}


def gate(shop: Shop) -> None:
    shop.hub.repositories["model", "team/base"].gated = True


def known(shop: Shop) -> None:
    shop.hub.tokens.add("hf_known")


def failing(status: int, path: str = "team/base", **headers: str) -> Callable[[Shop], None]:
    return lambda shop: shop.hub.faults.append(Fault(path, 99, status, headers))


SECRETLY = {"model_secret": SECRET}
WRONG = {
    "address": Wrong(
        {"model_uri": "hf://team/base@v1"}, BadInput,
        ("model.uri: hf://team/base@v1: expected hf://<owner>/<name>", "goes into revision"),
    ),
    "a model that is not there": Wrong(
        {"model_uri": "hf://team/bass"}, BadInput,
        ("model.uri: http://127.0.0.1:", "has no model team/bass that anybody may read (401)",
         "name in model.credentialsSecretRef a Secret with the key token"),
    ),
    "a model that is not there for an account": Wrong(
        {"model_uri": "hf://team/bass", **SECRETLY}, BadInput,
        ("has no model team/bass that the token of Secret hub may read (404): check the name",),
        {"token": "hf_known"}, known,
    ),
    "a data set that is not there": Wrong(
        of_data("hf://team/chat"), BadInput,
        ("dataset.train[0].uri: ", "has no dataset team/chat that anybody may read"),
    ),
    "a file that is not there": Wrong(
        of_data("hf://team/chats/trian.jsonl"), BadInput,
        ("dataset.train[0].uri: there is no hf://team/chats/trian.jsonl at http://127.0.0.1:",
         "nor data files below it; beside it: README.md, held-out, train.jsonl"),
    ),
    "a model's directory that is not there": Wrong(
        {"model_uri": "hf://team/base/fp32"}, BadInput, ("model.uri: there is no directory hf://team/base/fp32",)
    ),
    "a gated model": Wrong(
        {}, BadInput,
        ("model team/base is gated (401): accept its terms at http://127.0.0.1:", "/team/base, and name in "
         "model.credentialsSecretRef a Secret with the key token"), None, gate,
    ),
    "a gated model and an account that was not let in": Wrong(
        SECRETLY, BadInput,
        ("model team/base is gated, and the account of the token in Secret hub has not been let in (403): accept its",),
        {"token": "hf_known"}, lambda shop: (gate(shop), known(shop)),
    ),
    "a token that is refused": Wrong(
        SECRETLY, BadInput,
        ("model.credentialsSecretRef: http://127.0.0.1:", "does not accept the token of Secret hub (401): it is "
         "mistyped, expired or revoked"), {"token": "hf_unknown-to-the-hub"},
    ),
    "a token without the right": Wrong(
        SECRETLY, BadInput, ("the token of Secret hub may not read model team/base at http://127", "(403)"),
        {"token": "hf_known"}, lambda shop: (known(shop), failing(403)(shop)),
    ),
    "a disabled model": Wrong(
        {}, BadInput, ("model team/base has been disabled on the hub: use another one",), None,
        lambda shop: setattr(shop.hub.repositories["model", "team/base"], "disabled", True),
    ),
    "a revision": Wrong(
        {"model_revision": "v9"}, BadInput,
        ("model.revision: model team/base at http://127.0.0.1:", "has no branch, tag or commit v9"),
    ),
    "a revision of data": Wrong(
        of_data("hf://team/chats", "v9"), BadInput, ("dataset.train[0].revision: dataset team/chats at http://127",)
    ),
    "no Secret": Wrong(
        SECRETLY, Unavailable,
        ("model.credentialsSecretRef: there is no Secret hub in the job's namespace", "create it, with token"),
    ),
    "a Secret of another kind": Wrong(
        SECRETLY, BadInput, ("Secret hub lacks token; it has accessKey, and what is read is token, caBundle",),
        {"accessKey": "some-key"},
    ),
    "a token of two words": Wrong(
        SECRETLY, BadInput, ("the key token of Secret hub holds no token",), {"token": "hf_a hf_b"}
    ),
    "a damaged certificate": Wrong(
        SECRETLY, BadInput, ("the key caBundle of Secret hub holds no certificate (PEM)",), {"caBundle": "MIIB"}
    ),
    "another thing than a hub": Wrong(
        {}, BadInput, ("does not answer as the hub does: check HF_ENDPOINT of the installation",), None,
        lambda shop: shop.hub.faults.append(Fault("/api/", 9, 200, body=b"<html>Please log in</html>")),
    ),
    "a hub that lists nonsense": Wrong(
        {}, BadInput, ("does not answer as the hub does",), None,
        lambda shop: shop.hub.faults.append(Fault("/tree/", 9, 200, body=b'[{"type": "file", "path": "a"}]')),
    ),
    "a server error": Wrong(
        {}, Unavailable, ("model.uri: http://127.0.0.1:", "cannot be used now (503)"), None, failing(503)
    ),
    "too many requests": Wrong(
        {}, Unavailable,
        ("takes no more requests for now (429, again in 3600 s); with a token (model.credentialsSecretRef) more is "
         "allowed",), None, failing(429, **{"Retry-After": "3600"}),
    ),
    "too many requests, in the hub's own way": Wrong(
        SECRETLY, Unavailable, ("takes no more requests for now (429, again in 901 s)",), {"token": "hf_known"},
        lambda shop: (known(shop), failing(429, RateLimit='"api";r=0;t=901')(shop)),
    ),
    "a mirror that sends whole files": Wrong(
        {}, BadInput, ("sends whole files where a part is asked for: name a mirror in HF_ENDPOINT",), None,
        lambda shop: shop.hub.faults.append(Fault("safetensors", 99, without_ranges=True)),
    ),
    "a file that is cut short": Wrong(
        {}, Unavailable, ("model.uri: http://127.0.0.1:", "cannot be reached now (the connection was closed)"), None,
        lambda shop: shop.hub.faults.append(Fault("resolve", 99, cut=True)),
    ),
    "bytes that changed on the way": Wrong(
        {}, Unavailable, ("sent other bytes of ", " than commit "), None,
        lambda shop: shop.hub.faults.append(Fault("tokenizer", 99, damaged=True)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG.values(), ids=list(WRONG))
def test_what_is_wrong_is_said_with_field_and_cure(
    wrong: Wrong, shop: Shop, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stores, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(inputs, "FIRST_BYTES", 64)
    if wrong.secret:
        shop.secret(**wrong.secret)
    wrong.prepare(shop)
    with pytest.raises(wrong.kind) as refused:
        inputs.with_inputs(shop.place.inspect_order(**on_hub(**wrong.order)), shop.pod)
    told = str(refused.value)
    for part in wrong.says:
        assert part in told
    assert describe(refused.value) == (ExitCode.BAD_INPUT if wrong.kind is BadInput else 1, told)
    for text in (told, *capfd.readouterr()):
        for token in (wrong.secret or {}).values():
            assert token not in text


@pytest.mark.parametrize(
    ("endpoint", "kind", "says"),
    [
        ("http://127.0.0.1:1", Unavailable, "model.uri: http://127.0.0.1:1 cannot be reached now (connection refused)"),
        (
            "http://hub.invalid",
            Unavailable,
            "model.uri: http://hub.invalid cannot be reached now (its name is not known)",
        ),
        ("hub.example.com", BadInput, "model.uri: HF_ENDPOINT of the installation must be https://host or http://host"),
    ],
)
def test_a_hub_that_is_not_there(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, endpoint: str, kind: type[StageError], says: str
) -> None:
    monkeypatch.setattr(stores, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setenv(MIRROR_ENV, endpoint)
    with pytest.raises(kind) as refused:
        inspect(shop.place.inspect_order(model_uri=MODEL), shop.pod)
    assert says in str(refused.value)


def test_bytes_that_are_nowhere(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is there, and what it sends to for large files is not, or says no: that is not the token's fault."""
    monkeypatch.setattr(stores, "PATIENCE_SECONDS", 0.0)
    order = shop.place.inspect_order(model_uri=MODEL)
    shop.hub.faults.append(Fault("?name=", 99, 403))
    with pytest.raises(Unavailable, match=r"model\.uri: .* has to be asked anew where .* is \(127\.0\.0\.1, 403\)"):
        inputs.with_inputs(order, shop.pod)
    shop.hub.faults[0] = Fault("resolve", 99, 302, {"Location": "http://bytes.invalid/x?signature=hidden"})
    with pytest.raises(Unavailable, match=r" sends to bytes\.invalid, which cannot be reached now") as told:
        inputs.with_inputs(order, shop.pod)
    assert "hidden" not in str(told.value)


def test_a_certificate_of_an_authority_of_its_own(shop: Shop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stores, "PATIENCE_SECONDS", 0.0)
    order = shop.place.inspect_order(model_uri=MODEL, model_secret=SECRET)
    with serving(tmp_path / "tls", tls=True) as hub:
        hub.create("model", "team/base", shop.model)
        monkeypatch.setenv(MIRROR_ENV, hub.endpoint)
        shop.secret(token=hub.token())
        with pytest.raises(BadInput, match=r"has a certificate that is not trusted .*key caBundle of Secret hub"):
            inspect(order, shop.pod)
        shop.secret(caBundle=hub.ca)
        assert inspect(order, shop.pod).model_revision
        monkeypatch.setenv(MIRROR_ENV, hub.endpoint.replace("https", "http"))
        with pytest.raises(Unavailable, match="cannot be reached now"):
            inspect(order, shop.pod)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault("/api/", 1, 502), "cannot be used now (502); asking again in 1 s"),
        (Fault("resolve", 1, 429, {"Retry-After": "2"}), "takes no more requests for now (429, again in 2 s)"),
        (Fault("resolve", 1, 429, {"RateLimit": '"resolvers";r=0;t=2'}), "asking again in 2 s"),
        (Fault("?name=", 1, cut=True), "asking again in 1 s"),
    ],
    ids=["server error", "Retry-After", "RateLimit", "cut short"],
)
def test_what_passes_is_waited_for(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: Fault, says: str
) -> None:
    monkeypatch.setattr(stores, "PATIENCE_SECONDS", 1.5)  # less than it is told to wait, which does not count
    shop.hub.faults.append(fault)
    with caplog.at_level("INFO", logger="qlora_trainer"):
        inputs.with_inputs(shop.place.inspect_order(**on_hub()), shop.pod)
    assert says in caplog.text


def test_a_hub_that_stops_and_comes_back_is_waited_for(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "CHUNK_BYTES", 5000)
    content = bytes(range(256)) * 200
    shop.hub.create("model", "team/large", {"large": content})
    hub = open_hub("model", "hf://team/large", "model", None, None, shop.pod)
    received, restarted = b"", threading.Timer(1.0, shop.hub.start)
    for number, chunk in enumerate(hub.chunks(hub.objects()["large"])):
        received += chunk
        if number == 1:
            shop.hub.stop()
            restarted.start()
    restarted.join()
    assert received == content


def test_a_download_goes_on_file_by_file(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "PATIENCE_SECONDS", 0.0)
    seen = inspect(shop.place.inspect_order(**on_hub()), shop.pod)
    shutil.rmtree(shop.place.work)
    order = shop.place.merge_order(
        shop.place.train_order(), "sha256:a", model_uri=MODEL, model_revision=seen.model_revision,
        model_digest=seen.model_digest,
    )  # fmt: skip
    last = max(name for name in shop.model if name.endswith(".safetensors"))
    shop.hub.faults.append(Fault(f"name={last}", 2, damaged=True))  # once for the header, once for the whole
    with pytest.raises(Unavailable, match="sent other bytes of"):
        inputs.with_inputs(order, shop.pod)
    record = inputs.read_record(shop.files)
    assert record
    assert [name for name, file in record.files.items() if not file.digest] == [last]
    shop.hub.requests.clear()
    inputs.with_inputs(order, shop.pod)
    assert {name: (shop.files / name).read_bytes() for name in shop.model} == shop.model
    read = {each.path.rpartition("/")[2] for each in shop.hub.requests if "resolve" in each.path}
    assert read == {last}
    assert file_digest(shop.files / last) == (inputs.read_record(shop.files) or record).files[last].digest


def test_the_commits_of_as_many_sources_as_there_may_be_fit_a_report(shop: Shop) -> None:
    order = shop.place.inspect_order(**on_hub())
    found = inspect(order, shop.pod)
    fields = [*(train_field(index) for index in range(32)), EVAL_FIELD, GOLDEN_FIELD]
    commit = found.data_revisions[train_field(0)]
    shares = [SourceShare(examples_percent=3.13, tokens_percent=12.34)] * 32
    most = found.model_copy(update={"data_revisions": dict.fromkeys(fields, commit), "sources": shares})
    most = that_fits(order, most)
    assert json.loads(succeeded(order, most).fitted())["result"]["dataRevisions"] == dict.fromkeys(fields, commit)
