"""The pod around a stage: no network, no home, no name; which device there is."""

from __future__ import annotations

import logging
import os
import resource
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qlora_api.exchange import CLAIMS_MOUNT, CREDENTIALS_MOUNT, mounted_path
from qlora_trainer.failures import BadInput, EnvironmentUnfit
from qlora_trainer.interruption import Interruption
from qlora_trainer.standing import Watcher

if TYPE_CHECKING:
    import torch

log = logging.getLogger("qlora_trainer")


@dataclass(frozen=True)
class Pod:
    """What surrounds a stage: where claims and Secrets are mounted, whether the pod was told to stop, and who watches.

    `inputs` has what was brought from stores, by the field of the spec that names it.
    """

    interruption: Interruption
    claims: str = CLAIMS_MOUNT
    watchers: tuple[Watcher, ...] = ()
    credentials: str = CREDENTIALS_MOUNT
    inputs: Mapping[str, Path] = field(default_factory=dict)

    def path_of(self, uri: str, field: str) -> Path:
        """Where `uri` lies here. Raises BadInput, naming `field` of the spec, when the scheme is not known."""
        if field in self.inputs:
            return self.inputs[field]
        try:
            return Path(mounted_path(uri, claims=self.claims))
        except ValueError as error:
            raise BadInput(f"{field}: {error}") from error


def prepare_process() -> None:
    """Plain log lines on stdout, and libraries that ask no network, no password file and no terminal.

    To be called before torch or transformers are imported: they read their environment once.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("USER", "qlora")  # torch asks for the user's name; a pod's uid has none
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.WARNING, force=True)
    log.setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries talking to one another
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")


def quiet_libraries() -> None:
    """No progress bars in logs that people read line by line."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def pick_device(accelerator: Literal["nvidia", "amd", "cpu"], *, cpu_allowed: bool) -> torch.device:
    """The device to train on. Raises EnvironmentUnfit when a GPU was ordered, none works and the CPU is not allowed."""
    import torch

    if accelerator == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if cpu_allowed:
        log.info("no GPU here; the installation allows the CPU")
        return torch.device("cpu")
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    raise EnvironmentUnfit(
        f"the plan asks for an NVIDIA GPU and this node offers none to the pod (torch {torch.__version__}, {built}): "
        "check the device plugin and the driver of the node"
    )


def device_name(device: torch.device) -> str:
    """What people call the device."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_memory_bytes(device: torch.device) -> int:
    """GPU memory reserved at the peak; on the CPU the largest resident size of this process (ru_maxrss is in KiB)."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gpu_memory_bytes(device: torch.device) -> dict[str, int]:
    """GPU memory by kind: allocated, reserved by the allocator, and the most it has reserved; empty on the CPU."""
    import torch

    if device.type != "cuda":
        return {}
    statistics = torch.cuda.memory_stats(device)
    return {
        "allocated": statistics["allocated_bytes.all.current"],
        "reserved": statistics["reserved_bytes.all.current"],
        "reserved_peak": statistics["reserved_bytes.all.peak"],
    }
