"""The options of `hydra/launcher=slurm`: what a job requests from Slurm, and how the command waits for it.

The options have the same names as in the Hydra plugin hydra-submitit-launcher, so that a site's file for that plugin
can be reused.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any

from pydantic import Field

from lem.spec.fields import config

TARGET = "hydra_plugins.lem_slurm.SlurmLauncher"


@config
class SlurmOptions:
    """What each job requests from Slurm; null leaves the choice to the experiment or to the cluster's defaults."""

    partition: Annotated[str | None, Field(description="Partition; null: the cluster's default.")] = None
    account: Annotated[str | None, Field(description="Account to which the time is charged.")] = None
    qos: Annotated[str | None, Field(description="Quality of service.")] = None
    wckey: Annotated[str | None, Field(description="Workload characterization key, if the site uses such keys.")] = None
    comment: Annotated[str | None, Field(description="Comment that Slurm keeps with the job.")] = None
    timeout_min: Annotated[
        int,
        Field(
            ge=1,
            description="Time limit of a job in minutes; with requeue, an experiment that needs longer is requeued.",
        ),
    ] = 240
    signal_delay_s: Annotated[
        int,
        Field(
            ge=10,
            description="How many seconds before the time limit the experiment stops, keeping its finished requests.",
        ),
    ] = 120
    max_num_timeout: Annotated[
        int, Field(ge=0, description="How many times a job is requeued at its time limit before it counts as failed.")
    ] = 10
    requeue: Annotated[
        bool, Field(description="Whether a job that is preempted or reaches its time limit is requeued and resumed.")
    ] = True
    exclusive: Annotated[
        bool,
        Field(description="Whether a job has its node to itself. If not, the energy of other jobs is measured too."),
    ] = True
    constraint: Annotated[str | None, Field(description="Features that the node must have.")] = None
    nodelist: Annotated[str | None, Field(description="Nodes that may be used.")] = None
    exclude: Annotated[str | None, Field(description="Nodes that must not be used.")] = None
    gpus_per_node: Annotated[
        int | None, Field(ge=0, description="GPUs of a job; null: as many as the experiment needs; 0: run on the CPU.")
    ] = None
    gpu_type: Annotated[str | None, Field(description="The cluster's name for the type of GPU, such as a100.")] = None
    cpus_per_task: Annotated[
        int | None,
        Field(ge=1, description="Cores of a job; null: all of an exclusive node, otherwise one for each process."),
    ] = None
    mem_gb: Annotated[
        float | None,
        Field(
            gt=0, description="Memory of a job in GB; null: all of an exclusive node, otherwise the cluster's default."
        ),
    ] = None
    setup: Annotated[
        list[str], Field(description="Shell commands that run on the node before the experiment, such as module load.")
    ] = field(default_factory=list)
    container: Annotated[
        str | None, Field(description="Image in which the experiment runs; needs the plugin pyxis (--container-image).")
    ] = None
    python: Annotated[
        str | None,
        Field(description="Command that starts Python on the node; null: the Python that runs this command."),
    ] = None
    srun_args: Annotated[list[str], Field(description="Further arguments of srun.")] = field(default_factory=list)
    additional_parameters: Annotated[
        dict[str, Any], Field(description="Further options of sbatch, such as {mail-user: me@site, mail-type: END}.")
    ] = field(default_factory=dict)
    array_parallelism: Annotated[
        int | None, Field(ge=1, description="How many jobs of a sweep or batch may run at once; null: no limit.")
    ] = None
    never_starts_s: Annotated[
        float,
        Field(
            ge=0,
            description="How many seconds a job may wait if the reason will not go away by itself (a limit, a hold, a "
            "closed partition); after that, the job is canceled and counts as failed.",
        ),
    ] = 60.0
    poll_s: Annotated[
        float, Field(ge=0.2, description="Longest pause between two checks of the queue, in seconds.")
    ] = 15.0
    settle_s: Annotated[
        float,
        Field(
            ge=0,
            description="How long after a job's end its files may take to become visible here through the shared file "
            "system, in seconds.",
        ),
    ] = 10.0
