"""What the commands that run experiments do: one experiment, sweeps, batches and grids."""
