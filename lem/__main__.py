"""Makes `python -m lem` run the `lem` command."""

import sys

# With -m, Python searches the working directory for modules first, and a user's folder may contain, say, a yaml.py.
if not sys.flags.safe_path:
    del sys.path[0]

from lem.cli import main

main()
