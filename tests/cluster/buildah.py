"""buildah with storage of its own in the cache, so that nothing of the machine's is touched and all can be pruned."""

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.cluster import settings


class BuildError(Exception):
    """An image could not be built or pushed; the message carries the tool's last words."""


def storage() -> Path:
    return settings.cache() / "buildah"


def _command(*arguments: str) -> list[str]:
    where = [f"--root={storage()}", "--runroot=/run/qlora-buildah", "--storage-driver=overlay"]
    return ["buildah", *where, *arguments]


def buildah(*arguments: str, say: Callable[[str], object] | None = None) -> str:
    """Run buildah and return its standard output; `say` hears each line of what it reports meanwhile.

    Raises:
        BuildError: it failed.
    """
    with subprocess.Popen(
        _command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT if say else subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        if not say:
            output, errors = process.communicate()
        else:
            lines: list[str] = []
            for line in process.stdout:
                lines.append(line)
                say(line)
            output = errors = "".join(lines)
    if process.returncode:
        raise BuildError(f"buildah {arguments[0]} failed:\n{errors[-4000:]}")
    return output


def tagged(repository: str) -> Sequence[str]:
    """The names with tag that our storage holds for `repository`."""
    listed = buildah("images", "--format", "{{.Name}}:{{.Tag}}", "--filter", f"reference={repository}:*")
    return [line for line in listed.split() if not line.endswith(":<none>")]


def size_bytes(name: str) -> int:
    """What the image takes unpacked."""
    images = json.loads(buildah("images", "--json", "--no-trunc", name))
    (mounted,) = {image["id"] for image in images}
    container = buildah("from", "--pull-never", mounted).strip()
    try:
        place = Path(buildah("mount", container).strip())
        return sum(file.lstat().st_size for file in place.rglob("*"))
    finally:
        buildah("rm", container)
