"""`accelerate launch --num_processes 2 -m llenergymeasure.orchestration.launcher …`, the same as `-m lem.worker …`."""

from __future__ import annotations

import sys

from lem.apps.direct import main

if __name__ == "__main__":
    sys.exit(main())
