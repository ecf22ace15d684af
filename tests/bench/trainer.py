"""`python -m tests.bench.trainer`: the trainer on the CPU beside TRL and transformers; writes docs/measurements."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.bench import figures, loading, models
from tests.bench.figures import Figure, Measured, Target
from tests.bench.models import ACCUMULATION, LLAMA, MICRO, STEPS, written

RUNS = 10
RECORDER_RUNS, RECORDED = 5, 2000
PAGE = Path(__file__).parents[2] / "docs" / "measurements" / "trainer.md"

# --- steps ---


def measure_steps() -> Measured:
    """CPU seconds of a step of ours and of TRL's, run and run about."""
    import torch
    from transformers import TrainerCallback

    from qlora_api.exchange import DataOrder, DataSource, TrainOrder
    from qlora_trainer.adapter import with_adapter
    from qlora_trainer.checkpoint import Checkpoints, Progress
    from qlora_trainer.environment import quiet_libraries
    from qlora_trainer.flops import Work
    from qlora_trainer.fused_loss import fuse_head
    from qlora_trainer.interruption import Interruption
    from qlora_trainer.learning import Learning, learn
    from qlora_trainer.model import open_base
    from qlora_trainer.optimization import make_optimizer
    from qlora_trainer.quantization import load_for_training
    from qlora_trainer.recording import Recorder
    from qlora_trainer.selection import Selection
    from qlora_trainer.sequences import Sequence
    from qlora_trainer.standing import Standing
    from tests.reference import reference

    torch.set_num_threads(1)
    quiet_libraries()
    cpu, recipe, dice = torch.device("cpu"), models.quantised(), random.Random(0)
    rows = []
    for _ in range(STEPS * recipe.effective_batch_size):
        ids = [dice.randrange(3, 1024) for _ in range(dice.randrange(64, 129))]
        rows.append(Sequence(ids, ids, [len(ids)]))

    with tempfile.TemporaryDirectory() as place:
        written(Path(place) / "base", LLAMA)
        base = open_base(Path(place) / "base", "base")

        def adapted() -> Any:
            return with_adapter(load_for_training(base, recipe, cpu), recipe, base)

        class Clock(TrainerCallback):
            """Both sides' watcher: the CPU's time at the end of each step."""

            def __init__(self) -> None:
                self.ends: list[float] = []

            def see(self, standing: Standing) -> None:
                self.ends.append(time.process_time())

            def on_step_end(self, *_: Any, **__: Any) -> None:
                self.ends.append(time.process_time())

            def taken(self) -> float:
                """Of a step, the median of those after the first."""
                ends, self.ends = self.ends[-STEPS:], []
                return statistics.median(later - earlier for earlier, later in itertools.pairwise(ends))

        model = adapted()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        fuse_head(model)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        order = TrainOrder(
            namespace="bench", job="bench", job_uid="0", attempt=1, work_dir=place, model_uri="base", model_digest="",
            data=DataOrder(train=[DataSource(uri="")]), data_digest="", recipe=recipe, micro_batch_size=MICRO,
            gradient_accumulation=ACCUMULATION, accelerator="cpu", checkpoint_every_seconds=3600, checkpoint_keep=1,
        )  # fmt: skip
        optimizer, scaler = make_optimizer(recipe, weights), torch.amp.GradScaler(enabled=False)
        ours, theirs = Clock(), Clock()
        trainer = reference(
            adapted(), base.tokenizer, rows, recipe, Path(place) / "trl",
            steps=STEPS, micro_batch_size=MICRO, callbacks=[theirs],
        )  # fmt: skip

        def run_ours() -> float:
            progress = Progress()
            work = Work(base.shape, sum(weight.numel() for weight in weights))
            recorder = Recorder([ours], progress, steps=STEPS, steps_per_epoch=STEPS, work=work, device=cpu)
            checkpoints = Checkpoints(Path(place) / "checkpoints", order.bound(), 1)
            best = Path(place) / "best"
            watch = Selection(recipe, progress, best, binding="", steps_per_epoch=STEPS, weights=dict)
            learning = Learning(
                model, optimizer, scaler, recipe, rows, [], STEPS, cpu, pad=0, flat=False, watch=watch
            )  # fmt: skip
            learn(learning, progress, checkpoints, order, Interruption(), recorder)
            return ours.taken()

        def run_theirs() -> float:
            trainer.train()
            return theirs.taken()

        run_ours()
        run_theirs()  # the first of all makes the optimizers' states
        pairs: list[tuple[float, float]] = []
        for number in range(RUNS):  # each begins as often as the other
            if number % 2:
                slow = run_theirs()
                pairs.append((run_ours(), slow))
            else:
                quick = run_ours()
                pairs.append((quick, run_theirs()))
    return Measured((
        Figure("a step", "CPU ms", tuple(1000 * mine for mine, _ in pairs)),
        Figure("a step of SFTTrainer", "CPU ms", tuple(1000 * other for _, other in pairs)),
        Figure("ratio", "", tuple(mine / other for mine, other in pairs), Target("at most", 1.05)),
    ))  # fmt: skip


def measure_recorder() -> Measured:
    """What a step costs that is told to Prometheus' metrics, and what the loop counts before it can learn from one."""
    import torch

    from qlora_operator.sizing.catalogue import catalogue
    from qlora_trainer.checkpoint import Progress
    from qlora_trainer.flops import Work
    from qlora_trainer.metrics import Metrics
    from qlora_trainer.recording import Recorder
    from qlora_trainer.sequences import Sequence

    work = Work(catalogue()["meta-llama/Llama-3.1-8B"].shape, 42_000_000)
    tokens = list(range(2048))
    told, counted = [], []
    for _ in range(RECORDER_RUNS):
        progress = Progress()
        recorder = Recorder(
            [Metrics()], progress, steps=RECORDED, steps_per_epoch=RECORDED, work=work, device=torch.device("cpu")
        )
        telling = counting = 0.0
        for step in range(RECORDED):
            rows = [Sequence(tokens, tokens, [512] * 4) for _ in range(32)]
            began = time.process_time()
            progress.tokens += sum(row.loss_tokens for row in rows)
            counting += time.process_time() - began
            progress.step, progress.seconds = step + 1, step + 1.0
            progress.losses.append(1.0)
            began = time.process_time()
            recorder.stepped(progress, rows, 1e-4, 1.0)
            telling += time.process_time() - began
        told.append(1e6 * telling / RECORDED)
        counted.append(1e6 * counting / RECORDED)
    return Measured((
        Figure("a step of 32 sequences told to the metrics", "CPU µs", tuple(told), Target("at most", 100)),
        Figure("its tokens with loss counted, for the loss", "CPU µs", tuple(counted)),
    ))  # fmt: skip


# --- telling ---

#: How each measure goes about it.
MEANING = {
    "step": "One optimizer step of our loop and of TRL's SFTTrainer with the same model (a small Llama, "
    "NF4, fp32), adapter in fp32 on every linear layer, gradient checkpointing, paged 8-bit AdamW, learning rates and "
    "batches: 4 examples of 64 to 128 tokens, 2 at a time, not packed. CPU time on one thread between the ends of two "
    "steps, so without checkpoints; a run is the median of four steps, and runs alternate.",
    "recorder": "A step's figures worked out and handed to the metrics: 32 new sequences of four packed examples, "
    "65,536 tokens, for an 8B model. How many tokens carry loss the loop has counted before, to divide the loss by it; "
    "that is a figure of its own. A run is the mean of 2000.",
    "loading": "From safetensors in bf16 to a 4-bit model on the CPU, each time in a process of its own: CPU time, and "
    "how far VmHWM (the peak) rose above what was resident before, and VmRSS (what is held in the end). Files are "
    "mapped, so their pages count when they are read. "
    "The dense model has 29 million weights, the mixture 80 million, 76 of them experts, which transformers leaves in "
    "16 bits and we quantise: so beside the seconds of the whole stand the nanoseconds of each weight that is put into "
    "4 bits. Where the page cache maps more than is read at once, resident sizes differ from run to run.",
    "sharding": "The dense model with 16 layers, 114 million weights, 218 MiB of files, and a LoRA adapter on every "
    "linear layer, dealt out by FSDP2 over gloo; all ranks on this machine at once, and of each run the median rank's "
    "figures (some of transformers' processes grow by 600 MiB more and keep them, which are no file's). Ours reads, "
    "quantises and shards layer by layer. Transformers' way is the whole quantised model on every rank, PEFT's "
    "adapter, then FSDP2: what accelerate does with 4-bit weights, also where `cpu_ram_efficient_loading` is set, "
    "which it passes over for them.",
}
MEASURES: Mapping[str, Callable[[], Measured]] = {
    "step": measure_steps,
    "recorder": measure_recorder,
    "loading": loading.measure_loading,
    "sharding": loading.measure_sharding,
}


def page(results: figures.Results) -> str:
    """The page for people, in Markdown."""
    lines = [
        "# The trainer beside TRL and transformers, on the CPU",
        "",
        "Written by `make bench-trainer` (one measure: `python -m tests.bench.trainer loading`); `trainer.json` beside",
        "it has the same for programs. Each figure is the median of its runs; times are of the CPU, on one thread.",
        "",
        *figures.tables(results, MEANING),
        "",
        "## What is the same",
        "",
        "The losses: on the same batches no loss of 50 steps differs from SFTTrainer's by more than a relative 1e-5",
        "(`tests/unit/trainer/test_reference.py`; 9e-7 when it was written). A mixture's logits are bit by bit those",
        "of the model whose experts are replaced by what is left of them after quantisation (`test_experts.py` there);",
        "weights quantised on the CPU are bit by bit those of bitsandbytes (`test_cpu_quantization.py`), and a model",
        "that ranks share is bit by bit the one that is loaded whole (`test_ranks.py`).",
    ]
    return "\n".join(lines) + "\n"


def _versions() -> list[str]:
    return [f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft", "bitsandbytes")]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.trainer", description=__doc__)
    parser.add_argument("measures", nargs="*", choices=[*MEASURES, "all"], default="all", metavar="MEASURE")
    parser.add_argument("--shared", action="store_true", help="say that other work ran on the machine meanwhile")
    parser.add_argument("--dry", action="store_true", help="print only, write nothing to docs/measurements")
    arguments = parser.parse_args()
    kept = PAGE.with_suffix(".json")
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() and not arguments.dry else {}
    for measure in MEASURES if "all" in arguments.measures else arguments.measures:
        setting = figures.setting(f"python -m tests.bench.trainer {measure}", *_versions(), is_shared=arguments.shared)
        results[measure] = figures.result(MEASURES[measure](), setting)
        print(figures.table({measure: results[measure]}, MEANING), flush=True)
        if not arguments.dry:
            kept.write_text(json.dumps(results, indent=2) + "\n")
            PAGE.write_text(page(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
