"""What the run runs on: GPUs, the host, families of processes."""
