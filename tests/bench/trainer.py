"""`python -m tests.bench.trainer`: the trainer on the CPU beside TRL and transformers; writes docs/measurements."""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.bench import figures
from tests.bench.figures import Figure, Measured, Target

MIB = 1024**2
RUNS = 10
LOADS = 3
STEPS = 5
MICRO, ACCUMULATION = 2, 2
RECORDED = 2000
PAGE = Path(__file__).parents[2] / "docs" / "measurements" / "trainer.md"

_LLAMA = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": None,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_LOADED = {**_LLAMA, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}
#: By name: a dense model, and one of which 95 % are experts.
LOADED: Mapping[str, Mapping[str, Any]] = {
    "dense": {**_LOADED, "intermediate_size": 4096},
    "mixture": {
        **_LOADED, "model_type": "mixtral", "intermediate_size": 1536, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
}  # fmt: skip


def quantised(**changes: Any) -> Any:
    """The usual recipe, on the CPU."""
    from qlora_api.exchange import Recipe

    return Recipe(
        **{
            "method": "qlora", "compute_dtype": "float32", "rank": 16, "alpha": 32, "dropout": 0.05,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "max_length": 128, "packing": False, "loss": "all", "max_steps": STEPS, "learning_rate": 2e-4,
            "schedule": "cosine", "warmup_fraction": 0.03, "effective_batch_size": MICRO * ACCUMULATION,
            "optimizer": "paged_adamw_8bit", "seed": 7, "gradient_checkpointing": True, "attention": "sdpa",
            "max_grad_norm": 1.0, **changes,
        }
    )  # fmt: skip


def written(directory: Path, config: Mapping[str, Any]) -> None:
    """A model with random weights in bf16, and a tokenizer of numbers."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.to(torch.bfloat16).save_pretrained(directory)
    words = {"<pad>": 0, "<unk>": 1, "<end>": 2} | {str(number): number for number in range(3, 1024)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(directory)


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
    cpu, recipe, dice = torch.device("cpu"), quantised(), random.Random(0)
    rows = []
    for _ in range(STEPS * recipe.effective_batch_size):
        ids = [dice.randrange(3, 1024) for _ in range(dice.randrange(64, 129))]
        rows.append(Sequence(ids, ids, [len(ids)]))

    with tempfile.TemporaryDirectory() as place:
        written(Path(place) / "base", _LLAMA)
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
    for _ in range(LOADS + 2):
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


# --- loading ---


def measure_loading() -> Measured:
    """CPU seconds and the growth of the largest resident size, each load in a process of its own."""
    import qlora_trainer.model
    import qlora_trainer.quantization  # noqa: F401  once, before each load has its own process

    measured: list[Figure] = []
    forked = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as place:
        for name, config in LOADED.items():
            directory = Path(place) / name
            written(directory, config)
            found: dict[str, list[tuple[float, ...]]] = {"ours": [], "transformers": []}
            for _ in range(LOADS):
                for whose, runs in found.items():
                    with forked.Pool(1) as pool:
                        runs.append(pool.apply(load, (whose, directory)))
            for column, (part, unit) in enumerate((("time", "CPU s"), ("peak", "MiB"), ("held in the end", "MiB"))):
                mine, theirs = (tuple(run[column] for run in found[whose]) for whose in ("ours", "transformers"))
                measured.append(Figure(f"{name}, ours: {part}", unit, mine))
                measured.append(Figure(f"{name}, transformers: {part}", unit, theirs))
                measured.append(
                    Figure(f"{name}: {part}, ratio", "", tuple(a / b for a, b in zip(mine, theirs, strict=True)))
                )
    return Measured(tuple(measured))


def load(whose: str, directory: Path) -> tuple[float, float, float]:
    """CPU seconds of one load, MiB that the process grew to meanwhile, and MiB that it has grown by in the end."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qlora_trainer.environment import quiet_libraries
    from qlora_trainer.model import open_base
    from qlora_trainer.quantization import load_for_training

    torch.set_num_threads(1)
    quiet_libraries()
    base = open_base(directory, "base")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, began = _resident("VmRSS"), time.process_time()
    if whose == "ours":
        model = load_for_training(base, quantised(compute_dtype="bfloat16"), torch.device("cpu"))
    else:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.bfloat16,
            device_map={"": "cpu"},
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            ),
        )
    taken = time.process_time() - began
    assert model is not None
    return taken, _resident("VmHWM") - before, _resident("VmRSS") - before


def _resident(line: str) -> float:
    """MiB, as the kernel counts for this process."""
    found = re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if not found:
        raise RuntimeError(f"/proc/self/status has no {line}")
    return int(found[1]) / 1024


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
    "how far VmHWM rose above what was resident before. Files are mapped, so their pages count when they are read. "
    "The dense model has 29 million weights, the mixture 80 million, 76 of them experts, which transformers leaves in "
    "16 bits. Where the page cache maps more than is read at once, resident sizes differ from run to run.",
}
MEASURES: Mapping[str, Callable[[], Measured]] = {
    "step": measure_steps,
    "recorder": measure_recorder,
    "loading": measure_loading,
}


def machine() -> str:
    """Processor and cores."""
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return f"{found[1].strip() if found else 'unknown processor'}, {os.cpu_count()} cores"


def page(results: figures.Results) -> str:
    """The page for people, in Markdown."""
    lines = [
        "# The trainer beside TRL and transformers, on the CPU",
        "",
        "Written by `make bench-trainer`. Each figure is the median of its runs; times are of the CPU, on one thread.",
        "",
        *figures.markdown(figures.HEAD, figures.rows(results, MEANING)),
        "",
        f"Machine: {machine()}, Python {sys.version.split()[0]}; {_versions()}.",
        "",
        "## What is measured",
        "",
        *(f"- **{name}**: {text}" for name, text in MEANING.items()),
        "",
        "## What is the same",
        "",
        "The losses: on the same batches no loss of 50 steps differs from SFTTrainer's by more than a relative 1e-5",
        "(`tests/unit/trainer/test_reference.py`; 9e-7 when it was written). A mixture's logits are bit by bit those",
        "of the model whose experts are replaced by what is left of them after quantisation (`test_experts.py` there).",
    ]
    return "\n".join(lines) + "\n"


def _versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft", "bitsandbytes"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.trainer", description=__doc__)
    parser.add_argument("measures", nargs="*", choices=[*MEASURES, "all"], default="all", metavar="MEASURE")
    parser.add_argument("--dry", action="store_true", help="print only, write nothing to docs/measurements")
    arguments = parser.parse_args()
    wanted = list(MEASURES) if "all" in arguments.measures else arguments.measures
    results = {name: figures.result(MEASURES[name](), {}) for name in wanted}
    print(figures.table(results, MEANING))
    if not arguments.dry and set(wanted) == set(MEASURES):
        PAGE.write_text(page(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
