"""Holds `launcher` alone; see `lem.apps.direct`."""
