"""A plan as people read it: where it runs, the recipe in brief, the memory as a bar, and why not elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from qlora_api.v1alpha1 import MemoryItem, MemoryPlan, Rejected
from qlora_api.v1alpha1.fields import Document
from qlora_operator.commands.bar import bar, legend, measured_bar
from qlora_operator.placement.choice import with_headroom
from qlora_operator.sizing.memory import CONTEXT

GIB = 1024**3
#: Columns where there is no terminal to ask.
WIDTH = 120
CPU = "cpu"


class RecipeShown(Document):
    """Of a recipe, what is shown. Everything may be absent: another version of the operator may have written it."""

    method: str = "?"
    quant_type: str = ""
    double_quant: bool = False
    compute_dtype: str = ""
    rank: int | None = None
    max_length: int | None = None
    effective_batch_size: int | None = None
    optimizer: str = ""
    attention: str = ""
    gradient_checkpointing: bool = True
    offload: str = "none"


class PlanShown(Document):
    """Of a plan, what is shown, whatever version wrote it."""

    recipe: RecipeShown = RecipeShown()
    flavour: str
    gpus: int
    nodes: int = 1
    micro_batch_size: int
    gradient_accumulation: int | None = None
    steps: int | None = None
    estimated_seconds: int | None = None
    estimated_gpu_hours: float | None = None
    memory: MemoryPlan
    host_memory_bytes: int | None = None
    disk_bytes: int | None = None
    rejected: tuple[Rejected, ...] = ()


def say(console: Console, text: str, style: str = "") -> None:
    """A sentence; where there is no terminal it stays one line, for grep."""
    console.print(Text(text, style), soft_wrap=not console.is_terminal)


def where(plan: PlanShown) -> str:
    """The place in a few words."""
    nodes = "1 node" if plan.nodes == 1 else f"{plan.nodes} nodes"
    return f"the CPU of {nodes}" if plan.flavour == CPU else f"{plan.gpus} × {plan.flavour} in {nodes}"


def recipe_in_brief(recipe: RecipeShown) -> list[str]:
    """What a training is, in a few words each."""
    quantised = f"{recipe.quant_type}, doubly quantised" if recipe.double_quant else recipe.quant_type
    parts = [
        f"qlora ({quantised})" if recipe.method == "qlora" else recipe.method,
        f"rank {recipe.rank}" if recipe.rank else "",
        recipe.compute_dtype,
        recipe.optimizer,
        f"{recipe.attention} attention" if recipe.attention else "",
        "activations recomputed" if recipe.gradient_checkpointing else "activations kept",
        "" if recipe.offload == "none" else f"{recipe.offload} offloaded",
    ]
    return [part for part in parts if part]


def micro_batch(plan: PlanShown) -> str:
    """What a GPU works on at a time."""
    tokens = f" × {plan.recipe.max_length:,} tokens" if plan.recipe.max_length else ""
    return f"micro-batch {plan.micro_batch_size}{tokens}"


def batch_in_brief(plan: PlanShown) -> str:
    """How many sequences at a time, and per step of the optimizer."""
    accumulated = f", {plan.gradient_accumulation} accumulated" if plan.gradient_accumulation else ""
    whole = f", {plan.recipe.effective_batch_size} sequences a step" if plan.recipe.effective_batch_size else ""
    steps = f", {plan.steps:,} steps" if plan.steps else ""
    return f"{micro_batch(plan)}{accumulated}{whole}{steps}"


def show_plan(plan: PlanShown, console: Console) -> None:
    """The plan but for what was rejected."""
    say(console, f"runs on     {where(plan)}")
    say(console, f"recipe      {', '.join(recipe_in_brief(plan.recipe))}")
    say(console, f"batch       {batch_in_brief(plan)}")
    if plan.estimated_seconds is not None:
        say(console, f"time        about {duration(plan.estimated_seconds)}{_gpu_hours(plan)}")
    if plan.host_memory_bytes is not None:
        say(console, f"host memory {plan.host_memory_bytes / GIB:.1f} GiB")
    if plan.disk_bytes is not None:
        say(console, f"work volume {plan.disk_bytes / GIB:.1f} GiB")
    console.print()
    show_memory(plan.memory, console, of=_of(plan))


def duration(seconds: int) -> str:
    """A time in its two largest units, as durations are written in a spec."""
    units = [(seconds // 86400, "d"), (seconds // 3600 % 24, "h"), (seconds // 60 % 60, "m"), (seconds % 60, "s")]
    first = next((n for n, (count, _) in enumerate(units) if count), len(units) - 1)
    return "".join(f"{count}{unit}" for count, unit in units[first : first + 2] if count) or "0s"


def _gpu_hours(plan: PlanShown) -> str:
    return "" if plan.estimated_gpu_hours is None else f", {plan.estimated_gpu_hours:,.1f} GPU-hours"


def _of(plan: PlanShown) -> str:
    if plan.flavour == CPU:
        return "the process"
    return "the GPU" if plan.gpus == 1 else "each GPU"


def needed_bytes(memory: MemoryPlan) -> int:
    """What a GPU must have: the prediction and the headroom."""
    return with_headroom(memory.total_bytes, memory.headroom_percent)


def show_memory(memory: MemoryPlan, console: Console, *, of: str) -> None:
    """The bar, whose width is the memory that is there (or has to be), and its legend."""
    total = memory.total_bytes
    needed = needed_bytes(memory)
    whole = memory.gpu_bytes or needed
    there = f", of {whole / GIB:.1f} there" if memory.gpu_bytes else ""
    sentence = f"memory of {of}: {total / GIB:.1f} GiB predicted, {needed / GIB:.1f} with {memory.headroom_percent} %"
    say(console, f"{sentence} headroom{there}")
    console.print(bar(memory.items, whole_bytes=whole, headroom_bytes=needed - total))
    if memory.measured_bytes is not None:
        console.print(measured_bar(memory.measured_bytes, whole_bytes=whole))
        known = total - sum(item.bytes for item in memory.items if item.name == CONTEXT)  # not the allocator's
        off = 100 * (memory.measured_bytes / known - 1)
        more_or_less = "more" if off >= 0 else "less"
        say(console, f"measured: {memory.measured_bytes / GIB:.1f} GiB, {abs(off):.1f} % {more_or_less} than predicted")
    console.print(legend(memory.items, headroom_bytes=needed - total, free_bytes=whole - needed))


def show_rejected(rejected: tuple[Rejected, ...], console: Console) -> None:
    """Every other flavour, with its sentence."""
    if rejected:
        console.print()
        say(console, "not chosen")
        for each in rejected:
            say(console, f"  {each.flavour}: {each.reason}")


def memory_plan(items: list[tuple[str, int]], *, headroom_percent: int, gpu_bytes: int | None = None) -> MemoryPlan:
    """A prediction in the form of the status."""
    return MemoryPlan(
        items=tuple(MemoryItem(name=name, bytes=size) for name, size in items),
        total_bytes=sum(size for _, size in items),
        gpu_bytes=gpu_bytes,
        headroom_percent=headroom_percent,
    )
