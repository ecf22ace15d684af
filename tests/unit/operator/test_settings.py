"""The configuration file: an installation that is wrong says so at start, with the file, the key and the cure."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_operator.settings import load

WRONG = [
    pytest.param("trainerImage: [", ["not YAML", "line 1"], id="not YAML"),
    pytest.param("", ["trainerImage", "Field required"], id="empty"),
    pytest.param("- trainerImage", ["valid dictionary"], id="a list"),
    pytest.param("trainerImage: t:1\ntrainerImages: x", ["trainerImages", "Extra inputs"], id="a key that is not one"),
    pytest.param("trainerImage: t:1\nworkers: many", ["workers", "valid integer"], id="a word for a number"),
    pytest.param("trainerImage: t:1\nworkers: 0", ["workers", "greater than or equal to 1"], id="out of bounds"),
    pytest.param("trainerImage: t:1\ncpuStages: {request: {}}", ["cpuStages.request", "Extra"], id="deep down"),
    pytest.param(
        "trainerImage: t:1\nimagePullPolicy: Sometimes\ngraceSeconds: 1",
        ["imagePullPolicy", "graceSeconds"],
        id="all at once",
    ),
]


@pytest.mark.parametrize(("text", "parts"), WRONG)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as refused:
        load(str(file))
    said = str(refused.value)
    assert said.startswith(f"{file}: ")
    assert [part for part in parts if part not in said] == []


def test_a_file_that_is_not_there_says_where_to_name_it(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(SystemExit, match="name the configuration file in QLORA_CONFIG"):
            load(str(path))


def test_the_environment_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("trainerImage: trainer:2\nnamespaces: [team-a]\ntrainStage: {limits: {cpu: '8'}}\n")
    monkeypatch.setenv("QLORA_CONFIG", str(file))
    settings = load()
    assert (settings.trainer_image, settings.namespaces, settings.train_stage.limits) == (
        "trainer:2", ["team-a"], {"cpu": "8"},
    )  # fmt: skip
    assert settings.cpu_stages.requests, "what is not said keeps its default"
