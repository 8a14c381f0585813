"""Finds the chosen Hydra launcher, checks the options of `hydra/launcher=slurm`, and submits jobs through submitit.

A site's own file in its config directory, `hydra/launcher/<name>.yaml` with `defaults: [slurm]`, is a launcher too.
Later sources take precedence: conf/hydra/launcher/slurm.yaml, the site's file, `hydra.launcher.…=` overrides.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lem.config.options import LAUNCHERS
from lem.config.overrides import first_sentence, is_hydra_setting
from lem.config.problem import Problem, Problems, shortened
from lem.errors import ConfigError, did_you_mean
from lem.results.codec import adapter
from lem.spec.slurm import TARGET, SlurmOptions

GROUP, NODE = LAUNCHERS, "hydra.launcher"
BASIC = "basic"
KEYS = tuple(each.name for each in fields(SlurmOptions))


@dataclass(frozen=True)
class Launcher:
    """The chosen launcher: its options for jobs, the overrides that set them, and where Hydra finds its file."""

    options: SlurmOptions
    settings: tuple[str, ...]
    search_path: tuple[str, ...]


def chosen_launcher(overrides: Sequence[str], config_dir: Path | None) -> Launcher | None:
    """Return the Slurm launcher that the overrides choose, or None if they choose none or `basic`.

    Raises:
        ConfigError: the launcher does not exist or is of another kind, or some of its options are wrong.
    """
    own = [text for text in overrides if is_of_launcher(text)]
    chosen = [text for text in own if _key(text) == GROUP]
    names = [text.partition("=")[2].strip("'\" ") for text in chosen]
    if not chosen or names[-1] == BASIC:
        return None
    given = [text for text in own if text not in chosen]
    if problems := [found for text in given if (found := _unknown_key(text))]:
        raise Problems(problems)
    search_path = ("pkg://lem.conf", *([] if config_dir is None else [f"file://{config_dir.resolve()}"]))
    values = _composed([chosen[-1], *given], search_path)
    target = values.pop("_target_", None)
    if target != TARGET:
        raise ConfigError(
            f"{GROUP}={names[-1]}: lem cannot use this launcher. Choose basic or slurm, or a site's own file with "
            "defaults: [slurm]."
        )
    return Launcher(_checked(values), (chosen[-1], *given), search_path)


class Refused(Exception):
    """Slurm did not accept a job; the message comes from sbatch."""


def submit(
    folder: Path,
    run: Callable[..., None],
    calls: Sequence[Sequence[Any]],
    parameters: Mapping[str, Any],
    python: str | None,
) -> list[str]:
    """Submit a job that calls a function, or a job array if there are several calls; return the id of each job.

    Args:
        folder: where batch files and logs are written; each job gets a folder inside it, named after the job's id.
        run: a function that can be imported by its name on the node.
        calls: for each job, the arguments of the function.
        parameters: submitit's parameters for the jobs.
        python: the command that starts Python on the node; None means the Python that runs this process.

    Raises:
        Refused: Slurm did not accept the job or the job array.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        # %j is the job's id; such names need no quoting in a shell or a Hydra override.
        executor = submitit.SlurmExecutor(folder=str(folder.resolve() / "%j"), python=python)
        executor.update_parameters(**parameters)
        with redirect_stderr(io.StringIO()):  # submitit prints what it also raises
            if len(calls) == 1:
                return [str(executor.submit(run, *calls[0]).job_id)]
            return [str(job.job_id) for job in executor.map_array(run, *zip(*calls, strict=True))]
    except (FailedJobError, FailedSubmissionError, RuntimeError, OSError) as error:
        told = [line.partition("error: ")[2] for line in str(error).splitlines() if "sbatch: error: " in line]
        raise Refused("; ".join(told) or " ".join(str(error).split())[:300]) from None


def complete(folder: Path, run: Callable[..., None], calls: Sequence[Sequence[Any]], ids: Sequence[str]) -> None:
    """Write the files from which submitted jobs read their calls, except for those that `submit` has already written.

    This repairs a submission that was interrupted after Slurm had accepted the jobs.

    Args:
        folder: as for `submit`.
        run: as for `submit`.
        calls: as for `submit`.
        ids: the ids of the jobs, in the order of `calls`.
    """
    from submitit.core.utils import DelayedSubmission, JobPaths

    for job_id, arguments in zip(ids, calls, strict=True):
        file = JobPaths(folder.resolve() / "%j", job_id).submitted_pickle
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            DelayedSubmission(run, *arguments).dump(file)


def is_of_launcher(text: str) -> bool:
    """Return whether an override chooses Hydra's launcher or sets one of its options."""
    return is_hydra_setting(text) and (_key(text) == GROUP or _key(text).startswith(f"{NODE}."))


def _key(text: str) -> str:
    return text.partition("=")[0].lstrip("+~")


def _unknown_key(text: str) -> Problem | None:
    path = _key(text)
    name = path.removeprefix(f"{NODE}.").partition(".")[0]
    if name in KEYS:
        return None
    return Problem("unknown_key", path, f"unknown key.{did_you_mean(name, KEYS)}")


def _composed(overrides: list[str], search_path: Sequence[str]) -> dict[str, Any]:
    """Return the launcher's options, which Hydra composes from the launcher's file and the overrides."""
    from hydra import compose, initialize_config_module
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folders = [Path(each.removeprefix("file://")) for each in search_path if each.startswith("file://")]
    names = [BASIC, "slurm", *(file.stem for folder in folders for file in (folder / GROUP).glob("*.yaml"))]
    root = {"hydra": {"searchpath": list(search_path)}}
    ConfigStore.instance().store(name="launcher_root", node=root)
    try:
        with initialize_config_module("lem.conf", version_base="1.3"):
            composed = compose("launcher_root", overrides=overrides, return_hydra_config=True)
        node = OmegaConf.select(composed, NODE)
        values = OmegaConf.to_container(node, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        name = overrides[0].partition("=")[2]
        if f"Could not find '{GROUP}/{name}'" in str(error):
            raise ConfigError(
                f"Could not find '{GROUP}/{name}' among {', '.join(names)}.{did_you_mean(name, names)}"
            ) from None
        raise ConfigError(first_sentence(error)) from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _checked(values: dict[str, Any]) -> SlurmOptions:
    """Return the launcher's options, with their types and ranges checked.

    Raises:
        Problems: keys are unknown, or values are of the wrong type or out of range; the error lists all of them.
    """
    from pydantic import ValidationError

    problems = [
        Problem("unknown_key", f"{NODE}.{key}", f"unknown key.{did_you_mean(str(key), KEYS)}")
        for key in values
        if key not in KEYS
    ]
    known = {key: value for key, value in values.items() if key in KEYS}
    try:
        options: SlurmOptions = adapter(SlurmOptions).validate_json(json.dumps(known))
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            wanted = str(detail["msg"]).removeprefix("Input should be ")
            message = f"must be {wanted}, not {shortened(repr(detail['input']))}."
            is_type = str(detail["type"]).endswith(("_type", "_parsing"))
            path = ".".join([NODE, *map(str, detail["loc"])])
            problems.append(Problem("wrong_type" if is_type else "out_of_range", path, message))
        raise Problems(problems) from None
    if options.signal_delay_s >= 60 * options.timeout_min:
        limit = f"the time limit of {options.timeout_min} min (timeout_min)"
        problems.append(Problem("out_of_range", f"{NODE}.signal_delay_s", f"must be shorter than {limit}."))
    if problems:
        raise Problems(problems)
    return options
