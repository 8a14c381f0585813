"""Implements the commands that run single experiments, sweeps, batches, campaigns and schedules, or write grids."""
