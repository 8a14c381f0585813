"""lem measures what running a language model costs: joules, seconds, tokens, FLOPs and CO2e.

In Python code, `run` runs an experiment as `lem experiment` does, but without Hydra, and `campaign` runs a campaign.
`load` reads a results directory, `units` returns the units of its columns, and `compare` compares results. Each public
name is imported on first use, so that `import lem` stays fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lem.errors import (
        BadInput,
        ConfigError,
        DatasetError,
        Interrupted,
        LemError,
        ModelError,
        ResultsError,
        RunError,
    )
    from lem.results.frames import load, units
    from lem.results.sides import compare
    from lem.runner.job import Outcome, run
    from lem.spec.experiment import Experiment
    from lem.studies.library import CampaignOutcome, campaign

__all__ = [
    "BadInput",
    "CampaignOutcome",
    "ConfigError",
    "DatasetError",
    "Experiment",
    "Interrupted",
    "LemError",
    "ModelError",
    "Outcome",
    "ResultsError",
    "RunError",
    "__version__",
    "campaign",
    "compare",
    "load",
    "run",
    "units",
]

_HOMES = {
    "CampaignOutcome": "lem.studies.library",
    "Experiment": "lem.spec.experiment",
    "Outcome": "lem.runner.job",
    "campaign": "lem.studies.library",
    "compare": "lem.results.sides",
    "load": "lem.results.frames",
    "run": "lem.runner.job",
    "units": "lem.results.frames",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'lem' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES.get(name, "lem.errors")), name)
