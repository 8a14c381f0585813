"""The processes that run one experiment together on this node: their ranks, barriers and short messages.

A launcher (accelerate's on GPUs, torch's elastic one on the CPU) sets RANK, LOCAL_RANK and WORLD_SIZE. Knows nothing
about models or meters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

from lem.errors import ConfigError, RunError

# A rank may wait while another one works,
BARRIER_TIMEOUT = timedelta(days=7)
# returns to Python this often, which handles no signal while torch waits,
BARRIER_POLL = timedelta(seconds=1)
# and all end at about the same time.
END_TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True)
class Ranks:
    """A process that runs alone and waits for no others."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    def barrier(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait until all processes have arrived; `meanwhile` is called about once a second."""

    def close(self) -> None:
        """Leave the group."""


class TorchRanks(Ranks):
    """Processes that a launcher has started, connected by torch.distributed."""

    def barrier(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait for the others; raises torch's error if one of them is gone."""
        import torch.distributed as dist

        arrival = dist.barrier(group=_gloo(), async_op=True)
        while not _has_arrived(arrival):
            meanwhile()

    def close(self) -> None:
        """Leave the group."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
            _gloo.cache_clear()


def _has_arrived(arrival: Any) -> bool:
    """Wait briefly for a barrier; raises torch's error if another process is gone."""
    try:
        arrival.wait(BARRIER_POLL)
    except RuntimeError:
        if not arrival.is_completed():
            return False
        arrival.wait()  # it may have completed just after the timeout
    return True


@cache
def _gloo() -> Any:
    """Return a process group whose barriers cost the GPUs nothing."""
    import torch.distributed as dist

    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def named_by_launcher() -> Ranks:
    """Return this process's ranks as its launcher has set them, not yet connected to the others.

    Raises:
        ConfigError: they are no numbers.
    """
    named = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    try:
        rank = int(named["RANK"] or 0)
        return Ranks(rank, int(named["LOCAL_RANK"] or rank), int(named["WORLD_SIZE"] or 1))
    except ValueError:
        told = ", ".join(f"{name}={value}" for name, value in named.items() if value is not None)
        raise ConfigError(
            f"The launcher's variables are not numbers: {told}. Unset them, or set all of them."
        ) from None


def join(planned: int, *, share_a_model: bool = False) -> Ranks:
    """Connect this process to the others of the plan.

    Args:
        planned: number of processes.
        share_a_model: several processes run one model together, so that its GPUs talk to each other.

    Raises:
        RunError: the launcher started a different number of processes; work would be done twice or not at all.
    """
    here = named_by_launcher()
    if here.size != planned:
        raise RunError(
            f"The plan has {planned} processes, but the launcher started {here.size}. On a machine without GPUs, "
            "accelerate launch starts a single one; use python -m torch.distributed.run --nproc_per_node there."
        )
    if here.size == 1:
        return here
    import torch
    import torch.distributed as dist

    # NCCL only if it is needed: it takes memory and power on every GPU.
    backend = "cpu:gloo,cuda:nccl" if share_a_model and torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=_store(), rank=here.rank, world_size=here.size, timeout=BARRIER_TIMEOUT)
    return TorchRanks(here.rank, here.local_rank, here.size)


# ------------------------------------------------------------------ messages, also before and after the connection
@cache
def _store() -> Any:
    """Return the launcher's key-value store, through which its processes find each other."""
    import torch.distributed as dist

    store, _, _ = next(dist.rendezvous("env://"))
    store.set_timeout(BARRIER_TIMEOUT)
    return store


def publish(message: str) -> None:
    """Send one message to the other processes; each of them can receive it."""
    _store().set("lem/message", message)


def receive() -> str:
    """Wait for the first process's message and return it."""
    return str(_store().get("lem/message").decode())


def announce_end(rank: int) -> None:
    """Announce to the first process that this one has written all its files."""
    _store().set(f"lem/ended/{rank}", "")


def wait_for_ends(ranks: Sequence[int]) -> None:
    """Wait until processes have announced their end, up to `END_TIMEOUT`."""
    if not ranks:
        return
    from torch.distributed import DistStoreError

    try:
        _store().wait([f"lem/ended/{rank}" for rank in ranks], END_TIMEOUT)
    except DistStoreError:
        return
