"""Many experiments: sweeps, batches and grids."""
