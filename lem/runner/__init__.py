"""One experiment, from preflight to its row."""
