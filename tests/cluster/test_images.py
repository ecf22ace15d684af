"""Images are named by content, hold what they should, and run as the restricted standard wants it."""

import shutil
from pathlib import Path

import pytest

from tests.cluster import buildah, images, settings
from tests.cluster.client import Cluster
from tests.cluster.pods import restricted

LARGEST_OPERATOR_BYTES = 250_000_000


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what goes into the images, free to be changed."""
    for name in ("Dockerfile", ".dockerignore", "requirements", "crds", "operator", "trainer"):
        source = settings.REPOSITORY / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    monkeypatch.setattr(settings, "REPOSITORY", tmp_path)
    return tmp_path


def _keys(target: str) -> tuple[str, str]:
    image = images.IMAGES[target]
    return image.dependencies_key, image.tag


@pytest.mark.parametrize(
    ("changed", "operator", "trainer"),
    [
        ("operator/qlora_operator/new.py", "code", "nothing"),
        ("trainer/qlora_trainer/new.py", "nothing", "code"),
        ("crds/qlora_api/new.py", "code", "code"),
        ("requirements/operator.lock", "dependencies", "nothing"),
        ("requirements/trainer.lock", "nothing", "dependencies"),
        ("Dockerfile", "code", "code"),
        ("operator/qlora_operator/__pycache__/new.pyc", "nothing", "nothing"),
    ],
)
def test_a_change_costs_what_it_must_and_no_more(repository: Path, changed: str, operator: str, trainer: str) -> None:
    before = {target: _keys(target) for target in images.IMAGES}
    file = repository / changed
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as content:
        content.write("\n# changed\n")
    for target, expected in (("operator", operator), ("trainer", trainer)):
        (dependencies_before, tag_before), (dependencies, tag) = before[target], _keys(target)
        seen = "nothing" if tag == tag_before else "code" if dependencies == dependencies_before else "dependencies"
        assert seen == expected, target


def test_an_instruction_that_installs_changes_the_dependencies(repository: Path) -> None:
    before, operator_before = _keys("trainer")[0], _keys("operator")[0]
    dockerfile = repository / "Dockerfile"
    text = dockerfile.read_text()
    where = text.index("AS trainer-dependencies\n") + len("AS trainer-dependencies\n")
    dockerfile.write_text(f"{text[:where]}RUN true\n{text[where:]}")
    assert _keys("trainer")[0] != before
    assert _keys("operator")[0] == operator_before


@pytest.mark.cluster
def test_the_operator_image_is_small_and_imports_without_torch(cluster: Cluster, namespace: str) -> None:
    reference = images.ensure("operator")
    image = images.IMAGES["operator"]
    assert buildah.size_bytes(f"localhost/{image.name}:{image.tag}") <= LARGEST_OPERATOR_BYTES

    script = "import kopf, kubernetes.aio.client, pydantic, qlora_api, qlora_operator, os, importlib.util as u;"
    script += "print(os.getuid(), u.find_spec('torch'), u.find_spec('pip'))"
    cluster.create(restricted("operator", ["python", "-c", script], image=reference), namespace)
    cluster.wait_pod("operator", namespace, "Succeeded")
    assert cluster.logs("operator", namespace) == "65532 None None\n"


@pytest.mark.cluster
def test_the_trainer_image_has_what_training_needs_and_no_more(cluster: Cluster, namespace: str) -> None:
    """That it can be imported is shown by every training of the end-to-end tests."""
    reference = images.ensure("trainer")
    script = "from importlib.util import find_spec as f;"
    script += (
        "print([n for n in ('torch', 'transformers', 'peft', 'trl', 'bitsandbytes', 'qlora_trainer') if not f(n)],"
    )
    script += "[n for n in ('kopf', 'kubernetes', 'pip') if f(n)])"
    cluster.create(restricted("trainer", ["python", "-c", script], image=reference), namespace)
    cluster.wait_pod("trainer", namespace, "Succeeded", timeout=300)
    assert cluster.logs("trainer", namespace) == "[] []\n"
