"""lem measures what running a language model costs: joules, seconds, tokens, FLOPs and CO2e.

As a library: `lem.run(lem.Experiment(model="tiny", dataset=…))` does what `lem experiment` does, without Hydra.
The names are imported when they are first used, so that `import lem` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lem.errors import LemError
    from lem.runner.job import Outcome, run
    from lem.spec.experiment import Experiment

__all__ = ["Experiment", "LemError", "Outcome", "__version__", "run"]

_HOMES = {
    "Experiment": "lem.spec.experiment",
    "LemError": "lem.errors",
    "Outcome": "lem.runner.job",
    "run": "lem.runner.job",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lem' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
