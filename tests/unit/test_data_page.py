"""docs/data.md: its table is the code's, and its examples are what it calls them. `make generate` writes the table."""

from __future__ import annotations

import json
import re

from qlora_api.findings import FINDINGS
from qlora_trainer.formats import DATA_SUFFIXES, FORMATS, parse_row
from tests.cluster.settings import REPOSITORY

PAGE = REPOSITORY / "docs" / "data.md"
START, END = "<!-- findings -->\n", "<!-- /findings -->\n"


def table() -> str:
    rows = [f"| `{code}` | {kind.severity} | {kind.meaning} | {kind.cure} |" for code, kind in FINDINGS.items()]
    return "\n".join(["| finding | | what it means | what to do |", "|---|---|---|---|", *rows]) + "\n"


def written(page: str) -> str:
    before, _, rest = page.partition(START)
    return f"{before}{START}{table()}{END}{rest.partition(END)[2]}"


def test_the_table_is_that_of_the_code() -> None:
    assert PAGE.read_text() == written(PAGE.read_text()), "run `make generate`"


def test_every_format_has_an_example_that_is_of_it() -> None:
    shown = re.findall(r"^`([a-z-]+)`: .*?```json\n(.*?)\n```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert [name for name, _ in shown] == ["messages", "prompt-completion", "sharegpt", "instruction", "text"]
    assert {name for name, _ in shown} == set(FORMATS)
    for name, text in shown:
        assert parse_row(json.loads(text), None)[1:] == (name, set())


def test_every_kind_of_file_is_named() -> None:
    assert re.findall(r"^\| `(\.\w+)` \|", PAGE.read_text(), re.MULTILINE) == list(DATA_SUFFIXES)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
