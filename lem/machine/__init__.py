"""What an experiment runs on: GPUs, the host, families of processes."""
