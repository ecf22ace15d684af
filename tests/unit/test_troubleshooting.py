"""The page on what goes wrong is the table that the cluster is held against."""

import pytest

from tests.e2e.troubleshooting import ANY, ON_ITS_WAY, PAGE, REFUSED, REFUSED_BY_THE_SERVER, WAITING, Trouble, page

ANYTHING = "any\nthing"
EVERY = (*REFUSED, *WAITING, *ON_ITS_WAY, *REFUSED_BY_THE_SERVER)


def test_the_page_is_as_the_table_says() -> None:
    assert PAGE.read_text() == page(), "run: make generate"


@pytest.mark.parametrize("trouble", EVERY, ids=[trouble.name for trouble in EVERY])
def test_a_message_is_told_from_others(trouble: Trouble) -> None:
    """What varies may be anything, and what is promised may not be missing."""
    message = f"before {trouble.says.replace(ANY, ANYTHING)} after"
    assert trouble.is_said_in(message)
    assert not trouble.is_said_in(message.replace(trouble.says.split(ANY)[-1], ""))
    assert "|" not in trouble.says + trouble.means + trouble.cure, "it stands in a table"
