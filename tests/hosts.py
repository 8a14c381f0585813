"""Imaginary machines to check experiments against, with the GPUs, packages and builds that a test needs."""

from __future__ import annotations

from dataclasses import dataclass

from lem.machine.gpu import Gpu
from lem.machine.host import Host

# Compute capabilities.
P100, V100, T4, A100, H100 = (6, 0), (7, 0), (7, 5), (8, 0), (9, 0)
EVERY_PACKAGE = ("",)


def gpus(*capabilities: tuple[int, int], name: str = "NVIDIA", mig: str | None = None) -> tuple[Gpu, ...]:
    """Return GPUs of the given compute capabilities."""
    return tuple(Gpu(i, f"GPU-{i}", name, 80 * 2**30, mig, each) for i, each in enumerate(capabilities))


@dataclass(frozen=True)
class FakeHost(Host):
    """A machine with every package, except those whose names begin with one of `lacks`.

    `builds_for_cpu`: whether its engines are builds without CUDA; None means as on the real machine.
    """

    lacks: tuple[str, ...] = ()
    builds_for_cpu: bool | None = None

    def has(self, package: str) -> bool:
        """Return whether the machine pretends to have a package."""
        return not package.startswith(self.lacks)

    def is_built_for_cpu(self, package: str) -> bool:
        """Return whether the machine pretends to have a CPU build."""
        return super().is_built_for_cpu(package) if self.builds_for_cpu is None else self.builds_for_cpu


def machine(*capabilities: tuple[int, int]) -> FakeHost:
    """Return a machine with GPUs of the given compute capabilities, and every package."""
    return FakeHost(gpus(*capabilities))


def bare(*capabilities: tuple[int, int]) -> FakeHost:
    """Return a machine with GPUs of the given compute capabilities, and no package."""
    return FakeHost(gpus(*capabilities), lacks=EVERY_PACKAGE)


CPU, ONE, TWO = machine(), machine(H100), machine(H100, H100)
# Eight modern GPUs, every package, and engines built for GPUs.
IDEAL = FakeHost(gpus(*[H100] * 8, name="NVIDIA H100"), builds_for_cpu=False)
# The minimum that the tests can rely on: no GPU, engines built for the CPU, and every package that runs there.
PROCESSOR = FakeHost((), lacks=("flash_attn",), builds_for_cpu=True)
