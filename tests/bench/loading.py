"""Loading a 4-bit model, whole and shared between ranks, ours beside transformers': seconds and memory of each process.

Each side has its own process, so that it finds the libraries as it finds them alone; every load is a fork of that one,
so that no import is counted.
"""

from __future__ import annotations

import functools
import multiprocessing
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench import models
from tests.bench.figures import Figure, Measured

LOADS = 3
RANKS = (2, 4)
SIDES = ("ours", "transformers")
#: What one process does: CPU seconds, MiB that it grew to meanwhile, MiB that it has grown by in the end.
Load = tuple[float, float, float]
_COLUMNS = (("time", "CPU s"), ("peak", "MiB"), ("held in the end", "MiB"))


def measure_loading() -> Measured:
    """A dense model and a mixture, each time in a process of its own."""
    found: dict[str, dict[str, list[list[Load]]]] = {}
    with tempfile.TemporaryDirectory() as place, sides() as run:
        for name, config in models.LOADED.items():
            models.written(Path(place) / name, config)
            found[name] = run(Path(place) / name, 1)
    measured: list[Figure] = []
    for name, of_sides in found.items():
        measured += compared(name, of_sides)
    of_a_weight: dict[str, tuple[float, ...]] = {}
    for name in found:
        quantised = models.quantised_weights(models.LOADED[name])
        of_a_weight[name] = tuple(1e9 * run[0][0] / quantised for run in found[name]["ours"])
        measured.append(Figure(f"{name}, ours: time of a quantised weight", "CPU ns", of_a_weight[name]))
    theirs = models.quantised_weights(models.LOADED["dense"])
    dense = tuple(1e9 * run[0][0] / theirs for run in found["dense"]["transformers"])
    measured.append(Figure("dense, transformers: time of a quantised weight", "CPU ns", dense))
    for beside, times in (("dense, ours", of_a_weight["dense"]), ("dense, transformers", dense)):
        ratio = tuple(mine / other for mine, other in zip(of_a_weight["mixture"], times, strict=True))
        measured.append(Figure(f"time of a quantised weight, mixture, ours to {beside}", "", ratio))
    return Measured(tuple(measured))


def measure_sharding() -> Measured:
    """The dense model with more layers and an adapter, dealt out to the ranks of a gloo group."""
    measured: list[Figure] = []
    with tempfile.TemporaryDirectory() as place, sides() as run:
        models.written(Path(place) / "deep", models.DEEP)
        for ranks in RANKS:
            measured += compared(f"{ranks} ranks", run(Path(place) / "deep", ranks))
    return Measured(tuple(measured))


def compared(name: str, found: Mapping[str, list[list[Load]]]) -> Iterator[Figure]:
    """Each side's runs, of several ranks the median, and what ours are to the other's."""
    for column, (part, unit) in enumerate(_COLUMNS):
        mine, theirs = (tuple(statistics.median(load[column] for load in run) for run in found[side]) for side in SIDES)
        for side, values in zip(SIDES, (mine, theirs), strict=True):
            yield Figure(f"{name}, {side}: {part}", unit, values)
        yield Figure(f"{name}: {part}, ratio", "", tuple(a / b for a, b in zip(mine, theirs, strict=True)))


@contextmanager
def sides() -> Iterator[Callable[[Path, int], dict[str, list[list[Load]]]]]:
    """What loads a directory on so many ranks, run and run about."""
    spawned = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, mp_context=spawned) as ours,
        ProcessPoolExecutor(1, mp_context=spawned) as theirs,
    ):

        def run(directory: Path, ranks: int) -> dict[str, list[list[Load]]]:
            found: dict[str, list[list[Load]]] = {side: [] for side in SIDES}
            for _ in range(LOADS):
                for side, process in zip(SIDES, (ours, theirs), strict=True):
                    found[side].append(process.submit(forked, side, directory, ranks).result())
            return found

        yield run


def forked(side: str, directory: Path, ranks: int) -> list[Load]:
    """`side`'s loading of `directory` in `ranks` forks of this process, all at once."""
    warmed(side, ranks > 1)
    with tempfile.TemporaryDirectory() as place, multiprocessing.get_context("fork").Pool(ranks) as pool:
        tasks = [(side, directory, rank, ranks, Path(place) / "store") for rank in range(ranks)]
        return pool.starmap(load, tasks, chunksize=1)


@functools.cache
def warmed(side: str, shared: bool) -> None:
    """Import what a load imports, by having a fork's work done on a tiny model, and its parent import the same."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries talking to one another
    with tempfile.TemporaryDirectory() as place:
        for name, config in models.LOADED.items():
            if not (shared and name == "mixture"):
                models.written(Path(place) / name, models.tiny(config))
                LOADERS[side, False](Path(place) / name, None)()
    if shared and side == "ours":
        import qlora_trainer.sharding  # noqa: F401
    elif shared:
        import peft  # noqa: F401
        import torch.distributed.fsdp


def load(side: str, directory: Path, rank: int, ranks: int, store: Path) -> Load:
    """One process' load."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    mesh = None
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        mesh = init_device_mesh("cpu", (ranks,))
    loads = LOADERS[side, ranks > 1](directory, mesh)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, began = _resident("VmRSS"), time.process_time()
    model = loads()
    taken = time.process_time() - began
    assert model is not None
    grown = taken, _resident("VmHWM") - before, _resident("VmRSS") - before
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
    return grown


def _ours(directory: Path, mesh: Any) -> Callable[[], Any]:
    import torch

    from qlora_trainer.model import open_base
    from qlora_trainer.quantization import load_for_training

    base = open_base(directory, "base")
    return lambda: load_for_training(base, models.RECIPE, torch.device("cpu"))


def _ours_shared(directory: Path, mesh: Any) -> Callable[[], Any]:
    import torch

    from qlora_trainer.model import open_base
    from qlora_trainer.sharding import load_sharded

    base = open_base(directory, "base")
    return lambda: load_sharded(base, models.RECIPE, torch.device("cpu"), mesh)


def _theirs(directory: Path, **settings: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    return AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            **settings,
        ),
    )


def _theirs_shared(directory: Path, mesh: Any) -> Any:
    """The whole model in 4 bits on every rank, PEFT's adapter, and each layer handed to FSDP2: as accelerate does it
    where the model is quantised, for only what is loaded as it is stored can come from one rank."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.distributed.fsdp import fully_shard

    model = _theirs(directory, bnb_4bit_quant_storage=torch.bfloat16)
    model.requires_grad_(False)
    recipe = models.RECIPE
    adapter = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, target_modules=list(recipe.target_modules), task_type="CAUSAL_LM"
    )
    adapted: Any = get_peft_model(model, adapter)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(adapted, mesh=mesh)
    return adapted


#: By side, and whether ranks share the model: what gets a directory ready to be loaded.
LOADERS: Mapping[tuple[str, bool], Callable[[Path, Any], Callable[[], Any]]] = {
    ("ours", False): _ours,
    ("ours", True): _ours_shared,
    ("transformers", False): lambda directory, _: lambda: _theirs(directory),
    ("transformers", True): lambda directory, mesh: lambda: _theirs_shared(directory, mesh),
}


def _resident(line: str) -> float:
    """MiB, as the kernel counts for this process."""
    found = re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if not found:
        raise RuntimeError(f"/proc/self/status has no {line}")
    return int(found[1]) / 1024
