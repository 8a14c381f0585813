"""How many processes and GPUs follow from a configuration."""

from __future__ import annotations

from typing import Any

from lem.spec.experiment import Experiment


def changed(part: Any, *names: str) -> list[str]:
    """Return those of the named options that do not have their defaults."""
    neutral = type(part)()
    return [name for name in names if getattr(part, name) != getattr(neutral, name)]


def gpus_needed(experiment: Experiment) -> int:
    """Return how many GPUs a run on GPUs needs: one for each process, or those that a model is spread over by one."""
    if runs_in_one_process(experiment):
        return experiment.parallelism.degree
    processes, _ = process_counts(experiment)
    return processes


def runs_in_one_process(experiment: Experiment) -> bool:
    """Tell whether one process of lem's spreads the model over several GPUs."""
    strategy = experiment.parallelism.strategy
    own = strategy == "tensor_parallel" and experiment.backend.spreads_a_model_itself
    return own or strategy == "pipeline_parallel"


def process_counts(experiment: Experiment) -> tuple[int, int]:
    """Return how many processes an experiment starts, and how many shares of the prompts they have."""
    strategy, degree = experiment.parallelism.strategy, experiment.parallelism.degree
    if strategy == "tensor_parallel" and not experiment.backend.spreads_a_model_itself:
        return degree, 1
    if strategy == "data_parallel":
        return degree, degree
    return experiment.num_processes, experiment.num_processes


def gpus_per_process(experiment: Experiment) -> int:
    """Return how many GPUs, or on a CPU workers, one process runs the model on."""
    return experiment.parallelism.degree if runs_in_one_process(experiment) else 1
