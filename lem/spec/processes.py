"""Counts the processes and GPUs that an experiment needs, and finds the options that differ from their defaults."""

from __future__ import annotations

from typing import Any

from lem.spec.experiment import Experiment


def changed(part: Any, *names: str) -> list[str]:
    """Return the named options that differ from their defaults."""
    neutral = type(part)()
    return [name for name in names if getattr(part, name) != getattr(neutral, name)]


def runs_in_one_process(experiment: Experiment) -> bool:
    """Return whether a single process spreads the model over several GPUs."""
    strategy = experiment.parallelism.strategy
    return strategy == "pipeline_parallel" or (
        strategy == "tensor_parallel" and experiment.backend.spreads_a_model_itself
    )


def process_counts(experiment: Experiment) -> tuple[int, int]:
    """Return the number of processes that an experiment starts, and the number of replicas that they form."""
    strategy, degree = experiment.parallelism.strategy, experiment.parallelism.degree
    if strategy == "tensor_parallel" and not experiment.backend.spreads_a_model_itself:
        return degree, 1
    if strategy == "data_parallel":
        return degree, degree
    return experiment.num_processes, experiment.num_processes


def gpus_needed(experiment: Experiment) -> int:
    """Return how many GPUs a run on GPUs needs: one per process, or `degree` if one process spreads the model."""
    if runs_in_one_process(experiment):
        return experiment.parallelism.degree
    processes, _ = process_counts(experiment)
    return processes


def gpus_per_process(experiment: Experiment) -> int:
    """Return the number of GPUs, or of engine workers on a CPU, over which one process spreads the model."""
    return experiment.parallelism.degree if runs_in_one_process(experiment) else 1
