"""The parts of a rule's example: an experiment written as overrides, a machine, and a model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import yaml

from lem.machine.host import Host
from lem.runner.preflight import objections
from lem.spec.campaign import Measure
from lem.spec.conflicts import unmeasured
from lem.spec.engines import BACKENDS
from lem.spec.experiment import Experiment
from lem.spec.rules import Objection
from lem.workload.models import Model
from tests.backends.features import changed_at
from tests.hosts import CPU, ONE

# Options that several families of rules need.
SAMPLED = "decoder.do_sample=true"
CONTINUOUS = "batching.strategy=continuous"
ON_CPU = "backend.device=cpu"
EIGHT_BIT = ("quantization.quantization=true", "quantization.load_in_8bit=true")
FOUR_BIT = ("quantization.quantization=true", "quantization.load_in_4bit=true")
POISSON = ("traffic.pattern=poisson", "traffic.target_qps=1.0")


def spread(strategy: str, degree: int) -> tuple[str, str]:
    """Return the overrides for parallelism."""
    return f"parallelism.strategy={strategy}_parallel", f"parallelism.degree={degree}"


@dataclass(frozen=True)
class Asked:
    """An experiment, its machine, its model if that has been found, and the measure by which a campaign compares it."""

    experiment: Experiment
    host: Host
    model: Model | None
    primary: Measure | None = None

    def objections(self) -> list[Objection]:
        """Return lem's objections."""
        of_campaign = unmeasured(self.experiment, self.primary) if self.primary else ()
        return [*objections(self.experiment, self.host, self.model), *of_campaign]


class Example(NamedTuple):
    """A rule, the option that it objects to, a case that breaks the rule, and a similar case that does not."""

    code: str
    path: str
    provoked_by: Asked
    not_by: Asked


def asks(*overrides: str, host: Host = CPU, model: Model | None = None, primary: Measure | None = None) -> Asked:
    """Return the experiment that these overrides would give on the command line."""
    experiment = Experiment(model="owner/name")
    for override in overrides:
        path, _, text = override.partition("=")
        value = yaml.safe_load(text)
        if path == "backend":
            experiment.backend = BACKENDS[value]()
        else:
            experiment = changed_at(experiment, "energy.name" if path == "energy" else path, value)
    return Asked(experiment, host, model, primary)


def model(folder: str = "model", **config: object) -> Model:
    """Return a model in a folder, with some values of its config.json."""
    return Model("a model", folder, None, config)


simulated = partial(asks, "backend=simulated")
vllm = partial(asks, "backend=vllm")
tensorrt = partial(asks, "backend=tensorrt", host=ONE)
server = partial(asks, "backend=openai")
