"""`python -m lem.cli`."""

from lem.cli import main

main()
