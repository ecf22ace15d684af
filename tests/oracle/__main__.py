"""`python -m tests.oracle`: the memory plan beside the oracle, as a table; exit code 1 where they differ too much."""

from __future__ import annotations

import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

from tests.oracle.cases import CASES, TOLERANCE, Compared, compared

PAGE = Path(__file__).parents[2] / "docs" / "measurements" / "oracle.md"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "trl")
GIB = 1024**3
HEADER = """# The memory plan against real model code

Written by `make oracle`. Plan: the peak of `sizing` without fragmentation, CUDA context and cuBLAS' workspaces, that is
what `torch.cuda.max_memory_allocated` would say. Oracle: one optimizer step of the trainer's own code with {libraries}
on tensors without content, all layers, every storage counted while it lives; several GPUs with FSDP2 over a process
group that moves nothing. What CUDA kernels allocate inside is written out from their sources
(`tests/oracle/kernels.py`).

| model | recipe | GPUs | plan GiB | oracle GiB | error |
|---|---|---:|---:|---:|---:|
"""


def row(found: Compared) -> str:
    case = found.case
    figures = f"{found.planned_bytes / GIB:.2f} | {found.counted_bytes / GIB:.2f} | {found.error:+.2%}"
    return f"| {case.model} | {case.words} | {case.gpus} | {figures} |"


def main() -> int:
    rows, worst = [], 0.0
    for case in CASES:
        started = time.monotonic()
        found = compared(case)
        worst = max(worst, abs(found.error))
        rows.append(row(found))
        print(f"{rows[-1]} {time.monotonic() - started:.0f} s", flush=True)
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    PAGE.parent.mkdir(exist_ok=True)
    summary = f"\nWorst error {worst:.2%}, allowed {TOLERANCE:.0%}. Python {platform.python_version()}.\n"
    PAGE.write_text(HEADER.format(libraries=libraries) + "\n".join(rows) + "\n" + summary, encoding="utf-8")
    print(summary)
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
