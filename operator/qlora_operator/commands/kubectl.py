"""One question to the cluster by `kubectl`: with the user's own rights, contexts and plugins for signing in."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from typing import Any

from qlora_operator.commands.refusals import BadInput, NoCluster

NOT_THERE = "kubectl is not on the PATH: install it, https://kubernetes.io/docs/tasks/tools"
_OPTIONS = ("namespace", "context", "kubeconfig")


def declare_options(parser: argparse.ArgumentParser, *, namespace: bool = True) -> None:
    """Which cluster, by kubectl's own options."""
    if namespace:
        parser.add_argument("-n", "--namespace", help="its namespace (default: that of kubectl's context)")
    parser.add_argument("--context", help="the context to use, as with kubectl")
    parser.add_argument("--kubeconfig", metavar="FILE", help="the kubeconfig file to use, as with kubectl")


def kubectl(chosen: argparse.Namespace) -> list[str] | None:
    """kubectl with the options that were given, or None where there is none on the PATH."""
    program = shutil.which("kubectl")
    if program is None:
        return None
    return [program, *(f"--{name}={value}" for name in _OPTIONS if (value := getattr(chosen, name, None)))]


def get(chosen: argparse.Namespace, *what: str, otherwise: str = "") -> dict[str, Any]:
    """What `kubectl get` answers.

    Raises NoCluster, in kubectl's words and with `otherwise` as the cure, when it does not; BadInput when there is no
    such object.
    """
    command = kubectl(chosen)
    if command is None:
        raise NoCluster(f"{NOT_THERE}{otherwise}")
    ended = subprocess.run([*command, "get", *what, "--output=json"], capture_output=True, text=True)
    if ended.returncode:
        said = ended.stderr.strip().splitlines()
        reason = said[-1] if said else f"kubectl has ended with {ended.returncode}"  # before it: client-go's own log
        if reason.startswith("Error from server (NotFound)"):
            raise BadInput(reason)
        raise NoCluster(f"{reason}{otherwise}")
    try:
        return json.loads(ended.stdout)
    except json.JSONDecodeError as error:
        said = ended.stdout.strip().splitlines()
        raise NoCluster(f"kubectl has written something that is not JSON: {said[0][:200] if said else ''}") from error
