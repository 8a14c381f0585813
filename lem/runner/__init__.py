"""Runs one experiment, from preflight to its row in the tables."""
