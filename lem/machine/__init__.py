"""The machine that an experiment runs on: GPUs, the host and its processes."""
