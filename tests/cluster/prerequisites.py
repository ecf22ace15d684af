"""What the machine must have: checked first, installed where Debian has it, said clearly where not."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.cluster import settings
from tests.cluster.console import step

GO_NEEDED = (1, 26)
GIB = 2**30
# program → Debian package that brings it
PROGRAMS = {
    "containerd": "containerd",
    "runc": "runc",
    "/usr/lib/cni/ptp": "containernetworking-plugins",
    "nft": "nftables",
    "iptables": "iptables",
    "ip": "iproute2",
    "unshare": "util-linux",
    "/bin/busybox": "busybox-static",
    "openssl": "openssl",
    "docker-registry": "docker-registry",
}
IMAGE_PROGRAMS = {"buildah": "buildah", "debootstrap": "debootstrap"}


class UnfitMachineError(Exception):
    """The machine lacks something; the message says what to do."""


def require_root() -> None:
    if os.geteuid() != 0:
        raise UnfitMachineError(
            "the cluster needs root: it makes a bridge, namespaces and mounts. Run the same command with sudo."
        )


def go() -> str:
    """Path of a Go compiler that is new enough."""
    found = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    wanted = ".".join(map(str, GO_NEEDED))
    advice = f"install Go {wanted} or later from https://go.dev/dl and put its bin directory on PATH."
    if not found:
        raise UnfitMachineError(f"no Go compiler: the cluster's programs are compiled from source; {advice}")
    answer = subprocess.run([found, "env", "GOVERSION"], capture_output=True, text=True, cwd="/").stdout
    version = re.match(r"go(\d+)\.(\d+)", answer)
    if not version or (int(version[1]), int(version[2])) < GO_NEEDED:
        raise UnfitMachineError(f"{found} is {answer.strip() or 'unusable'}: {advice}")
    return found


def require_space(path: Path, gib: float, purpose: str) -> None:
    """Raise unless the file system of `path` has `gib` GiB left."""
    existing = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(existing).free / GIB
    if free < gib:
        raise UnfitMachineError(
            f"{purpose} needs {gib:.0f} GiB free on the file system of {path}, {free:.1f} GiB are. "
            "Make room, or point QLORA_CACHE to a directory elsewhere."
        )


def install(programs: dict[str, str]) -> None:
    """Install the Debian packages of those programs that are missing, without starting any service."""
    missing = sorted({package for program, package in programs.items() if not _present(program)})
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise UnfitMachineError(f"missing: {', '.join(missing)}. Install them (these are their names in Debian).")
    with step(f"installing {' '.join(missing)}") as work, _no_services():
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        said = ""
        for command in (["update"], ["install", "--yes", "--no-install-recommends", *missing]):
            work.say(command[0])
            result = subprocess.run(["apt-get", *command], env=quiet, capture_output=True, text=True)
            said += result.stderr[-2000:]
        if result.returncode:  # the update may fail on somebody else's package source and do no harm
            raise UnfitMachineError(f"apt-get failed:\n{said}\nInstall these by hand: {' '.join(missing)}")


def _present(program: str) -> bool:
    if program.startswith("/"):
        return Path(program).exists()
    return shutil.which(program) is not None


class _no_services:  # noqa: N801  (reads as a verb)
    """While in force, Debian's install scripts start no service (policy-rc.d, see invoke-rc.d(8))."""

    path = Path("/usr/sbin/policy-rc.d")

    def __enter__(self) -> None:
        self.ours = not self.path.exists()
        if self.ours:
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as draft:
                draft.write("#!/bin/sh\nexit 101\n")
            Path(draft.name).chmod(0o755)
            Path(draft.name).replace(self.path)

    def __exit__(self, *_: object) -> None:
        if self.ours:
            self.path.unlink(missing_ok=True)


def check() -> None:
    """Root, space and Debian's packages, in this order."""
    require_root()
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # for a root shell without them, as `su` gives
    if not settings.STATE.exists():
        require_space(settings.STATE, 3, "a cluster")
    install(PROGRAMS)
