"""Programs in Go, compiled once per content of their module and kept in the cache: the cluster's, and tests' own."""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
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
    """Changes when, and only when, the cluster's programs would."""
    return digest(" ".join([*_flags(), STAGES]), settings.GO_MODULE / "go.mod", settings.GO_MODULE / "go.sum")


def digest(said: str, *files: Path) -> str:
    """Of `said` and the contents of `files`: 16 hexadecimal digits."""
    content = hashlib.sha256(said.encode())
    for file in files:
        content.update(file.read_bytes())
    return content.hexdigest()[:16]


def binaries() -> Path:
    """Directory of the cluster's programs; compiles them if the cache lacks them (10 minutes on two cores)."""
    return kept("bin", key(), lambda target: _compile(prerequisites.go(), target))


def prune() -> None:
    """Remove the programs of other go.mod contents. Only while nobody compiles."""
    keep_only(settings.cache() / "bin" / key())


def kept(kind: str, generation: str, make: Callable[[Path], None]) -> Path:
    """The cache's directory `kind`/`generation`; where it lacks it, `make` fills it: whole, or not at all."""
    wanted = settings.cache() / kind / generation
    if not wanted.is_dir():
        wanted.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=wanted.parent))
        try:
            make(draft)
            draft.chmod(0o755)
            draft.rename(wanted)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return wanted


def keep_only(generation: Path) -> None:
    """Remove the other generations of the same kind, and drafts. Only while nobody makes one."""
    for directory in generation.parent.iterdir():
        if directory != generation:
            shutil.rmtree(directory)


def _environment() -> dict[str, str]:
    return os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false", "GOWORK": "off"}


def _go(go: str, module: Path, arguments: list[str]) -> str:
    result = subprocess.run([go, *arguments], cwd=module, env=_environment(), capture_output=True, text=True)
    if result.returncode:
        raise BuildFailedError(f"go {' '.join(arguments)} failed:\n{result.stderr[-2000:]}")
    return result.stdout.strip()


def compile_packages(go: str, module: Path, packages: str, flags: Sequence[str], target: Path, *, title: str) -> None:
    """Compile `packages` of the Go module in `module` into the directory `target`.

    Raises:
        BuildFailedError: a source could not be had, or does not compile.
    """
    with step(f"fetching the sources of {title}") as work:
        _watched(go, module, ["mod", "download", "-x"], lambda line: work.say(line.removeprefix("# get ")))
    total = len(_go(go, module, ["list", *flags, "-deps", packages]).splitlines())
    with step(f"compiling {title}", total) as work:
        # -v names each package as it is compiled; those in the compiler's own cache are not named
        _watched(go, module, ["build", "-v", *flags, "-o", f"{target}/", packages], work.advance)


def source(go: str, module: Path, required: str) -> Path:
    """Where the sources of the module `required` by the one in `module` lie, once they are fetched."""
    return Path(_go(go, module, ["list", "-m", "-f", "{{.Dir}}", required]))


def _compile(go: str, target: Path) -> None:
    prerequisites.require_space(target, 8, "compiling the cluster's programs")
    compile_packages(go, settings.GO_MODULE, "tool", _flags(), target, title="Kubernetes and its companions")
    for built, name in RENAMED.items():
        (target / built).rename(target / name)
    # kwok's own fast stages: nodes are Ready at once, pods of Jobs succeed at once
    stages = source(go, settings.GO_MODULE, "sigs.k8s.io/kwok") / "kustomize" / "stage"
    files = sorted(stages.glob("node/fast/node-*.yaml")) + sorted(stages.glob("pod/fast/pod-*.yaml"))
    (target / STAGES).write_text("\n---\n".join(file.read_text() for file in files))


def _watched(go: str, module: Path, arguments: list[str], told: Callable[[str], None]) -> None:
    with subprocess.Popen(
        [go, *arguments],
        cwd=module,
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
