"""Implements the commands that run experiments: one experiment, sweeps, batches and grids."""
