"""One experiment, from preflight to its records."""
