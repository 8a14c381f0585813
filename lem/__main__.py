"""`python -m lem` is the `lem` command."""

import sys

# Python looks for modules in the working directory first, which may be somebody's folder with a yaml.py.
if not sys.flags.safe_path:
    del sys.path[0]

from lem.cli import main

main()
