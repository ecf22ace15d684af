"""The image that ours are built on where no registry is at hand: Debian with Python, from debootstrap."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.cluster import settings
from tests.cluster.buildah import BuildError, buildah
from tests.cluster.console import step

SUITE = "bookworm"
PACKAGES = ["python3", "python3-venv", "ca-certificates"]
# Not needed in a container: package lists and caches, documentation, translations, Python's own test suite.
_STRIPPED = [
    "var/lib/apt/lists",
    "var/cache/apt",
    "var/cache/debconf",
    "var/log",
    "usr/share/doc",
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/lintian",
    "usr/share/i18n",
]


def key() -> str:
    """Changes when what is in the image would."""
    return hashlib.sha256(" ".join([SUITE, *PACKAGES, *_STRIPPED]).encode()).hexdigest()[:12]


def ensure() -> str:
    """The base image's name in our storage; made (in about a minute) if it is not there.

    Only one caller at a time.
    """
    name = f"localhost/qlora-base:{key()}"
    if buildah("images", "--quiet", "--filter", f"reference={name}").strip():
        return name
    drafts = settings.cache() / "base"
    shutil.rmtree(drafts, ignore_errors=True)  # of a command that was killed
    drafts.mkdir(parents=True)
    root = Path(tempfile.mkdtemp(dir=drafts))
    try:
        with step("base image: Debian and Python") as work:
            _debootstrap(root, work.say)
            for place in _STRIPPED:
                for entry in (root / place).glob("*"):
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            work.say("committing")
            container = buildah("from", "scratch").strip()
            try:
                buildah("copy", "--quiet", container, str(root), "/")
                buildah("commit", "--quiet", container, name)
            finally:
                buildah("rm", container)
    finally:
        shutil.rmtree(drafts)
    return name


def _debootstrap(root: Path, say) -> None:
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(root)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SSL_", "PIP_"))}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout
        last: list[str] = []
        for line in process.stdout:
            last = [*last[-20:], line]
            say(line.removeprefix("I: "))
    if process.returncode:
        raise BuildError(f"debootstrap failed:\n{''.join(last)}")
