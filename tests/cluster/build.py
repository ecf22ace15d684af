"""The cluster's programs, compiled once per content of go.mod and kept in the cache."""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.cluster import prerequisites, settings
from tests.cluster.console import step

STAGES = "kwok-stages.yaml"
RENAMED = {"server": "etcd"}  # etcd's package is called server


class BuildFailedError(Exception):
    """The compiler said no; the message carries its last words."""


def _flags() -> list[str]:
    """Build flags that stamp the release: without them the server calls itself v0.0.0-master."""
    release = re.search(r"k8s\.io/kubernetes v(\d+)\.(\d+)\.(\d+)", (settings.GO_MODULE / "go.mod").read_text())
    if not release:
        raise BuildFailedError(f"{settings.GO_MODULE}/go.mod names no release of k8s.io/kubernetes")
    major, minor, patch = release.groups()
    stamps = {
        "k8s.io/component-base/version.gitVersion": f"v{major}.{minor}.{patch}",
        "k8s.io/component-base/version.gitMajor": major,
        "k8s.io/component-base/version.gitMinor": minor,
        "k8s.io/client-go/pkg/version.gitVersion": f"v{major}.{minor}.{patch}",
    }
    return ["-trimpath", "-ldflags", " ".join(["-s -w", *(f"-X {name}={value}" for name, value in stamps.items())])]


def key() -> str:
    """Changes when, and only when, the programs would."""
    content = hashlib.sha256(" ".join([*_flags(), STAGES]).encode())
    for name in ("go.mod", "go.sum"):
        content.update((settings.GO_MODULE / name).read_bytes())
    return content.hexdigest()[:16]


def binaries() -> Path:
    """Directory of the compiled programs; compiles them if the cache lacks them (10 minutes on two cores)."""
    generations = settings.cache() / "bin"
    wanted = generations / key()
    if not wanted.is_dir():
        generations.mkdir(parents=True, exist_ok=True)
        prerequisites.require_space(generations, 8, "compiling the cluster's programs")
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=generations))
        try:
            _compile(prerequisites.go(), draft)
            draft.chmod(0o755)
            draft.rename(wanted)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return wanted


def prune() -> None:
    """Remove the programs of other go.mod contents. Only while nobody compiles."""
    for directory in (settings.cache() / "bin").iterdir():
        if directory.name != key():
            shutil.rmtree(directory)


def _environment() -> dict[str, str]:
    return os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false", "GOWORK": "off"}


def _go(go: str, arguments: list[str]) -> str:
    result = subprocess.run(
        [go, *arguments], cwd=settings.GO_MODULE, env=_environment(), capture_output=True, text=True
    )
    if result.returncode:
        raise BuildFailedError(f"go {' '.join(arguments)} failed:\n{result.stderr[-2000:]}")
    return result.stdout.strip()


def _compile(go: str, target: Path) -> None:
    with step("fetching the sources of Kubernetes and its companions") as work:
        _watched(go, ["mod", "download", "-x"], lambda line: work.say(line.removeprefix("# get ")))
    total = len(_go(go, ["list", "-deps", "tool"]).splitlines())
    with step("compiling Kubernetes and its companions", total) as work:
        # -v names each package as it is compiled; those in the compiler's own cache are not named
        _watched(go, ["build", "-v", *_flags(), "-o", f"{target}/", "tool"], work.advance)
    for built, name in RENAMED.items():
        (target / built).rename(target / name)
    # kwok's own fast stages: nodes are Ready at once, pods of Jobs succeed at once
    stages = Path(_go(go, ["list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/kwok"]), "kustomize", "stage")
    files = sorted(stages.glob("node/fast/node-*.yaml")) + sorted(stages.glob("pod/fast/pod-*.yaml"))
    (target / STAGES).write_text("\n---\n".join(file.read_text() for file in files))


def _watched(go: str, arguments: list[str], told) -> None:
    with subprocess.Popen(
        [go, *arguments],
        cwd=settings.GO_MODULE,
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr
        last: list[str] = []
        try:
            for line in process.stderr:
                last = [*last[-30:], line]
                told(line)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise BuildFailedError(f"go {arguments[0]} failed:\n{''.join(last)}")
