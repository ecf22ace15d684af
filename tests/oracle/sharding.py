"""FSDP2 over GPUs that are not there: every collective succeeds at once and moves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from bitsandbytes.nn import modules
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from qlora_trainer.sharding import spare_the_embedding, units_of

#: What the frozen base is kept in: four values of 4 bits each, so that base, norms and embeddings are of one type.
STORAGE = torch.bfloat16


@contextmanager
def mesh_of(gpus: int) -> Iterator[DeviceMesh | None]:
    """A mesh of so many ranks, of which this process is the first; to be made outside of FakeTensorMode."""
    if gpus == 1:
        yield None
        return
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        with patch.object(modules, "fix_4bit_weight_quant_state_from_module", _found_in_the_module):
            yield init_device_mesh("cpu", (gpus,))
    finally:
        dist.destroy_process_group()


def _found_in_the_module(module: Any) -> None:
    """Scales are not sharded: the layer keeps them beside the weight (bitsandbytes makes a Params4bit of it again)."""
    module.weight.quant_state = module.quant_state


def sharded(model: Any, mesh: DeviceMesh) -> None:
    """In the trainer's own units."""
    for unit in units_of(model):
        fully_shard(unit if len(unit) > 1 else unit[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    spare_the_embedding(model)


def like(weight: Any, shard: Any) -> DTensor:
    """`shard` as this rank's part of a tensor that is sharded as `weight` is."""
    return DTensor.from_local(shard, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride())
