"""Makes `python -m lem` run the `lem` command."""

import sys

# With -m, Python searches the working directory for modules first. There, a user's yaml.py, say, would hide the library
# of that name.
if not sys.flags.safe_path:
    del sys.path[0]

from lem.cli import main

main()
