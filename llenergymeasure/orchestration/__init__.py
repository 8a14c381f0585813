"""Holds `launcher` alone; see `lem.cli.direct`."""
