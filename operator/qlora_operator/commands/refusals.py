"""How a command ends that cannot do what it was asked for: sentences for people, and an exit code for scripts."""

from __future__ import annotations


class Refusal(Exception):
    """The command ends here. `cli.main` writes the sentences to stderr and exits with the code."""

    exit_code = 2

    def __init__(self, *sentences: str) -> None:
        super().__init__("\n".join(sentences))


class BadInput(Refusal):
    """What was given cannot be read or is not right; each sentence says where, and what to give instead."""


class NoCluster(Refusal):
    """The cluster, or kubectl, is not there or does not let us look."""

    exit_code = 3
