"""`kubectl qlora plan`: what the operator would decide for a job, before it is applied."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from qlora_api.v1alpha1 import Plan
from qlora_operator.commands import kubectl
from qlora_operator.commands.documents import as_text
from qlora_operator.commands.installation import installation_of
from qlora_operator.commands.manifests import Manifest, Premises, manifests, premises
from qlora_operator.commands.nodes import nodes_described, nodes_of_cluster, nodes_of_file, open_to
from qlora_operator.commands.numbers import whole
from qlora_operator.commands.refusals import BadInput
from qlora_operator.commands.shown import WIDTH, PlanShown, say, show_plan, show_rejected
from qlora_operator.placement.inventory import Inventory
from qlora_operator.planner import Installation, Unfit, plan

PLANNED, NO_PLAN = 0, 1
HELP = """\
Plan jobs as the operator would: which GPUs, by which recipe, what fills their memory, and why not the others.
Nothing is applied, and no weights are read.

The model's shape comes from the catalogue, by its hf:// address; of any other model give --model. The sequence
length is spec.dataset.maxLength, else --seq-len, else assumed and said so. A manifest that comes from a cluster
(kubectl get qj NAME -o yaml) brings both along.

The nodes are those of the current cluster, or with --nodes or --gpus of no cluster at all.

exit codes:
  0    there is a plan for every job
  1    a job has no plan: nothing fits, or it contradicts itself; the message says what to change
  2    bad input: a manifest, a model or an option; each sentence names the field and the cure
  3    no cluster: kubectl is missing, or the cluster does not show its nodes
"""


def declare(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = HELP
    parser.add_argument("-f", "--filename", metavar="FILE", required=True, help="manifests of QLoRAJobs; - is stdin")
    parser.add_argument(
        "--model", "--config", metavar="MODEL", help="the model's shape: a config.json, its directory or a known model"
    )
    parser.add_argument("--seq-len", type=whole, help="tokens per sequence, where the job does not say, such as 4k")
    parser.add_argument(
        "--sequences", metavar="N", type=whole, help="training sequences per epoch after packing: tells steps and time"
    )
    nodes = parser.add_mutually_exclusive_group()
    nodes.add_argument("--nodes", metavar="FILE", help="the output of kubectl get nodes -o yaml (or json)")
    nodes.add_argument("--gpus", metavar="WORDS", help="nodes in words, such as H100-80:8x4,L40S:4x2 (4 and 2 nodes)")
    parser.add_argument("--values", metavar="FILE", help="the chart's values that the operator was installed with")
    parser.add_argument("-o", "--output", choices=["json", "yaml"], help="status.plan, for machines")
    kubectl.declare_options(parser, namespace=False)


def run(chosen: argparse.Namespace) -> int:
    """Plan every job of the file; 1 when one has no plan."""
    jobs = manifests(chosen.filename)
    given = [premises(each, model=chosen.model, seq_len=chosen.seq_len, sequences=chosen.sequences) for each in jobs]
    installation = installation_of(chosen.values)
    nodes = _nodes(chosen, jobs)
    made = [
        _planned(manifest, premise, nodes, installation, described=bool(chosen.gpus))
        for manifest, premise in zip(jobs, given, strict=True)
    ]
    if chosen.output:
        documents = [_as_document(each) for each in made]
        sys.stdout.write(as_text(documents[0] if len(documents) == 1 else documents, chosen.output))
        for manifest, premise, each in zip(jobs, given, made, strict=True):
            for note in _notes(manifest, premise, each):
                sys.stderr.write(f"{manifest.name}: {note}\n")
    else:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
        for number, (manifest, premise, each) in enumerate(zip(jobs, given, made, strict=True)):
            if number:
                console.print()
            _show(manifest, premise, each, console)
    return NO_PLAN if any(isinstance(each, Unfit) for each in made) else PLANNED


def _nodes(chosen: argparse.Namespace, jobs: Sequence[Manifest]) -> list[dict[str, Any]]:
    if chosen.nodes:
        return nodes_of_file(chosen.nodes)
    if not chosen.gpus:
        return nodes_of_cluster(chosen)
    for manifest in jobs:
        if (accelerator := manifest.job.spec.hardware.accelerator) == "cpu":
            raise BadInput(
                f"--gpus describes GPUs, and {manifest.name} has spec.hardware.accelerator: {accelerator}; give --nodes"
            )
    return nodes_described(chosen.gpus)


def _planned(
    manifest: Manifest,
    premise: Premises,
    nodes: Sequence[dict[str, Any]],
    installation: Installation,
    *,
    described: bool,
) -> Plan | Unfit:
    spec = manifest.job.spec
    if described:
        nodes = [open_to(node, spec.pod_template.node_selector) for node in nodes]
    made = plan(spec, premise.inspection, Inventory.of(nodes), installation)
    if isinstance(made, Plan) and not premise.steps_known and made.recipe.max_steps is None:
        return made.model_copy(update={"steps": None, "estimated_seconds": None, "estimated_gpu_hours": None})
    return made


def _as_document(made: Plan | Unfit) -> dict[str, Any]:
    """`status.plan`, or what the condition Planned would say instead."""
    return made.to_api() if isinstance(made, Plan) else {"reason": made.reason, "message": made.message}


def _notes(manifest: Manifest, premise: Premises, made: Plan | Unfit) -> list[str]:
    return [
        *(f"assumed: {each}" for each in premise.assumed),
        *(f"note: {each}" for each in (made.memory.notes if isinstance(made, Plan) else ())),
        *(f"the operator of this version will refuse it: {sentence}" for sentence in manifest.remarks),
    ]


def _show(manifest: Manifest, premise: Premises, made: Plan | Unfit, console: Console) -> None:
    say(console, manifest.name, "bold")
    if isinstance(made, Unfit):
        say(console, f"no plan ({made.reason}): {made.message}")
    else:
        shown = PlanShown.model_validate(made.to_api())
        show_plan(shown, console)
        show_rejected(shown.rejected, console)
    if notes := _notes(manifest, premise, made):
        console.print()
        for note in notes:
            say(console, note)
