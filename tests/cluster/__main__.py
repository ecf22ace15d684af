"""`python -m tests.cluster`: the cluster from the command line."""

import argparse
import sys
from pathlib import Path

from tests.cluster import images, lifecycle, settings, state
from tests.cluster.build import BuildFailedError
from tests.cluster.buildah import BuildError
from tests.cluster.client import KubectlError, NotInTimeError
from tests.cluster.console import tell
from tests.cluster.prerequisites import UnfitMachineError
from tests.cluster.process import ServerFailedError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="bring the cluster up, or find the one that runs")
    down = commands.add_parser("down", help="stop and remove everything")
    down.add_argument("--keep-logs", type=Path, metavar="DIR", help="first copy the servers' and pods' logs there")
    commands.add_parser("status", help="what runs")
    commands.add_parser("kubeconfig", help="print the path of the kubeconfig")
    commands.add_parser("env", help='print shell exports: eval "$(python -m tests.cluster env)"')
    built = commands.add_parser("images", help="build and push the project's images; print their references")
    built.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(images.IMAGES)}; default: all")
    arguments = parser.parse_args()
    try:
        return _COMMANDS[arguments.command](arguments)
    except (*_EXPECTED, OSError) as error:
        tell(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        tell("interrupted")
        return 130


def _up(_: argparse.Namespace) -> int:
    lifecycle.ensure_up()
    tell(f"up. export KUBECONFIG={settings.KUBECONFIG}")
    return 0


def _down(arguments: argparse.Namespace) -> int:
    if not lifecycle.down(arguments.keep_logs):
        tell("there is no cluster")
    return 0


def _status(_: argparse.Namespace) -> int:
    """0 if the cluster is whole, 3 (as service scripts have it) if not."""
    found = state.load()
    if found is None:
        print("no cluster")
        return 3
    for process in found.processes:
        print(f"{process.name:26} pid {process.pid:<8} {'running' if process.alive else 'DEAD'}")
    print(f"logs: {settings.LOGS}")
    if not found.ready or found.dead:
        print("not whole: `python -m tests.cluster up` starts afresh")
        return 3
    print(f"up: export KUBECONFIG={settings.KUBECONFIG}")
    return 0


def _running() -> lifecycle.Cluster:
    if found := lifecycle.current():
        return found
    raise UnfitMachineError("no cluster is running: python -m tests.cluster up")


def _kubeconfig(_: argparse.Namespace) -> int:
    print(_running().kubeconfig)
    return 0


def _env(_: argparse.Namespace) -> int:
    cluster = _running()
    print(f"export KUBECONFIG={cluster.kubeconfig}\nexport PATH={cluster.binaries}:$PATH")
    return 0


def _images(arguments: argparse.Namespace) -> int:
    if unknown := set(arguments.targets) - set(images.IMAGES):
        raise BuildError(f"no such image: {', '.join(unknown)}. There are: {', '.join(images.IMAGES)}")
    _running()
    for target in arguments.targets or images.IMAGES:
        print(images.ensure(target))
    return 0


_COMMANDS = {
    "up": _up,
    "down": _down,
    "status": _status,
    "kubeconfig": _kubeconfig,
    "env": _env,
    "images": _images,
}
_EXPECTED = (UnfitMachineError, BuildFailedError, BuildError, ServerFailedError, NotInTimeError, KubectlError)

if __name__ == "__main__":
    sys.exit(main())
