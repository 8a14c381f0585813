"""Keeps a campaign on one type of node of a Slurm cluster, so that its cycles run on the same board.

Slurm reports the GPUs, cores and features that each node is configured to have. It may not report
which GPU or CPU exactly a node has; the column `device` of each row shows the board afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace

from lem.machine import slurm
from lem.machine.slurm import Node
from lem.spec.slurm import SlurmOptions

# Options of sbatch that choose nodes; the user may give them as additional parameters.
CHOOSE_NODES = {"constraint", "nodelist", "gres", "gpus", "gpus-per-node"}


def kept_on_one_type(options: SlurmOptions, gpus: int, ran_on: Collection[str]) -> tuple[SlurmOptions, str | None]:
    """Return options that exclude all nodes but those of one type, and a sentence that says so.

    Nothing changes if the user has chosen nodes or if only one type is possible; the sentence is then None. A campaign
    that has begun stays on the type of most nodes that it has used. A new campaign gets the type with the most
    usable nodes, because the queue for these nodes is probably the shortest.

    Args:
        options: the options of the campaign's jobs.
        gpus: how many GPUs a job needs.
        ran_on: the nodes on which cells of the campaign have run.
    """
    chosen = options.gpu_type or options.constraint or options.nodelist
    if chosen or CHOOSE_NODES & {str(name) for name in options.additional_parameters}:
        return options, None
    excluded = set(slurm.expanded(options.exclude)) if options.exclude else set()
    possible = [node for node in slurm.nodes(options.partition) if node.gpus >= gpus and node.name not in excluded]
    if len({node.kind for node in possible}) < 2:
        return options, None
    kind = _kind(possible, ran_on)
    kept = [node.name for node in possible if node.kind == kind]
    others = [node.name for node in possible if node.kind != kind]
    note = (
        f"The campaign is kept on one type of node: {slurm.shortened(kept)} ({kind}). To choose another, set "
        "hydra.launcher.gpu_type, constraint or nodelist; to use all types, add --across-nodes."
    )
    return replace(options, exclude=slurm.shortened(sorted({*excluded, *others}))), note


def _kind(possible: Collection[Node], ran_on: Collection[str]) -> str:
    before = Counter(node.kind for node in possible if node.name in ran_on)
    usable = Counter(node.kind for node in possible if node.is_usable)
    kinds = before or usable or Counter(node.kind for node in possible)
    # If two types have equally many nodes, the first by name is taken, so that a restarted campaign gets the same type.
    return min(kinds, key=lambda kind: (-kinds[kind], kind))
