"""The family of inference backends: one file each, one interface, chosen by the `backend` group.

A new backend is a file here that passes the contract suite, its options in `lem.spec.engines`, its YAML in
`conf/backend/`, and a line below.
"""

from __future__ import annotations

from lem.backends.base import Backend, Encoded, Generation
from lem.spec.experiment import Experiment

__all__ = ["Backend", "Encoded", "Generation", "backend_class", "make_backend"]


def backend_class(name: str) -> type[Backend]:
    """Return the class of a backend; its module imports its engine only when a model is loaded."""
    from importlib import import_module

    module, class_name = {
        "pytorch": ("pytorch", "Pytorch"),
        "simulated": ("simulated", "Simulated"),
        "vllm": ("vllm", "Vllm"),
        "tensorrt": ("tensorrt", "Tensorrt"),
        "openai": ("openai", "Openai"),
    }[name]
    found: type[Backend] = getattr(import_module(f"lem.backends.{module}"), class_name)
    return found


def make_backend(experiment: Experiment) -> Backend:
    """Return the backend that the experiment names, not yet loaded."""
    return backend_class(experiment.backend.name)(experiment)
