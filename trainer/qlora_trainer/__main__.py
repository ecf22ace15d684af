"""`python -m qlora_trainer`."""

import sys

from qlora_trainer.main import main

sys.exit(main())
