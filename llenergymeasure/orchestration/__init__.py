"""Holds only `launcher`; see `lem.cli.direct`."""
