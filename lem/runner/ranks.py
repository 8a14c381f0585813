"""The processes of one experiment that run together on this node: which one this is, and waiting for each other.

The launcher (accelerate's on GPUs, torch's elastic one on the CPU) says who is who in RANK, LOCAL_RANK and
WORLD_SIZE. Knows neither model nor meter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

from lem.errors import RunError

# A rank may wait for as long as another one works,
PATIENCE = timedelta(days=7)
# looks up this often,
SLICE = timedelta(seconds=1)
# and all end at about the same time.
ENDING = timedelta(seconds=60)


@dataclass(frozen=True)
class Ranks:
    """A process alone: nobody to wait for."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    def barrier(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait until all processes have come here; `meanwhile` is called now and then."""

    def close(self) -> None:
        """Part from the others."""


class TorchRanks(Ranks):
    """Processes that a launcher has started, connected by torch.distributed."""

    def barrier(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait for the others; raises what torch raises when one of them is gone."""
        import torch.distributed as dist

        arrival = dist.barrier(group=_gloo(), async_op=True)
        # In slices: Python hears no signal while torch waits.
        while not _came(arrival):
            meanwhile()

    def close(self) -> None:
        """Leave the group."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
            _gloo.cache_clear()


def _came(arrival: Any) -> bool:
    """Wait a while for a barrier; raises what torch raises when another process is gone."""
    try:
        arrival.wait(SLICE)
    except RuntimeError:
        if not arrival.is_completed():
            return False
        arrival.wait()  # it may have come just after the slice had ended
    return True


@cache
def _gloo() -> Any:
    """Return a group whose barriers cost the GPUs nothing."""
    import torch.distributed as dist

    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def named_by_launcher() -> Ranks:
    """Return who this process is, as its launcher says; it is not connected to the others yet."""
    rank = int(os.environ.get("RANK", "0"))
    return Ranks(rank, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("WORLD_SIZE", "1")))


def join(promised: int, *, share_a_model: bool = False) -> Ranks:
    """Return this process among those that the plan promises.

    Args:
        promised: number of processes.
        share_a_model: several processes run one model together, so that its GPUs talk to each other.

    Raises:
        RunError: the launcher has started another number of processes: the work would be done twice or not at all.
    """
    here = named_by_launcher()
    if here.size != promised:
        raise RunError(
            f"The plan has {promised} processes, but the launcher started {here.size}. On a machine without GPUs "
            "accelerate launch starts a single one; use python -m torch.distributed.run --nproc_per_node there."
        )
    if here.size == 1:
        return here
    import torch
    import torch.distributed as dist

    # NCCL only where it is used: it would be one more thing that takes memory and power on every GPU.
    backend = "cpu:gloo,cuda:nccl" if share_a_model and torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=_store(), rank=here.rank, world_size=here.size, timeout=PATIENCE)
    return TorchRanks(here.rank, here.local_rank, here.size)


# ------------------------------------------------------------------ before and after they are connected
@cache
def _store() -> Any:
    """Return the launcher's key-value store, through which its processes find each other."""
    import torch.distributed as dist

    store, _, _ = next(dist.rendezvous("env://"))
    store.set_timeout(PATIENCE)
    return store


def tell(text: str) -> None:
    """Tell the other processes a text, once; each of them hears it."""
    _store().set("lem/told", text)


def hear() -> str:
    """Wait for what the first process tells."""
    return str(_store().get("lem/told").decode())


def say_ended(rank: int) -> None:
    """Let the first process know that this one has written all its files."""
    _store().set(f"lem/ended/{rank}", "")


def wait_for_ends(ranks: Sequence[int]) -> None:
    """Wait until processes have said that they ended, but not for one that never will."""
    if not ranks:
        return
    from torch.distributed import DistStoreError

    try:
        _store().wait([f"lem/ended/{rank}" for rank in ranks], ENDING)
    except DistStoreError:
        return
