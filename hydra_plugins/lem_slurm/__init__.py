"""The class behind `hydra/launcher=slurm`; Hydra accepts launchers only from this namespace package.

Unlike the plugin that it extends, this launcher pickles nothing and waits for nothing. It composes each cell's
configuration and passes it to the task, in this process. The task submits all cells (`lem.studies.slurm`), and the
records of the experiments state how they ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, configure_log, run_job, setup_globals
from hydra.errors import HydraException
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as SubmititLauncher
from omegaconf import open_dict

from lem.config.multirun import SUBMITS


class SlurmLauncher(SubmititLauncher):  # type: ignore[misc]  # Hydra has no types
    """Passes each cell to a task that submits it."""

    def setup(self, *, task_function: Any, **given: Any) -> None:
        """Refuse tasks that would run the cells here, on the login node."""
        if not getattr(task_function, SUBMITS, False):
            raise HydraException(
                "hydra/launcher=slurm works with lem experiment, lem batch and lem campaign, not with other Hydra apps."
            )
        super().setup(task_function=task_function, **given)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose each cell and call the task with it."""
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        return [self._run(list(overrides), number) for number, overrides in enumerate(job_overrides, initial_job_idx)]

    def _run(self, overrides: list[str], number: int) -> JobReturn:
        composed = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(composed):
            composed.hydra.job.id = composed.hydra.job.num = number
        done = run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=composed,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        # Hydra changes this configuration while it composes the next cell.
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        return done
