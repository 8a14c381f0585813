"""All the checks that an experiment must pass before it runs on a machine.

Preflight finds the model, loads the prompts, collects the objections of the backend and the meter, and checks the
options against this machine and its files. `lem.spec.conflicts` checks the options against each other. No weights are
loaded, and no files are left behind except in caches.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lem.backends import backend_class
from lem.energy.objections import objections as energy_objections
from lem.errors import BadInput, ConfigError
from lem.machine.gpu import Gpu, pick
from lem.machine.host import KERNELS_FILESYSTEMS, Host, filesystem_type
from lem.results.codec import adapter
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

# Rules that do not apply to cells of a campaign, or to config files that may become arms of one.
OUTSIDE_CAMPAIGNS = frozenset({"no_effect_outside_campaign"})


@dataclass(frozen=True)
class Ready:
    """An experiment that can run: its model is found and its prompts are loaded."""

    experiment: Experiment
    model: Model | None
    prompts: Prompts
    warnings: tuple[Objection, ...]
    # When the requests of a trace arrive; None for other traffic patterns.
    arrivals_s: Sequence[float] | None = None
    # Whether inadvisable options are accepted (--force).
    forced: bool = False


def validated(experiment: Experiment) -> Experiment:
    """Check the types and ranges of an experiment that was made in Python, and return the checked experiment.

    A configuration that Hydra composed has been checked already.

    Raises:
        ConfigError: values have wrong types or are out of range; the error lists all of them.
    """
    from pydantic import ValidationError
    from pydantic_core import PydanticSerializationError

    if not isinstance(experiment, Experiment):
        raise ConfigError(f"An Experiment is needed, not {type(experiment).__name__}; see lem.Experiment.")
    kind = adapter(Experiment)
    try:
        # The experiment is checked as JSON, because a plan is stored as JSON; a value that cannot be stored is wrong.
        checked: Experiment = kind.validate_json(kind.dump_json(experiment, warnings=False))
    except PydanticSerializationError as error:
        raise ConfigError(f"The experiment has a value that is not plain data: {error}.") from None
    except ValidationError as error:
        raise ConfigError(*map(_wrong_value, error.errors(include_url=False))) from None
    return checked


def _wrong_value(detail: Any) -> str:
    group, *rest = detail["loc"]
    # pydantic names the chosen backend as well, as in backend.simulated.sleep.
    path = ".".join(map(str, (group, *(rest[1:] if group == "backend" else rest))))
    return f"{path}: {str(detail['msg']).replace('Input should', 'should')}, not {detail['input']!r}."


def preflight(
    experiment: Experiment,
    host: Host,
    *,
    force: bool = False,
    in_campaign: bool = False,
    load: Callable[[Dataset, int], Prompts] = load_prompts,
    elsewhere: bool = False,
) -> Ready:
    """Check an experiment against this machine, and load its prompts.

    Args:
        experiment: an experiment with checked types and ranges.
        host: the machine.
        force: run despite inadvisable options.
        in_campaign: whether the experiment is a cell of a campaign.
        load: the function that loads the prompts; a caller that checks many experiments may cache them.
        elsewhere: whether the experiment will run on another machine, about which only `host` is known; the sensors are
            then checked there.

    Raises:
        ConfigError: the experiment cannot or should not run; the error lists all reasons.
    """
    prompts, arrivals_s = None, None
    without = OUTSIDE_CAMPAIGNS if in_campaign else frozenset[str]()
    model, reasons, warnings = _without_prompts(experiment, host, force=force, without=without, elsewhere=elsewhere)
    try:
        prompts = load(experiment.dataset, experiment.seed)
    except BadInput as error:
        reasons += error.problems
    try:
        arrivals_s = recorded_times_s(experiment.traffic, len(prompts.texts) if prompts else 0)
    except BadInput as error:
        reasons.append(str(_bad_arrivals(error)))
    if reasons or prompts is None:
        raise ConfigError(*dict.fromkeys(reasons))
    log.debug("prompts: %d of %d from %s", len(prompts.texts), prompts.available, prompts.source)
    return Ready(experiment, model, prompts, warnings, arrivals_s, forced=force)


def check_again(
    experiment: Experiment,
    host: Host,
    *,
    force: bool = False,
    has_arrivals: bool = False,
    in_campaign: bool = False,
) -> tuple[Objection, ...]:
    """Check an experiment that is being resumed, without loading its stored prompts; return the warnings.

    Args:
        experiment: the experiment as it was started.
        host: the machine.
        force: run despite inadvisable options.
        has_arrivals: whether the arrival times from its trace are stored as well, so that the trace file is not needed.
        in_campaign: whether the experiment is a cell of a campaign.

    Raises:
        ConfigError: the experiment cannot or should not run on this machine; the error lists all reasons.
    """
    without = frozenset({"traffic_trace"} if has_arrivals else ()) | (OUTSIDE_CAMPAIGNS if in_campaign else set())
    _, reasons, warnings = _without_prompts(experiment, host, force=force, without=without)
    if reasons:
        raise ConfigError(*reasons)
    return warnings


def _without_prompts(
    experiment: Experiment,
    host: Host,
    *,
    force: bool,
    without: frozenset[str] = frozenset(),
    elsewhere: bool = False,
) -> tuple[Model | None, list[str], tuple[Objection, ...]]:
    """Return the model, the reasons not to run, and the warnings; objections with codes in `without` are skipped.

    With `elsewhere`, objections about the meters of this machine are skipped as well.
    """
    reasons: list[str] = []
    model = None
    try:
        model = _model(experiment)
    except BadInput as error:
        reasons += error.problems
    found = [o for o in objections(experiment, host, model) if o.code not in without]
    if elsewhere:
        found = [o for o in found if not (o.scope == "machine" and o.path.partition(".")[0] == "energy")]
    log.debug("model: %s; objections: %s", model, [o.code for o in found])
    blocking = [o for o in found if o.severity == "impossible" or (o.severity == "inadvisable" and not force)]
    reasons += [str(o) if o.severity == "impossible" else f"{o} (use --force to run it anyway)" for o in blocking]
    return model, reasons, tuple(o for o in found if o not in blocking)


def objections(experiment: Experiment, host: Host, model: Model | None = None) -> list[Objection]:
    """Return all objections to an experiment on a machine, without looking for the model or loading prompts.

    Args:
        experiment: an experiment with checked types and ranges.
        host: the machine.
        model: the model, if it has been found; None skips the rules about the model.
    """
    wrong = list(_wrong_gpus(experiment, host))
    if wrong:  # the other rules then assume all visible GPUs
        experiment = replace(experiment, gpus=None)
    chosen = host.only(experiment.gpus)
    return [
        *conflicts(experiment),
        *wrong,
        *_too_few_gpus(experiment, chosen),
        *_without_gpu(experiment, chosen),
        *backend_class(experiment.backend.name).objections(experiment, model, chosen),
        *energy_objections(experiment.energy, chosen, uses_gpu=wants_gpu(experiment, chosen)),
        *_arrivals(experiment.traffic),
        *_sources(experiment),
        *results_objections(experiment.io.results_dir),
    ]


def _model(experiment: Experiment) -> Model | None:
    if experiment.model is None:
        raise ConfigError("No model is set: choose one with --model or model=… (the model tiny comes with lem).")
    if experiment.backend.name == "simulated":
        return None
    return find(experiment.model, experiment.revision)


# ------------------------------------------------------------------ GPUs
def wants_gpu(experiment: Experiment, host: Host) -> bool:
    """Return whether an experiment runs on, or meters, the GPUs of a host."""
    return backend_class(experiment.backend.name).wants_gpu(experiment, host)


def _wrong_gpus(experiment: Experiment, host: Host) -> Iterator[Objection]:
    """Object to entries of `gpus` that match no visible GPU, or the same GPU as an earlier entry."""
    if experiment.gpus is None:
        return
    if not host.gpus:
        yield Objection("no_gpu", "gpus", "no NVIDIA GPU is visible.")
        return
    seen: list[Gpu] = []
    for entry in experiment.gpus:
        gpu = pick(entry, host.gpus)
        if gpu is None:
            indices = "0" if len(host.gpus) == 1 else f"0 to {len(host.gpus) - 1}"
            yield Objection("unknown_gpu", "gpus", f"{entry} is not one of the visible GPUs ({indices}).")
        elif gpu in seen:
            yield Objection("repeated_gpu", "gpus", f"{entry} is the same GPU as an earlier entry.")
        else:
            seen.append(gpu)


def _too_few_gpus(experiment: Experiment, host: Host) -> Iterator[Objection]:
    needed, there = gpus_needed(experiment), len(host.gpus)
    if not wants_gpu(experiment, host) or needed <= there:
        return
    path = "num_processes" if experiment.parallelism.strategy == "none" else "parallelism.degree"
    where = "visible" if experiment.gpus is None else "named in gpus"
    yield Objection("too_few_gpus", path, f"GPUs needed: {needed}, {where}: {there}.")


def _without_gpu(experiment: Experiment, host: Host) -> Iterator[Objection]:
    """Object to GPU options if the run uses no GPU."""
    if wants_gpu(experiment, host):
        return
    if experiment.gpus is not None and host.gpus:
        yield without_effect("no_effect_gpus", "gpus", "the run uses no GPU.")
    if experiment.cooldown.to_c is not None:
        fact = "the run uses no GPU; cooldown.wait_s works without one."
        yield without_effect("no_effect_without_gpu", "cooldown.to_c", fact)


# ------------------------------------------------------------------ files
def _arrivals(traffic: Traffic) -> Iterator[Objection]:
    try:
        recorded_times_s(traffic, 0)
    except BadInput as error:
        yield _bad_arrivals(error)


def _bad_arrivals(error: BadInput) -> Objection:
    return Objection("traffic_trace", "traffic.trace", str(error))


def _sources(experiment: Experiment) -> Iterator[Objection]:
    """Object to hub options for a model or for prompts that do not come from the hub."""
    model, dataset = experiment.model or "", experiment.dataset
    is_local = model == tiny.NAME or (bool(model) and os.path.isdir(os.path.expanduser(model)))
    if experiment.revision is not None and is_local and experiment.backend.name != "simulated":
        yield without_effect("no_effect_revision", "revision", f"{model} does not come from the hub.")
    path = dataset.path or ""
    if path.startswith(builtin.PREFIX) or os.path.isfile(os.path.expanduser(path)):
        for name in changed(dataset, "config", "files"):
            fact = f"{path} does not come from the hub."
            yield without_effect("no_effect_dataset_option", f"dataset.{name}", fact)


def results_objections(results_dir: str) -> Iterator[Objection]:
    """Object to a results directory that cannot be created or written to."""
    try:
        store = Store(results_dir)
    except BadInput as error:
        yield Objection("results_unwritable", "io.results_dir", str(error))
        return
    try:
        os.stat(store.root / "raw")
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            yield Objection("results_unwritable", "io.results_dir", f"cannot be created: {error.strerror}.")
            return
    folders = (store.root / "raw", store.experiments_table, store.requests_table)
    for folder in dict.fromkeys(folder if os.path.lexists(folder) else store.root for folder in folders):
        if fact := why_unwritable(folder):
            yield Objection("results_unwritable", "io.results_dir", fact)
            return


def why_unwritable(folder: Path) -> str | None:
    """Return why a directory cannot be created or written to; None if nothing on its path prevents this."""
    there = existing(folder)
    nearest = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
    if not os.path.exists(nearest):
        return f"{nearest} is a link to {os.readlink(nearest)}, which cannot be found."
    if not os.path.isdir(there):
        return f"{there} is a file, not a directory."
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} is not writable."
    if (kind := filesystem_type(there)) in KERNELS_FILESYSTEMS:
        return f"{there} is in the kernel's file system {kind}, where no directories can be created."
    return None


def existing(path: Path) -> Path:
    """Return a path or, if it does not exist, its nearest parent directory that does."""
    # Not Path.exists, which raises if a parent directory is not readable.
    return next(each for each in (path, *path.absolute().parents) if os.path.exists(each))
