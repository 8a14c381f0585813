"""The catalog of `lem doctor`'s checks, and the findings of these checks, each with a fact, a status and a remedy.

`CHECKS` is the single source of the checks' names. The names are stable, because programs read them from
`lem doctor --json`. This module does not know how a check is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# ok: nothing to do; limited: it works, but less precisely or only under a condition; missing: it does not work.
Status = Literal["ok", "limited", "missing"]

GROUPS = {
    "energy": "Energy",
    "gpus": "GPUs",
    "machine": "Machine",
    "engines": "Engines",
    "files": "Models and files",
}
# The checks in the order in which they are shown, with the group and the title of each.
CHECKS = {
    "gpu_energy": ("energy", "GPU energy"),
    "gpu_power": ("energy", "GPU power"),
    "rapl": ("energy", "CPU counters"),
    "codecarbon": ("energy", "estimates"),
    "driver": ("gpus", "driver"),
    "visible_gpus": ("gpus", "visible GPUs"),
    "mig": ("gpus", "MIG"),
    "persistence": ("gpus", "persistence"),
    "power_limit": ("gpus", "power limit"),
    "clocks": ("gpus", "clocks"),
    "gpu_processes": ("gpus", "other processes"),
    "governor": ("machine", "CPU governor"),
    "load": ("machine", "other load"),
    "container": ("machine", "container"),
    "scheduler": ("machine", "scheduler"),
    "pytorch": ("engines", "pytorch"),
    "vllm": ("engines", "vllm"),
    "tensorrt": ("engines", "tensorrt"),
    "openai": ("engines", "openai"),
    "launcher": ("engines", "launchers"),
    "adapters": ("engines", "LoRA adapters"),
    "quantization": ("engines", "quantization"),
    "hub": ("files", "model hub"),
    "model_cache": ("files", "model cache"),
    "results_dir": ("files", "results"),
    "disk": ("files", "disk space"),
}


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    `device` is the index of the GPU concerned, or None for the whole machine. `values` holds the numbers behind the
    fact, for programs; their keys name the units.

    Raises:
        KeyError: no check has this name.
    """

    check: str
    status: Status
    fact: str
    remedy: str | None = None
    device: int | None = None
    values: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        CHECKS[self.check]

    @property
    def group(self) -> str:
        """The name of the check's group."""
        return CHECKS[self.check][0]

    @property
    def title(self) -> str:
        """The check's title."""
        return CHECKS[self.check][1]


@dataclass(frozen=True)
class Checkup:
    """All findings about a machine, in the order in which they are shown, and a summary of them.

    `measured` and `estimated` are the components for which `energy=auto` would measure or estimate energy. `engines`
    are the backends that could run a model here.
    """

    findings: tuple[Finding, ...]
    measured: tuple[str, ...]
    estimated: tuple[str, ...]
    engines: tuple[str, ...]

    @property
    def obstacles(self) -> list[str]:
        """The reasons why no experiment can be measured here; empty if there are none."""
        found = [] if self.measured or self.estimated else ["no meter can read or estimate energy"]
        found += [] if self.engines else ["no engine is installed"]
        unusable = any(each.check == "results_dir" and each.status == "missing" for each in self.findings)
        return found + ["the results directory cannot be written to"] * unusable


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return findings in the order of `CHECKS`; findings of the same check are sorted by GPU."""
    places = {name: place for place, name in enumerate(CHECKS)}
    return tuple(sorted(findings, key=lambda each: (places[each.check], -1 if each.device is None else each.device)))
