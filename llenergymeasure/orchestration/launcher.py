"""`accelerate launch … -m llenergymeasure.orchestration.launcher …`, which is the same as `-m lem.cli.direct …`."""

from __future__ import annotations

import sys

from lem.cli.direct import main

if __name__ == "__main__":
    sys.exit(main())
