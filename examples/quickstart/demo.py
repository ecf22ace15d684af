"""`make demo`: the main job end to end, on the embedded cluster or on the current context's."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from examples.quickstart.follow import NotOverError, console, follow
from examples.quickstart.install import REPOSITORY, Images, InstallError, install
from examples.quickstart.upload import HERE, MOUNT, BaseModelError, ask, fill_claim, shell
from tests.cluster import images, lifecycle, prerequisites
from tests.cluster.buildah import BuildError
from tests.cluster.client import Cluster, KubectlError, NotInTimeError
from tests.cluster.console import step
from tests.cluster.process import ServerFailedError

JOB = REPOSITORY / "examples" / "quickstart.yaml"
NAMESPACE = "qlora-demo"
TIMEOUT_SECONDS = 30 * 60
PROMPTS = 3


def main() -> int:
    """Run the demo; the exit status says whether the job succeeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cluster", choices=["embedded", "current"], default="embedded")
    parser.add_argument("--registry", help="with --cluster current: where qlora-operator and qlora-trainer lie")
    parser.add_argument("--tag", default="latest", help="with --cluster current: the images' tag")
    choice = parser.parse_args()
    if choice.cluster == "current" and not choice.registry:
        parser.error("--cluster current needs --registry: push both targets of the Dockerfile to one, then name it")
    try:
        return run(*(_embedded() if choice.cluster == "embedded" else _current(choice.registry, choice.tag)))
    except (
        InstallError,
        BaseModelError,
        KubectlError,
        NotOverError,
        NotInTimeError,
        ServerFailedError,
        BuildError,
        prerequisites.UnfitMachineError,
    ) as error:
        console.print(f"[bold red]demo failed:[/] {error}")
        return 1


def _embedded() -> tuple[Cluster, Images]:
    cluster = lifecycle.ensure_up()
    return cluster, Images(images.ensure("operator"), images.ensure("trainer"))


def _current(registry: str, tag: str) -> tuple[Cluster, Images]:
    missing = [program for program in ("kubectl", "helm") if shutil.which(program) is None]
    if missing:
        raise prerequisites.UnfitMachineError(f"install {' and '.join(missing)} and put them on the PATH")
    kubeconfig = Path(os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config")
    cluster = Cluster(kubeconfig, Path(shutil.which("kubectl") or "").parent)
    return cluster, Images(f"{registry}/qlora-operator:{tag}", f"{registry}/qlora-trainer:{tag}")


def run(cluster: Cluster, built: Images) -> int:
    """Install, apply, follow, and show what came out."""
    began = time.monotonic()
    console.print("[bold]1. install the chart[/]")
    install(cluster, built, {"stageEnv": {"OMP_NUM_THREADS": "1"}})
    cluster.create_namespace(NAMESPACE)
    cluster.kubectl(  # with its children: a job of the same name would meet them
        "delete", "qlorajobs.qlora.dev/quickstart", "--ignore-not-found", "--cascade=foreground", namespace=NAMESPACE
    )
    console.print("[bold]2. put base model and data on a claim[/]")
    fill_claim(cluster, NAMESPACE, built.trainer)
    with shell(cluster, NAMESPACE, built.trainer) as pod:
        cluster.kubectl("exec", pod, "--", "rm", "-rf", f"{MOUNT}/models", namespace=NAMESPACE)
    console.print(f"[bold]3. kubectl apply -f {JOB.relative_to(REPOSITORY)}[/]")
    cluster.kubectl("apply", "--filename", str(JOB), namespace=NAMESPACE)
    job = follow(cluster, NAMESPACE, "quickstart", timeout=TIMEOUT_SECONDS)
    console.print("[bold]4. the status[/]")
    console.print(
        cluster.kubectl("get", "qlorajobs.qlora.dev", "quickstart", "--output=wide", namespace=NAMESPACE), markup=False
    )
    console.print(yaml.safe_dump(summary(job["status"]), sort_keys=False, allow_unicode=True, width=120), markup=False)
    if job["status"]["phase"] != "Succeeded":
        return 1
    show_result(cluster, built, job)
    console.print(f"demo done in {time.monotonic() - began:.0f} s")
    return 0


def summary(status: dict[str, Any]) -> dict[str, Any]:
    """The status without what is long: conditions in one line each, the plan without its recipe."""
    short = {key: value for key, value in status.items() if key not in ("conditions", "plan", "inspection")}
    short["conditions"] = [f"{c['type']}={c['status']} ({c['reason']})" for c in status["conditions"]]
    if plan := status.get("plan"):
        short["plan"] = {key: plan[key] for key in ("flavour", "gpus", "microBatchSize", "gradientAccumulation")}
        short["plan"]["memory"] = {item["name"]: f"{item['bytes'] / 2**20:.0f} MiB" for item in plan["memory"]["items"]}
    return short


def show_result(cluster: Cluster, built: Images, job: dict[str, Any]) -> None:
    """Where the artifacts lie, what they are worth, and what the model says before and after."""
    console.print("[bold]5. the result[/]")
    artifacts = Table("artifact", "uri", "MiB", "digest")
    for artifact in job["status"]["artifacts"]:
        size = f"{artifact['bytes'] / 2**20:.1f}"
        artifacts.add_row(artifact["name"], artifact["uri"], size, artifact["digest"][:19] + "…")
    console.print(artifacts)
    scores = Table("golden set", "base", "tuned", "examples")
    for score in job["status"]["evaluation"]["scores"]:
        scores.add_row(score["metric"], f"{score['base']:.1%}", f"{score['tuned']:.1%}", str(score["examples"]))
    console.print(scores)
    with (HERE / "golden.jsonl").open() as golden:
        asked = [json.loads(line)["messages"] for line in itertools.islice(golden, PROMPTS)]
    merged = next(a["uri"] for a in job["status"]["artifacts"] if a["name"] == "merged")
    answers = Table("prompt", "before", "after", "expected")
    with shell(cluster, NAMESPACE, built.trainer) as pod, step("asking base and merged model"):
        for question, answer in asked:
            before = ask(cluster, NAMESPACE, pod, "base", question["content"])
            after = ask(cluster, NAMESPACE, pod, merged.removeprefix("pvc://quickstart/"), question["content"])
            answers.add_row(question["content"], before, after, answer["content"])
    console.print(answers)


if __name__ == "__main__":
    sys.exit(main())
