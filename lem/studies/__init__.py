"""Implements the commands that run experiments: single experiments, sweeps, batches, grids and campaigns."""
