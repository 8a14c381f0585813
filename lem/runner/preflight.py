"""Everything that can be known to be wrong before the first joule: (experiment, host) -> objections and prompts.

Finds the model, loads the prompts, asks the backend, and holds the options against this machine and its files; those
against each other are `lem.spec.conflicts`'. Loads no weights and leaves nothing behind.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lem.backends import backend_class
from lem.energy.objections import objections as energy_objections
from lem.errors import BadInput, ConfigError
from lem.machine.gpu import Gpu, pick
from lem.machine.host import Host
from lem.results.store import Store
from lem.spec.conflicts import conflicts
from lem.spec.experiment import Dataset, Experiment, Traffic
from lem.spec.processes import changed, gpus_needed
from lem.spec.rules import Objection, without_effect
from lem.workload import builtin, tiny
from lem.workload.datasets import load_prompts
from lem.workload.models import Model, find
from lem.workload.prompts import Prompts
from lem.workload.traffic import recorded_times_s

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ready:
    """An experiment that can run: its model is there, its prompts are loaded."""

    experiment: Experiment
    model: Model | None
    prompts: Prompts
    warnings: tuple[Objection, ...]
    # When the requests of a trace arrive; None where the configuration alone says it.
    arrivals_s: Sequence[float] | None = None


def preflight(
    experiment: Experiment,
    host: Host,
    *,
    force: bool = False,
    load: Callable[[Dataset, int], Prompts] = load_prompts,
) -> Ready:
    """Check an experiment against this machine.

    Args:
        experiment: already checked by itself (types, ranges).
        host: the machine.
        force: run despite objections that are only inadvisable.
        load: loads the prompts; whoever checks many experiments may remember them.

    Raises:
        ConfigError: all the reasons why it cannot run, or should not.
    """
    prompts, arrivals_s = None, None
    model, problems, warnings = _without_prompts(experiment, host, force=force)
    try:
        prompts = load(experiment.dataset, experiment.seed)
    except BadInput as error:
        problems.append(str(error))
    try:
        arrivals_s = recorded_times_s(experiment.traffic, len(prompts.texts) if prompts else 0)
    except BadInput as error:
        problems.append(str(_bad_arrivals(error)))
    if problems or prompts is None:
        raise ConfigError(*dict.fromkeys(problems))
    log.debug("prompts: %d of %d from %s", len(prompts.texts), prompts.available, prompts.source)
    return Ready(experiment, model, prompts, warnings, arrivals_s)


def check_again(
    experiment: Experiment, host: Host, *, force: bool = False, has_arrivals: bool = False
) -> tuple[Objection, ...]:
    """Check an experiment that was begun before, whose prompts are written down; return the warnings.

    Args:
        experiment: what it was begun with.
        host: the machine.
        force: run despite objections that are only inadvisable.
        has_arrivals: those of its trace are written down as well, so that the file plays no part any more.

    Raises:
        ConfigError: all the reasons why it cannot run here and now, or should not.
    """
    needless = frozenset({"traffic_trace"} if has_arrivals else ())
    _, problems, warnings = _without_prompts(experiment, host, force=force, needless=needless)
    if problems:
        raise ConfigError(*problems)
    return warnings


def _without_prompts(
    experiment: Experiment, host: Host, *, force: bool, needless: frozenset[str] = frozenset()
) -> tuple[Model | None, list[str], tuple[Objection, ...]]:
    """Return the model, what speaks against a run, and what is only to be warned of; not by the rules in `needless`."""
    problems: list[str] = []
    model = None
    try:
        model = _model(experiment)
    except BadInput as error:
        problems.append(str(error))
    found = [o for o in objections(experiment, host, model) if o.code not in needless]
    log.debug("model: %s; objections: %s", model, [o.code for o in found])
    blocking = [o for o in found if o.severity == "impossible" or (o.severity == "inadvisable" and not force)]
    problems += [str(o) if o.severity == "impossible" else f"{o} (--force runs it all the same)" for o in blocking]
    return model, problems, tuple(o for o in found if o not in blocking)


def objections(experiment: Experiment, host: Host, model: Model | None = None) -> list[Objection]:
    """Return all that speaks against an experiment on a machine, without looking for the model or loading prompts.

    Args:
        experiment: already checked by itself (types, ranges).
        host: the machine.
        model: where it has been found; without it nothing is said about its config.
    """
    wrong = list(_wrong_gpus(experiment, host))
    if wrong:  # what else there is to say is said of the GPUs that there are
        experiment = replace(experiment, gpus=None)
    chosen = host.only(experiment.gpus)
    return [
        *conflicts(experiment),
        *wrong,
        *_too_few_gpus(experiment, chosen),
        *_without_gpu(experiment, chosen),
        *backend_class(experiment.backend.name).objections(experiment, model, chosen),
        *energy_objections(experiment.energy, chosen, uses_gpu=_wants_gpu(experiment, chosen)),
        *_arrivals(experiment.traffic),
        *_sources(experiment),
        *_results(experiment.io.results_dir),
    ]


def _model(experiment: Experiment) -> Model | None:
    if experiment.model is None:
        raise ConfigError("No model: name one with --model or model=… (--model tiny comes with lem).")
    if experiment.backend.name == "simulated":
        return None
    return find(experiment.model, experiment.revision)


# ------------------------------------------------------------------ GPUs
def _wants_gpu(experiment: Experiment, host: Host) -> bool:
    return backend_class(experiment.backend.name).wants_gpu(experiment, host)


def _wrong_gpus(experiment: Experiment, host: Host) -> Iterator[Objection]:
    """Object to entries of `gpus` that mean no visible GPU, or one that was named before."""
    if experiment.gpus is None:
        return
    if not host.gpus:
        yield Objection("no_gpu", "gpus", "no NVIDIA GPU is visible.", "Leave gpus out; lem gpus shows what is there.")
        return
    seen: list[Gpu] = []
    for entry in experiment.gpus:
        gpu = pick(entry, host.gpus)
        if gpu is None:
            reason = f"{entry} is not one of the visible GPUs, {_indices(host)}."
            yield Objection("unknown_gpu", "gpus", reason, "lem gpus shows them and their UUIDs.")
        elif gpu in seen:
            yield Objection("repeated_gpu", "gpus", f"{entry} means a GPU that is named before it.", "Name each once.")
        else:
            seen.append(gpu)


def _indices(host: Host) -> str:
    return "0" if len(host.gpus) == 1 else f"0 to {len(host.gpus) - 1}"


def _too_few_gpus(experiment: Experiment, host: Host) -> Iterator[Objection]:
    needed, there = gpus_needed(experiment), len(host.gpus)
    if not _wants_gpu(experiment, host) or needed <= there:
        return
    path = "num_processes" if experiment.parallelism.strategy == "none" else "parallelism.degree"
    where = "visible" if experiment.gpus is None else "named in gpus"
    yield Objection("too_few_gpus", path, f"GPUs needed: {needed}, {where}: {there}.", "Lower it.")


def _without_gpu(experiment: Experiment, host: Host) -> Iterator[Objection]:
    """Object to options about GPUs where the run is on the CPU."""
    if _wants_gpu(experiment, host):
        return
    if experiment.gpus is not None and host.gpus:
        yield without_effect("no_effect_gpus", "gpus", "the run uses no GPU.", "Leave it out, or run on a GPU.")
    if experiment.cooldown.to_c is not None:
        yield without_effect("no_effect_without_gpu", "cooldown.to_c", "the run uses no GPU.", "Use cooldown.wait_s.")


# ------------------------------------------------------------------ files
def _arrivals(traffic: Traffic) -> Iterator[Objection]:
    try:
        recorded_times_s(traffic, 0)
    except BadInput as error:
        yield _bad_arrivals(error)


def _bad_arrivals(error: BadInput) -> Objection:
    return Objection("traffic_trace", "traffic.trace", str(error), "")


def _sources(experiment: Experiment) -> Iterator[Objection]:
    """Object to options of the hub where model or prompts do not come from it."""
    model, dataset = experiment.model or "", experiment.dataset
    is_local = model == tiny.NAME or (bool(model) and Path(model).expanduser().is_dir())
    if experiment.revision is not None and is_local and experiment.backend.name != "simulated":
        yield without_effect("no_effect_revision", "revision", f"{model} does not come from the hub.", "Leave it out.")
    path = dataset.path or ""
    if path.startswith(builtin.PREFIX) or Path(path).expanduser().is_file():
        for name in changed(dataset, "config", "files"):
            yield without_effect(
                "no_effect_dataset_option",
                f"dataset.{name}",
                f"{path} does not come from the hub.",
                "Leave it out.",
            )


def _results(results_dir: str) -> Iterator[Objection]:
    store = Store(Path(results_dir))
    for folder in (store.root / "raw", store.experiments_table, store.requests_table):
        # Not Path.exists, which raises where a parent may not be read.
        there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
        if not os.path.isdir(there):
            reason = f"{there} is a file"
        elif not os.access(there, os.W_OK | os.X_OK):
            reason = f"{there} cannot be written to"
        else:
            continue
        yield Objection("results_unwritable", "io.results_dir", f"it cannot be used: {reason}.", "Choose another.")
        return
