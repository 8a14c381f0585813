"""The processes that run one experiment together on this node: their ranks, barriers and short messages.

A launcher (accelerate's on GPUs, torch's elastic launcher on the CPU) sets RANK, LOCAL_RANK and WORLD_SIZE. This module
knows nothing about models or meters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

from lem.errors import ConfigError, RunError

# How long a rank may wait while another rank works.
BARRIER_TIMEOUT = timedelta(days=7)
# How often a waiting rank returns to Python. This is necessary because no signal is handled while torch waits.
BARRIER_POLL = timedelta(seconds=1)
# All ranks are expected to end within this time of each other.
END_TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True)
class Ranks:
    """The rank of a process and the number of processes; the methods are for a process that runs alone."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    def barrier(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait until all processes have arrived; `meanwhile` is called about once a second."""

    def close(self) -> None:
        """Leave the process group."""


class TorchRanks(Ranks):
    """The ranks of a process that a launcher started together with others; torch.distributed connects them."""

    def barrier(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait for the other processes; raises torch's error if another process is gone."""
        import torch.distributed as dist

        arrival = dist.barrier(group=_gloo(), async_op=True)
        while not _has_arrived(arrival):
            meanwhile()

    def close(self) -> None:
        """Leave the process group."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
            _gloo.cache_clear()


def _has_arrived(arrival: Any) -> bool:
    """Wait briefly for a barrier and return whether it completed; raises torch's error if another process is gone."""
    try:
        arrival.wait(BARRIER_POLL)
    except RuntimeError:
        if not arrival.is_completed():
            return False
        arrival.wait()  # the barrier may have completed just after the timeout
    return True


@cache
def _gloo() -> Any:
    """Return a process group with barriers that do not use the GPUs."""
    import torch.distributed as dist

    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def named_by_launcher() -> Ranks:
    """Return this process's rank and the number of processes, as its launcher's environment variables state them.

    No other process is contacted.

    Raises:
        ConfigError: a variable is not a whole number.
    """
    named = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    try:
        rank = int(named["RANK"] or 0)
        return Ranks(rank, int(named["LOCAL_RANK"] or rank), int(named["WORLD_SIZE"] or 1))
    except ValueError:
        told = ", ".join(f"{name}={value}" for name, value in named.items() if value is not None)
        raise ConfigError(
            f"RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers, but the environment has {told}. "
            "Unset all three, or set them to whole numbers."
        ) from None


def join(planned: int, *, share_a_model: bool = False) -> Ranks:
    """Connect this process to the other processes of the plan.

    Args:
        planned: the number of processes.
        share_a_model: whether several processes run one model together, so that their GPUs communicate.

    Raises:
        RunError: the launcher started a different number of processes, so work would be repeated or left out.
    """
    here = named_by_launcher()
    if here.size != planned:
        fact = f"Processes planned: {planned}; started by the launcher: {here.size}."
        if here.size > 1:
            raise RunError(f"{fact} Set the launcher's number of processes to {planned}.")
        raise RunError(
            f"{fact} On a machine without GPUs, accelerate launch starts only one process; use "
            f"python -m torch.distributed.run --nproc_per_node {planned} instead."
        )
    if here.size == 1:
        return here
    import torch
    import torch.distributed as dist

    # NCCL is used only if needed, because it takes memory and power on every GPU.
    backend = "cpu:gloo,cuda:nccl" if share_a_model and torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=_store(), rank=here.rank, world_size=here.size, timeout=BARRIER_TIMEOUT)
    return TorchRanks(here.rank, here.local_rank, here.size)


# ------------------------------------------------------------------ messages, also while not connected
@cache
def _store() -> Any:
    """Return the launcher's key-value store, through which its processes find each other."""
    import torch.distributed as dist

    store, _, _ = next(dist.rendezvous("env://"))
    store.set_timeout(BARRIER_TIMEOUT)
    return store


def publish(message: str) -> None:
    """Send one message that every other process can receive."""
    _store().set("lem/message", message)


def receive() -> str:
    """Wait for the first process's message and return it."""
    return str(_store().get("lem/message").decode())


def announce_end(rank: int) -> None:
    """Tell the first process that this one has written all its files."""
    _store().set(f"lem/ended/{rank}", "")


def wait_for_ends(ranks: Sequence[int]) -> None:
    """Wait until the given ranks have announced their end, for at most `END_TIMEOUT`."""
    if not ranks:
        return
    from torch.distributed import DistStoreError

    try:
        _store().wait([f"lem/ended/{rank}" for rank in ranks], END_TIMEOUT)
    except DistStoreError:
        return
