"""How many processes and GPUs an experiment needs, and which of its options are not the defaults."""

from __future__ import annotations

from typing import Any

from lem.spec.experiment import Experiment


def changed(part: Any, *names: str) -> list[str]:
    """Return the named options of a part that differ from their defaults."""
    neutral = type(part)()
    return [name for name in names if getattr(part, name) != getattr(neutral, name)]


def runs_in_one_process(experiment: Experiment) -> bool:
    """Return whether the strategy spreads the model over several GPUs of a single process."""
    strategy = experiment.parallelism.strategy
    return strategy == "pipeline_parallel" or (
        strategy == "tensor_parallel" and experiment.backend.spreads_a_model_itself
    )


def process_counts(experiment: Experiment) -> tuple[int, int]:
    """Return how many processes an experiment starts, and how many replicas of the model they form."""
    strategy, degree = experiment.parallelism.strategy, experiment.parallelism.degree
    if strategy == "tensor_parallel" and not experiment.backend.spreads_a_model_itself:
        return degree, 1
    if strategy == "data_parallel":
        return degree, degree
    return experiment.num_processes, experiment.num_processes


def gpus_needed(experiment: Experiment) -> int:
    """Return how many GPUs a run on GPUs needs: one per process, or the degree if one process spreads the model."""
    if runs_in_one_process(experiment):
        return experiment.parallelism.degree
    processes, _ = process_counts(experiment)
    return processes


def gpus_per_process(experiment: Experiment) -> int:
    """Return how many GPUs (or, on a CPU, workers) one process runs the model on."""
    return experiment.parallelism.degree if runs_in_one_process(experiment) else 1
