"""The project's images: built when their content is new, pushed to the cluster's registry, named by digest.

The dependencies of an image (for the trainer, several GiB) are a layer of their own that is built and pushed once per
lock file; the project's code is a last layer of some kilobytes.
"""

import configparser
import contextlib
import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import base_image, buildah, prerequisites, registry, settings
from tests.cluster.console import step, tell

_KEPT_CODE_VERSIONS = 4
_PIP_OPTIONS = ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout", "cert")


@dataclass(frozen=True)
class Image:
    """A target of the Dockerfile, what goes into it, and the disk that its dependencies take while they are built."""

    target: str
    packages: tuple[str, ...]
    free_gib: float

    @property
    def name(self) -> str:
        return f"qlora-{self.target}"

    @property
    def dependencies_key(self) -> str:
        """Changes when, and only when, the dependency layer would."""
        dockerfile = (settings.REPOSITORY / "Dockerfile").read_text()
        stages = re.split(r"^(?=FROM )", dockerfile, flags=re.MULTILINE)
        ours = next(stage for stage in stages if stage.startswith(f"FROM ${{BASE}} AS {self.target}-dependencies\n"))
        instructions = "\n".join(line for line in ours.splitlines() if line and not line.startswith("#"))
        lock = settings.REPOSITORY / "requirements" / f"{self.target}.lock"
        return _digest(lock, start=base_image.key() + instructions)[:8]

    @property
    def tag(self) -> str:
        """Changes when, and only when, the image would."""
        files = [file for package in self.packages for file in (settings.REPOSITORY / package).rglob("*")]
        code = sorted(file for file in files if file.is_file() and "__pycache__" not in file.parts)
        fixed = [settings.REPOSITORY / name for name in ("Dockerfile", ".dockerignore")]
        return f"{self.dependencies_key}-{_digest(*fixed, *code)[:12]}"


IMAGES = {
    "operator": Image("operator", ("crds/qlora_api", "operator/qlora_operator"), free_gib=3),
    # it lies in buildah's storage, in the registry and, once pulled, in the node's
    "trainer": Image("trainer", ("crds/qlora_api", "trainer/qlora_trainer"), free_gib=30),
}


def ensure(target: str) -> str:
    """Reference by digest of the image for the code as it is now, built and pushed if the registry lacks it.

    Raises:
        BuildError: building or pushing failed.
        UnfitMachineError: too little disk for a first build.
        ServerFailedError: the cluster (and with it the registry) is not running.
    """
    image = IMAGES[target]
    tag = image.tag
    digest = registry.digest(image.name, tag)
    if digest is None:
        prerequisites.require_root()
        prerequisites.install(prerequisites.IMAGE_PROGRAMS)
        with _locked():
            digest = registry.digest(image.name, tag) or _build(image, tag)
    return f"{settings.REGISTRY}/{image.name}@{digest}"


def _digest(*files: Path, start: str = "") -> str:
    """Over names and contents, in the order given."""
    total = hashlib.sha256(start.encode())
    for file in files:
        total.update(f"{file.relative_to(settings.REPOSITORY)}\0{file.stat().st_size}\0".encode())
        total.update(file.read_bytes())
    return total.hexdigest()


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """One build at a time: the others wait, and then mostly find what they want."""
    settings.cache().mkdir(parents=True, exist_ok=True)
    with (settings.cache() / "images.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("another command is building images: waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(image: Image, tag: str) -> str:
    buildah.buildah("rm", "--all")  # what a build that failed left behind, several GiB
    base = base_image.ensure()
    dependencies = f"localhost/{image.name}-dependencies:{image.dependencies_key}"
    code = f"localhost/{image.name}:{tag}"
    with _pip_settings() as secrets:
        common = ["bud", "--layers", "--network=host", "--isolation=chroot", f"--build-arg=BASE={base}", *secrets]
        if dependencies not in buildah.tagged(f"localhost/{image.name}-dependencies"):
            prerequisites.require_space(
                settings.cache(), image.free_gib, f"the first build of the {image.target} image"
            )
            with step(f"{image.target} image: dependencies") as work:
                _bud(common, f"{image.target}-dependencies", dependencies, work.say)
        with step(f"{image.target} image: code") as work:
            _bud(common, image.target, code, work.say)
    if image.tag != tag:  # edited meanwhile: what was built may be half old, half new
        return _build(image, image.tag)
    with step(f"{image.target} image: push") as work, tempfile.NamedTemporaryFile("r") as digest_file:
        buildah.buildah(
            "push",
            "--tls-verify=false",
            f"--signature-policy={_policy()}",
            "--format=oci",
            "--compression-format=zstd",
            f"--digestfile={digest_file.name}",
            code,
            f"docker://{settings.REGISTRY}/{image.name}:{tag}",
            say=work.say,
        )
        digest = digest_file.read().strip()
    _prune(image, tag)
    return digest


def _bud(common: list[str], target: str, name: str, say) -> None:
    where = ["--file", str(settings.REPOSITORY / "Dockerfile"), str(settings.REPOSITORY)]
    policy = f"--signature-policy={_policy()}"
    buildah.buildah(*common, policy, f"--target={target}", f"--tag={name}", *where, say=say)


def _policy() -> Path:
    """Debian's buildah, installed without what it recommends, lacks the file that says whose images it may use."""
    policy = settings.cache() / "containers-policy.json"
    policy.write_text(json.dumps({"default": [{"type": "insecureAcceptAnything"}]}))
    return policy


@contextlib.contextmanager
def _pip_settings() -> Iterator[list[str]]:
    """This machine's way to the package index (mirror, proxy, authority), as secrets mounted while pip runs."""
    found: dict[str, str] = {}
    home = Path.home()
    files = ["/etc/pip.conf", "/etc/xdg/pip/pip.conf", home / ".pip/pip.conf", home / ".config/pip/pip.conf"]
    for file in [*files, os.environ.get("PIP_CONFIG_FILE", os.devnull)]:
        parser = configparser.RawConfigParser()
        parser.read(file)
        for section in ("global", "install"):
            if parser.has_section(section):
                found |= dict(parser.items(section))
    for option in _PIP_OPTIONS:
        if value := os.environ.get(f"PIP_{option.upper().replace('-', '_')}"):
            found[option] = value
    authority = found.get("cert") or os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
    chosen = {option: found[option] for option in _PIP_OPTIONS if option in found and option != "cert"}
    secrets: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        if authority:
            chosen["cert"] = "/run/ca.pem"
            secrets.append(f"--secret=id=ca.pem,src={authority}")
        if chosen:
            lines = [f"{option} = {value}" for option, value in chosen.items()]
            file = Path(place, "pip.conf")
            file.write_text("\n".join(["[global]", *lines, ""]))
            secrets.append(f"--secret=id=pip.conf,src={file}")
        yield secrets


def _prune(image: Image, tag: str) -> None:
    """Forget dependencies of other lock files and all but the latest versions of the code."""
    history = settings.cache() / "images.json"
    pushed: dict[str, list[str]] = json.loads(history.read_text()) if history.exists() else {}
    recent = [kept for kept in pushed.get(image.name, []) if kept != tag and kept.startswith(image.dependencies_key)]
    pushed[image.name] = [*recent[1 - _KEPT_CODE_VERSIONS :], tag]
    draft = history.with_suffix(".new")
    draft.write_text(json.dumps(pushed))
    draft.replace(history)
    outdated = [old for old in registry.tags(image.name) if old not in pushed[image.name]]
    for old in outdated:
        registry.delete(image.name, old)
    if any(not old.startswith(image.dependencies_key) for old in outdated):
        registry.collect()  # big: do not wait for the next cluster
    kept_names = {f"localhost/{image.name}:{kept}" for kept in pushed[image.name]}
    kept_names.add(f"localhost/{image.name}-dependencies:{image.dependencies_key}")
    for repository in (f"localhost/{image.name}", f"localhost/{image.name}-dependencies"):
        for name in buildah.tagged(repository):
            if name not in kept_names:
                buildah.buildah("rmi", "--force", name)
    buildah.buildah("rmi", "--prune", "--force")
