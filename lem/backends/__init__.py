"""The inference backends. Each has a main module, with a class; all classes have the same interface.

To add a backend, write a module here that passes the contract suite, define its options in `lem.spec.engines`, add its
YAML to `conf/backend/`, and add a line to the table in `backend_class`.
"""

from __future__ import annotations

from lem.backends.base import Backend, Encoded, Generation
from lem.spec.experiment import Experiment

__all__ = ["Backend", "Encoded", "Generation", "backend_class", "make_backend"]


def backend_class(name: str) -> type[Backend]:
    """Return a backend's class. This does not import the engine; `Backend.start` does."""
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
    """Return a new backend for the experiment; nothing is loaded yet."""
    return backend_class(experiment.backend.name)(experiment)
