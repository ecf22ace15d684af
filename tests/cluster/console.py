"""Progress for people: a live line or bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
PLAIN_INTERVAL_SECONDS = 15.0


class Step:
    """One piece of work under way, told about by `say` and, where a total is known, by `advance`."""

    def __init__(self, title: str, total: int | None = None) -> None:
        self.title, self.total, self.done, self.detail = title, total, 0, ""
        self.began = self.last_line = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
            if total is not None:
                columns[2:2] = [BarColumn(bar_width=30), MofNCompleteColumn()]
            columns.append(TextColumn("[dim]{task.fields[detail]}"))
            bar = Progress(*columns, console=console, transient=True)
            self._task = bar.add_task(title, total=total, detail="")
            bar.start()
            self._bar = bar

    def say(self, detail: str) -> None:
        """What is being worked on just now."""
        self.detail = detail.strip()[:80]
        self._show()

    def advance(self, detail: str = "") -> None:
        """One more of `total` is done."""
        self.done += 1
        self.say(detail or self.detail)

    def _show(self) -> None:
        if self._bar:
            self._bar.update(self._task, completed=self.done, detail=self.detail)
        elif time.monotonic() - self.last_line > PLAIN_INTERVAL_SECONDS:
            self.last_line = time.monotonic()
            count = f" {self.done}/{self.total}" if self.total is not None else ""
            console.print(f"   {self.title}:{count} {self.detail} ({self.last_line - self.began:.0f} s)", markup=False)

    def close(self, failed: bool) -> None:
        if self._bar:
            self._bar.stop()
        mark = "FAILED" if failed else "done"
        console.print(f" - {self.title}: {mark} in {time.monotonic() - self.began:.1f} s", markup=False)


@contextmanager
def step(title: str, total: int | None = None) -> Iterator[Step]:
    """Announce a piece of work, show how it goes, and say how long it took."""
    if not console.is_terminal:
        console.print(f" - {title} ...", markup=False)
    work = Step(title, total)
    try:
        yield work
    except BaseException:
        work.close(failed=True)
        raise
    work.close(failed=False)


def tell(line: str) -> None:
    """One line for people, on stderr: stdout is kept for what scripts read."""
    console.print(line, markup=False)
