from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from qlora_api.exchange import PublishOrder
from qlora_trainer import publish as module
from qlora_trainer.artifacts import directory_digest, file_digest, whole_directory
from qlora_trainer.failures import BadInput
from qlora_trainer.publish import MANIFEST_NAME, publish

from .conftest import Place


@pytest.fixture
def artifact(place: Place) -> Path:
    directory = place.work / "merged"
    (directory / "deep").mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    (directory / "deep" / "config.json").write_text("{}")
    return directory


def order(place: Place, artifact: Path, **changes: Any) -> PublishOrder:
    return PublishOrder(
        **{
            **place.envelope(),
            "artifact": "merged",
            "artifact_digest": directory_digest(artifact),
            "output_uri": "pvc://models/team/tune/merged",
            "provenance": {"modelDigest": "sha256:1", "namespace": "team"},
            **changes,
        }
    )


def test_the_copy_is_whole_and_its_manifest_says_so(place: Place, artifact: Path) -> None:
    result = publish(order(place, artifact), place.pod)
    target = place.claims / "models" / "team" / "tune" / "merged"
    manifest = json.loads((target / MANIFEST_NAME).read_text())
    assert manifest["digest"] == directory_digest(artifact)
    assert manifest["provenance"] == {"modelDigest": "sha256:1", "namespace": "team"}
    assert set(manifest["files"]) == {"model.safetensors", "deep/config.json"}
    for name, entry in manifest["files"].items():
        assert entry == {"digest": file_digest(target / name), "bytes": (artifact / name).stat().st_size}
    assert result.digest == file_digest(target / MANIFEST_NAME)
    assert result.files == 3
    assert result.bytes == sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    assert [path.name for path in target.parent.iterdir()] == ["merged"]


def test_publishing_again_touches_nothing(place: Place, artifact: Path) -> None:
    first = publish(order(place, artifact), place.pod)
    target = place.claims / "models" / "team" / "tune" / "merged"
    before = (target / "model.safetensors").stat().st_mtime_ns
    assert publish(order(place, artifact, attempt=2), place.pod) == first
    assert (target / "model.safetensors").stat().st_mtime_ns == before


def test_what_is_there_is_kept_unless_told_otherwise(place: Place, artifact: Path) -> None:
    target = place.claims / "models" / "team" / "tune" / "merged"
    target.mkdir(parents=True)
    (target / "precious").write_text("x")
    with pytest.raises(BadInput, match=r"exists and holds something else: choose another output\.uri"):
        publish(order(place, artifact), place.pod)
    assert (target / "precious").exists()
    publish(order(place, artifact, overwrite=True), place.pod)
    assert not (target / "precious").exists()
    assert [path.name for path in target.parent.iterdir()] == ["merged"]


def test_of_two_writers_at_once_the_first_wins_and_is_left_alone(tmp_path: Path) -> None:
    """Both have seen that nothing is there; only one can be right about it."""
    target = tmp_path / "merged"
    with pytest.raises(OSError) as refused, whole_directory(target, marker=".b", replace=False) as late:
        (late / "whose").write_text("b")
        with whole_directory(target, marker=".a", replace=False) as first:
            (first / "whose").write_text("a")
    assert refused.value.errno == errno.ENOTEMPTY
    assert (target / "whose").read_text() == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_damaged_copy_does_not_pass_for_published(place: Place, artifact: Path) -> None:
    publish(order(place, artifact), place.pod)
    (place.claims / "models" / "team" / "tune" / "merged" / "model.safetensors").write_bytes(b"?")
    with pytest.raises(BadInput, match="holds something else"):
        publish(order(place, artifact), place.pod)


def test_bytes_that_change_on_the_way_are_noticed(
    place: Place, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lossy(source: Path, target: Path) -> str:
        target.write_bytes(source.read_bytes()[:-1] + b"!")
        return file_digest(source)

    monkeypatch.setattr(module, "copy_file", lossy)
    with pytest.raises(OSError, match="not those that were sent"):
        publish(order(place, artifact), place.pod)
    assert list((place.claims / "models" / "team" / "tune").iterdir()) == []


def test_an_artifact_that_was_changed_is_not_published(place: Place, artifact: Path) -> None:
    made = order(place, artifact)
    (artifact / "deep" / "config.json").write_text("{} ")
    with pytest.raises(BadInput, match="not the one that was made"):
        publish(made, place.pod)
    assert not (place.claims / "models").exists()


def test_what_a_killed_attempt_left_is_cleared(place: Place, artifact: Path) -> None:
    left = place.claims / "models" / "team" / "tune" / ".merged.u-1.partial"
    left.mkdir(parents=True)
    (left / "half").write_text("x")
    publish(order(place, artifact), place.pod)
    assert [path.name for path in left.parent.iterdir()] == ["merged"]
