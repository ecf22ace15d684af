"""The processes that train together: which of them this one is, and what they tell one another.

torchrun starts them and says in the environment who each is. Figures and decisions go over gloo, on the CPU: asking
whether anybody was told to stop must not wait for a GPU. Weights and gradients go over the GPUs' own library.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from qlora_trainer.failures import Unavailable

#: So long ranks wait for one another to start: their pods are there, and have libraries to load.
MEETING_PATIENCE = timedelta(minutes=10)
#: Another patience, in seconds, with pods and ranks that do not come.
PATIENCE_ENV = "QLORA_MEETING_SECONDS"
#: A rank that is silent for so long is taken for lost: while the first one downloads and packs, the others wait.
PATIENCE = timedelta(hours=2)
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. Alone, every question is answered by the process itself."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes files and tells the world; exactly one does."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether any rank says yes. All have to ask."""
        return bool(self._reduced([float(flag)], dist.ReduceOp.MAX)[0]) if self.size > 1 else flag

    def total(self, *values: float) -> list[float]:
        """The sums over all ranks, each in double precision. All have to ask."""
        return self._reduced(values, dist.ReduceOp.SUM) if self.size > 1 else list(values)

    def most(self, value: int) -> int:
        """The largest over all ranks. All have to ask."""
        return int(self._reduced([float(value)], dist.ReduceOp.MAX)[0]) if self.size > 1 else value

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes, for all. When that fails there, the others wait until they are stopped."""
        if self.size == 1:
            return make()
        made: list[Any] = [make() if self.first else None]
        dist.broadcast_object_list(made, src=0, device=torch.device("cpu"))
        return made[0]

    def gathered(self, value: T) -> list[T]:
        """What each rank has, in their order. All have to ask."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until all ranks have come here."""
        if self.size > 1:
            self._reduced([0.0], dist.ReduceOp.SUM)

    def sum_gradients(self, weights: list[torch.nn.Parameter]) -> None:
        """Add up the gradients of weights that every rank has whole; in one message, for adapters are small."""
        if self.size == 1:
            return
        for weight in weights:  # what a rank's examples did not reach, another's may have
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()

    def _reduced(self, values: tuple[float, ...] | list[float], how: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, how)
        return tensor.tolist()


ALONE = Ranks()


def is_rank(environment: Mapping[str, str]) -> bool:
    """Whether torchrun has started this process."""
    return "LOCAL_RANK" in environment


@contextmanager
def meeting(environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """Meet the other ranks, and part from them at the end. Raises Unavailable, with who is missing, when they do not
    come."""
    if not is_rank(environment):
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(environment["LOCAL_RANK"]))
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    patience = patience_of(environment, MEETING_PATIENCE)
    # before the backends meet: they wait in C++, where no signal is heard, and do not say for whom
    if missing := roll_call(store, "rank", rank, size, time.monotonic() + patience.total_seconds()):
        raise Unavailable(
            f"{said_of('rank', missing)} of {size} did not come within {patience.total_seconds() / 60:g} minutes, "
            "though the pods are there: their logs say what those processes did; the next attempt begins anew"
        )
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    yield Ranks(dist.get_rank(), dist.get_world_size())
    # a rank that fails leaves as it stands: taking NCCL down waits for the others, who wait for it in a collective
    dist.destroy_process_group()


def patience_of(environment: Mapping[str, str], usual: timedelta) -> timedelta:
    """How long who does not come is waited for."""
    said = environment.get(PATIENCE_ENV)
    return timedelta(seconds=float(said)) if said else usual


def roll_call(store: Store, kind: str, me: int, size: int, deadline: float) -> list[int]:
    """Say in `store` that `me` of `size` is there, and wait for the others; those who are missing at `deadline`."""
    store.set(f"{kind}/{me}", "here")
    missing = list(range(size))
    while missing := [other for other in missing if not store.check([f"{kind}/{other}"])]:
        if time.monotonic() >= deadline:
            break
        time.sleep(0.1)
    return missing


def said_of(kind: str, numbers: Sequence[int]) -> str:
    """`numbers` in words: rank 3; ranks 0, 2; ranks 8 to 15."""
    first, last = numbers[0], numbers[-1]
    if len(numbers) == 1:
        return f"{kind} {first}"
    if len(numbers) > 2 and list(numbers) == list(range(first, last + 1)):
        return f"{kind}s {first} to {last}"
    return f"{kind}s {', '.join(map(str, numbers))}"


def mesh_of(ranks: Ranks, device: torch.device) -> DeviceMesh:
    """All ranks in a row, for weights that they share; a rank that is alone makes a row of one."""
    if not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=HashStore(), rank=0, world_size=1
        )
    return init_device_mesh(device.type, (ranks.size,))


def whole(value: Any) -> Any:
    """`value` as it is without sharding, tensors on the CPU. All ranks have to ask."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value


def whole_state(state: Any) -> Any:
    """An optimizer's state with every tensor whole, on the CPU. All ranks have to ask."""
    if isinstance(state, dict):
        return {key: whole_state(value) for key, value in state.items()}
    return [whole_state(value) for value in state] if isinstance(state, list) else whole(state)


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give `optimizer` a whole state, of however many ranks: each takes its part."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    parts = {
        number: {
            key: like(weights[number], value) if _is_of(weights[number], value) else value
            for key, value in of_weight.items()
        }
        for number, of_weight in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})


def _is_of(weight: torch.Tensor, value: Any) -> bool:
    return isinstance(weight, DTensor) and isinstance(value, torch.Tensor) and value.shape == weight.shape


def like(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value`, which every rank has whole, laid out as `weight` is: this rank's part of it, or all."""
    if not isinstance(weight, DTensor):
        return value.to(weight.device)
    local = weight.to_local()
    parts = list(value.chunk(weight.device_mesh.size()))
    rank = weight.device_mesh.get_local_rank()
    mine = parts[rank] if rank < len(parts) else value[:0]
    return DTensor.from_local(
        mine.to(local.device), weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
    )
