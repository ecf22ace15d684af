"""`python -m qlora_operator`: run the operator with the settings in $QLORA_CONFIG."""

from __future__ import annotations

import asyncio
import logging

from qlora_operator import settings
from qlora_operator.run import run


def main() -> None:
    """Run until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    logging.getLogger("kopf").setLevel(logging.WARNING)  # it logs every event that it hands on
    asyncio.run(run(settings.load()))


if __name__ == "__main__":
    main()
