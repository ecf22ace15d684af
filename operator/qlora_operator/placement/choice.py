"""The choice: which flavour, how many GPUs, which method, which micro-batch; and why not the others. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from qlora_api.exchange import ModelShape, Recipe
from qlora_operator.placement.flavours import Flavour, Refused
from qlora_operator.sizing.families import FAMILIES
from qlora_operator.sizing.memory import GIB, Memory, training_memory

#: Below this a step is bound by dequantising weights, not by arithmetic (training.md: three dequantisations a step).
TOKENS_PER_MICRO_BATCH = 4096
#: GPUs of one node that work together: as the links between them are laid out.
PER_NODE = (1, 2, 4, 8, 16)
#: Settings that take less memory: field of the recipe, its value, and how a user asks for it.
_SAVINGS = (
    ("gradient_checkpointing", True, "with training.gradientCheckpointing"),
    ("method", "qlora", "with method qlora"),
)
#: What can be moved to host memory, the cheapest first.
_OFFLOADS = ("none", "activations", "parameters")
#: Shorter sequences are tried in these steps, from the job's own downwards, to say which would fit.
LENGTH_STEP, SHORTEST = 64, 256
#: What steps weights that several GPUs share; bitsandbytes' optimizers fail on them.
SHARED_OPTIMIZER = "adamw_torch_fused"
#: More than anybody allows.
MANY = 1024


@dataclass(frozen=True)
class Layout:
    """GPUs over nodes."""

    nodes: int
    gpus_per_node: int

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def __str__(self) -> str:
        return f"{self.gpus} GPU{'s' * (self.gpus > 1)}" + (f" on {self.nodes} nodes" if self.nodes > 1 else "")


ONE_GPU = Layout(1, 1)


@dataclass(frozen=True)
class Wishes:
    """What the user has fixed of the choice; None: decided here."""

    gpus: int | None = None
    nodes: int | None = None
    max_gpus: int = 8
    micro_batch_size: int | None = None
    headroom_percent: int = 15
    #: Of one GPU of a product for an hour; where there are any, products that are not named come last.
    prices: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Placed:
    """A recipe on GPUs that have the memory for it."""

    flavour: Flavour
    layout: Layout
    recipe: Recipe
    micro_batch_size: int
    memory: Memory
    #: Whether the GPUs share one model (FSDP); else each has it whole, and a part of every batch.
    sharded: bool = False
    rejected: tuple[Refused, ...] = ()


@dataclass(frozen=True)
class Infeasible:
    """No GPU of the cluster can hold the training, and why each cannot."""

    rejected: tuple[Refused, ...]

    @property
    def message(self) -> str:
        if not self.rejected:
            return "the cluster has no node with GPUs"
        named = [f"{r.product}: {r.reason}" for r in self.rejected if not r.by_its_own_wish]
        unwanted: dict[str, list[str]] = {}  # last, and each reason once: what the job excludes, its user knows
        for refused in self.rejected:
            if refused.by_its_own_wish:
                unwanted.setdefault(refused.reason, []).append(refused.product)
        return "; ".join([*named, *(f"{', '.join(products)}: {reason}" for reason, products in unwanted.items())])


#: From a count of GPUs to the recipes for it, in order of preference; empty where there is none.
Recipes = Callable[[int], Sequence[Recipe]]


@dataclass(frozen=True)
class _Option:
    """A way to train on one flavour. Options of all flavours are compared by `key`, the smallest first."""

    flavour: Flavour
    layout: Layout
    rank: int
    recipe: Recipe
    micro_batch_size: int
    few_tokens: bool
    memory: Memory
    sharded: bool
    price: float

    @property
    def key(self) -> tuple[int, int, int, bool, int, float, int, str]:
        flavour, layout = self.flavour, self.layout
        hourly = self.price * layout.gpus
        size = -self.micro_batch_size
        return (
            layout.nodes,
            layout.gpus,
            self.rank,
            self.few_tokens,
            _as_sold(flavour),
            hourly,
            size,
            flavour.product,
        )

    def placed(self) -> Placed:
        return Placed(self.flavour, self.layout, self.recipe, self.micro_batch_size, self.memory, self.sharded)


def choose(
    shape: ModelShape,
    recipes: Recipes,
    flavours: Sequence[Flavour],
    refused: Sequence[Refused] = (),
    *,
    wishes: Wishes,
) -> Placed | Infeasible:
    """The GPUs to train on.

    Several GPUs each have the whole model where it fits, else they share it.
    Preferred, in this order: the fewest nodes, the fewest GPUs, the recipe that comes first, at least
    `TOKENS_PER_MICRO_BATCH` tokens per micro-batch, the smallest GPU, the lowest price, the largest micro-batch, the
    name. By what nodes can allocate, not by what is free: other tenants' pods are not ours to read, the scheduler
    queues.
    """
    search, flavours = _Search(shape, recipes, wishes), _with_all_nodes(flavours)
    options = _best_of_each_product(search, flavours)
    able = {option.flavour.product for option in options}
    lacking = {f.product: f for f in sorted(flavours, key=search.capacity) if f.product not in able}
    rejected = [*refused, *(Refused(product, search.why_not(flavour)) for product, flavour in lacking.items())]
    if not options:
        return Infeasible(tuple(rejected))
    best, *others = options
    rejected += [Refused(other.flavour.product, _why_rather(best, other)) for other in others]
    return replace(best.placed(), rejected=tuple(rejected))


def keeping_activations(shape: ModelShape, placed: Placed, headroom_percent: int) -> Placed:
    """`placed` with activations kept and not recomputed, where the GPU has the room; else `placed` itself.

    The micro-batch stays: of six FLOPs per token and weight of the frozen base two are for recomputation. Recomputed,
    one layer's activations are there at a time; kept, those of all, and so is what the plan errs by. So they are kept
    only where the plan has been held against real code without recomputation: one GPU's whole dense model of a family
    whose blocks are known.
    """
    if placed.sharded or shape.experts or shape.family not in FAMILIES:
        return placed
    recipe = placed.recipe.model_copy(update={"gradient_checkpointing": False})
    memory = training_memory(shape, recipe, micro_batch_size=placed.micro_batch_size)
    if with_headroom(memory.total_bytes, headroom_percent) > placed.flavour.memory_bytes:
        return placed
    return replace(placed, recipe=recipe, memory=memory)


def alternatives(shape: ModelShape, recipes: Recipes, flavours: Sequence[Flavour], *, wishes: Wishes) -> list[Placed]:
    """The best choice on each product that has one, the preferred first."""
    search = _Search(shape, recipes, wishes)
    return [option.placed() for option in _best_of_each_product(search, _with_all_nodes(flavours))]


def _with_all_nodes(flavours: Sequence[Flavour]) -> list[Flavour]:
    """Each flavour with the nodes of its product that have at least as much: they can work together."""
    return [
        replace(
            flavour,
            nodes=sum(
                other.nodes
                for other in flavours
                if (other.product, other.resource) == (flavour.product, flavour.resource)
                and other.memory_bytes >= flavour.memory_bytes
                and other.gpus_per_node >= flavour.gpus_per_node
            ),
        )
        for flavour in flavours
    ]


def _best_of_each_product(search: _Search, flavours: Sequence[Flavour]) -> list[_Option]:
    options = sorted((o for flavour in flavours if (o := search.best_on(flavour))), key=lambda option: option.key)
    best: dict[str, _Option] = {}
    for option in options:
        best.setdefault(option.flavour.product, option)
    return list(best.values())


def layouts(flavour: Flavour, wishes: Wishes) -> list[Layout]:
    """The ways in which GPUs of `flavour` can be put together within `wishes`, the preferred first.

    In one node 1, 2, 4, 8 …; in several, of each the largest such number. Slices of a GPU work alone.
    """
    most = min(wishes.max_gpus, wishes.gpus or wishes.max_gpus)
    per_node = min(flavour.gpus_per_node, most)
    if wishes.gpus is not None:
        counts = [wishes.nodes] if wishes.nodes else range(1, min(flavour.nodes, wishes.gpus) + 1)
        found = [Layout(nodes, wishes.gpus // nodes) for nodes in counts if wishes.gpus % nodes == 0]
    elif wishes.nodes is not None:
        found = [Layout(wishes.nodes, count) for count in PER_NODE]
    else:
        whole = max(count for count in PER_NODE if count <= max(1, per_node))
        several = (2**doublings for doublings in range(1, 8))
        found = [Layout(1, count) for count in PER_NODE] + [Layout(nodes, whole) for nodes in several]
    return [
        layout
        for layout in found
        if layout.gpus <= most
        and layout.gpus_per_node <= flavour.gpus_per_node
        and layout.nodes <= flavour.nodes
        and (layout == ONE_GPU or not flavour.partition)
    ]


def micro_batches(recipe: Recipe, wanted: int | None, gpus: int = 1) -> list[int]:
    """Micro-batch sizes to try, the best first: `wanted` alone, or every divisor of one GPU's share of the effective
    batch that is not larger than needed for `TOKENS_PER_MICRO_BATCH`, from the largest.

    Empty where `gpus` cannot share the effective batch evenly, or not in micro-batches of that size.
    """
    share, rest = divmod(recipe.effective_batch_size, gpus)
    if rest or (wanted is not None and share % wanted):
        return []
    if wanted is not None:
        return [wanted]
    divisors = [n for n in range(1, share + 1) if share % n == 0]
    enough = next((n for n in divisors if n * recipe.max_length >= TOKENS_PER_MICRO_BATCH), divisors[-1])
    return [n for n in reversed(divisors) if n <= enough]


def with_headroom(memory_bytes: int, headroom_percent: int) -> int:
    """Bytes that a device must have for a training that takes `memory_bytes`."""
    return memory_bytes * (100 + headroom_percent) // 100


class _Search:
    """One job's options, and the reasons where there are none. What a training takes is worked out once."""

    def __init__(self, shape: ModelShape, recipes: Recipes, wishes: Wishes) -> None:
        self._shape, self._wishes = shape, wishes
        self._recipes = cache(lambda gpus: tuple(recipes(gpus)))
        self._memories: dict[tuple[int, int, int], Memory] = {}
        self._changed: dict[tuple[int, str, Any], Recipe] = {}

    def memory(self, recipe: Recipe, size: int, gpus: int) -> Memory:
        key = (id(recipe), size, gpus)  # all recipes live as long as the search: comparing them whole takes longer
        if key not in self._memories:
            self._memories[key] = training_memory(self._shape, recipe, micro_batch_size=size, gpus=gpus)
        return self._memories[key]

    def _with(self, recipe: Recipe, name: str, value: Any) -> Recipe:
        key = (id(recipe), name, value)
        if key not in self._changed:
            self._changed[key] = recipe.model_copy(update={name: value})
        return self._changed[key]

    def _ways(self, layout: Layout) -> list[tuple[int, Recipe, int]]:
        """Preference, recipe and how many GPUs share a model, for `layout`: whole on each GPU before shared."""
        if layout.gpus == 1:
            return [(rank, recipe, 1) for rank, recipe in enumerate(self._recipes(1))]
        whole = [(rank, recipe, 1) for rank, recipe in enumerate(self._recipes(1)) if recipe.offload != "parameters"]
        shared = [(rank, recipe, layout.gpus) for rank, recipe in enumerate(self._recipes(layout.gpus))]
        return sorted([*whole, *shared], key=lambda way: (way[0], way[2]))

    def best_on(self, flavour: Flavour) -> _Option | None:
        wishes = self._wishes
        for layout in layouts(flavour, wishes):
            for rank, recipe, share in self._ways(layout):
                sizes = micro_batches(recipe, wishes.micro_batch_size, layout.gpus)
                if not sizes or not self._fits(recipe, sizes[-1], share, flavour):
                    continue
                size = next(size for size in sizes if self._fits(recipe, size, share, flavour))
                few = wishes.micro_batch_size is None and size < sizes[0]
                price = wishes.prices.get(flavour.product, float("inf")) if wishes.prices else 0.0
                memory = self.memory(recipe, size, share)
                return _Option(flavour, layout, rank, recipe, size, few, memory, share > 1, price)
        return None

    def capacity(self, flavour: Flavour) -> tuple[int, int]:
        """Flavours of one product are told apart by it: the one that comes last is spoken of."""
        return max((layout.gpus for layout in layouts(flavour, self._wishes)), default=0), flavour.memory_bytes

    def why_not(self, flavour: Flavour) -> str:
        """Why nothing fits on `flavour`, in numbers, and what would."""
        wishes = self._wishes
        possible = layouts(flavour, wishes)
        if not possible:
            return self._no_layout(flavour)
        tried = [(layout, recipe, share) for layout in possible for _, recipe, share in self._ways(layout)]
        if not tried:
            return f"{_not_shared(self._recipes(1)[-1])}: set hardware.gpus to 1, or leave offload out"
        able = [way for way in tried if micro_batches(way[1], wishes.micro_batch_size, way[0].gpus)]
        if not able:
            effective = tried[0][1].effective_batch_size
            of = f" in micro-batches of {wishes.micro_batch_size}" if wishes.micro_batch_size else ""
            return (
                f"{tried[0][0]} cannot share training.effectiveBatchSize {effective} evenly{of}: make it a multiple "
                f"of {tried[0][0].gpus * (wishes.micro_batch_size or 1)}"
            )
        layout, recipe, share = able[-1]  # the most GPUs, the recipe that takes the least
        size = micro_batches(recipe, wishes.micro_batch_size, layout.gpus)[-1]
        need = self._need(recipe, size, share)
        short = need - flavour.memory_bytes
        sentence = (
            f"{flavour.memory_bytes / GIB:.1f} GiB ×{layout.gpus}: {recipe.method} at micro-batch {size} × "
            f"{recipe.max_length} tokens needs {need / GIB:.1f} GiB, short by {short / GIB:.1f} GiB"
        )
        if layout.gpus > 1 == share:
            sentence += f"; {_not_shared(recipe)}"
        cures = list(self._cures(flavour, layout, recipe, size, share))
        return f"{sentence}; fits {' or '.join(cures)}" if cures else sentence

    def _no_layout(self, flavour: Flavour) -> str:
        wishes = self._wishes
        gpus = f"GPU{'s' * (flavour.gpus_per_node > 1)}"
        has = f"has {flavour.nodes} node{'s' * (flavour.nodes > 1)} of {flavour.gpus_per_node} {gpus}"
        if flavour.partition and (wishes.gpus or 1) * (wishes.nodes or 1) > 1:
            return "slices of a GPU cannot work together"
        asked = [f"hardware.gpus {wishes.gpus}"] if wishes.gpus else []
        asked += [f"hardware.nodes {wishes.nodes}"] if wishes.nodes else []
        if layouts(flavour, replace(wishes, max_gpus=MANY)):
            return f"{has}, and hardware.maxGPUs {wishes.max_gpus} allows too few for {' and '.join(asked)}"
        return f"{has}, too few for {' and '.join(asked) or 'any'}"

    def _cures(self, flavour: Flavour, layout: Layout, recipe: Recipe, size: int, share: int) -> Iterable[str]:
        """Changes that a user can make, each tried alone."""
        wishes = self._wishes
        shared = self._with(recipe, "optimizer", SHARED_OPTIMIZER)
        alone = layout.gpus > 1 == share  # each of several has the whole model, and could have a part
        if alone and not recipe.half_quadratic and self._fits(shared, size, layout.gpus, flavour):
            yield f"with training.optimizer {SHARED_OPTIMIZER}"
        if recipe.half_quadratic and self._fits(self._with(recipe, "quant_type", "nf4"), size, layout.gpus, flavour):
            yield "with quantization.type nf4"
        if wishes.micro_batch_size and self._fits(recipe, 1, share, flavour) and size > 1:
            yield "with training.microBatchSize 1"
        if length := self._longest(flavour, share, recipe, size):
            yield f"with dataset.maxLength ≤ {length}"
        for name, value, words in _SAVINGS:
            changed = self._with(recipe, name, value)
            if getattr(recipe, name) == value or (changed.half_quadratic and share > 1):
                continue
            if self._fits(changed, size, share, flavour):
                yield words
        for offload in _OFFLOADS[_OFFLOADS.index(recipe.offload) + 1 :]:
            if offload == "parameters" and (recipe.half_quadratic or alone):
                continue
            stepped = shared if offload == "parameters" else recipe
            if self._fits(self._with(stepped, "offload", offload), size, share, flavour):
                # no recipe for several: the optimizer that is set can step nothing that is shared, or on the host
                fixed = offload == "parameters" and not self._recipes(MANY)
                yield f"with training.offload {offload}" + f" and training.optimizer {SHARED_OPTIMIZER}" * fixed
                break
        for more in layouts(flavour, replace(wishes, gpus=None, max_gpus=MANY)):
            if more.gpus <= layout.gpus:
                continue
            if any(
                self._fits(other, sizes[-1], more.gpus, flavour)
                for other in self._recipes(more.gpus)[-1:]
                if (sizes := micro_batches(other, wishes.micro_batch_size, more.gpus))
            ):
                fields = ["hardware.gpus"] if wishes.gpus else []
                fields += ["hardware.maxGPUs"] if more.gpus > wishes.max_gpus else []
                yield f"on {more} ({', '.join(fields)})"
                return

    def _longest(self, flavour: Flavour, share: int, recipe: Recipe, size: int) -> int | None:
        """The longest of some shorter sequences that fits, in tokens. The same are tried for every flavour."""
        lengths = [recipe.max_length * share // 12 // LENGTH_STEP * LENGTH_STEP for share in (10, 8, 6, 4, 3, 2, 1)]
        for length in lengths:
            shorter = self._with(recipe, "max_length", length)
            if length >= SHORTEST and self._fits(shorter, size, share, flavour):
                return length
        return None

    def _fits(self, recipe: Recipe, size: int, gpus: int, flavour: Flavour) -> bool:
        return self._need(recipe, size, gpus) <= flavour.memory_bytes

    def _need(self, recipe: Recipe, size: int, gpus: int) -> int:
        return with_headroom(self.memory(recipe, size, gpus).total_bytes, self._wishes.headroom_percent)


def _not_shared(recipe: Recipe) -> str:
    """Why GPUs cannot share the model."""
    if recipe.half_quadratic:
        return "with quantization.type hqq GPUs do not share the model"
    return f"weights that GPUs share the optimizer {recipe.optimizer} cannot step"


def _as_sold(flavour: Flavour) -> int:
    """A GPU's size as its name gives it, in steps of 4 GiB: of cards of 80 GB none is the smaller for what its driver
    keeps."""
    return round(flavour.memory_bytes / (4 * GIB))


def _why_rather(best: _Option, other: _Option) -> str:
    """The first preference by which `best` comes before `other`."""
    on = f"{best.flavour.product} "
    if other.layout.nodes > best.layout.nodes:
        return f"would do on {other.layout}; {on}does on {best.layout}"
    if other.layout.gpus > best.layout.gpus:
        return f"would do with {other.layout}; {on}does with {best.layout}"
    if other.rank > best.rank:
        return f"fits {other.recipe.method} only; {on}fits {best.recipe.method}"
    if other.few_tokens and not best.few_tokens:
        tokens = other.micro_batch_size * other.recipe.max_length
        return f"fits {tokens} tokens at a time only; {on}fits {best.micro_batch_size * best.recipe.max_length}"
    if _as_sold(other.flavour) > _as_sold(best.flavour):
        return f"would do; {on}is smaller and fits"
    if other.price * other.layout.gpus > best.price * best.layout.gpus:
        return (
            f"would do; {on}costs less" if other.price < float("inf") else f"would do; {on}has a price, this has none"
        )
    return f"would do as well; {on}comes first by name"
