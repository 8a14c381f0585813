"""Everything that can be known to be wrong before the first joule: (experiment, host) -> objections and prompts.

Finds the model, loads the prompts, asks the backend, and checks the options against each other. Loads no weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lem.backends import backend_class
from lem.carbon import carbon_intensity
from lem.datasets import Prompts, load_prompts
from lem.energy.rapl import RaplMeter
from lem.energy.replay import read_trace
from lem.errors import BadInput, ConfigError
from lem.host import Host
from lem.models import Model, find
from lem.objection import Objection
from lem.spec import Decoder, Experiment, PytorchBackend, Quantization


@dataclass(frozen=True)
class Ready:
    """An experiment that can run: its model is there, its prompts are loaded."""

    experiment: Experiment
    model: Model | None
    prompts: Prompts
    warnings: tuple[Objection, ...]


def preflight(experiment: Experiment, host: Host, *, force: bool = False) -> Ready:
    """Check an experiment against this machine.

    Args:
        experiment: already checked by itself (types, ranges).
        host: the machine.
        force: run despite objections that are only inadvisable.

    Raises:
        ConfigError: all the reasons why it cannot run, or should not.
    """
    problems: list[str] = []
    model, prompts = None, None
    try:
        model = _model(experiment)
    except BadInput as error:
        problems.append(str(error))
    objections = [
        *option_objections(experiment),
        *backend_class(experiment.backend.name).objections(experiment, model, host),
        *_energy_objections(experiment, host),
    ]
    blocking = [o for o in objections if o.severity == "impossible" or (o.severity == "inadvisable" and not force)]
    problems += [str(o) if o.severity == "impossible" else f"{o} (--force runs it all the same)" for o in blocking]
    try:
        prompts = load_prompts(experiment.dataset, experiment.seed)
    except BadInput as error:
        problems.append(str(error))
    if problems or prompts is None:
        raise ConfigError(*problems)
    return Ready(experiment, model, prompts, tuple(o for o in objections if o not in blocking))


def _model(experiment: Experiment) -> Model | None:
    if experiment.model is None:
        raise ConfigError("No model: name one with --model or model=… (--model tiny comes with lem).")
    if experiment.backend.name == "simulated":
        return None
    return find(experiment.model, experiment.revision)


# ------------------------------------------------------------------ options against each other
def option_objections(experiment: Experiment) -> Iterator[Objection]:
    """Yield what is wrong between options, whatever the machine."""
    if experiment.min_output_tokens > experiment.max_output_tokens:
        yield Objection(
            "impossible",
            "min_output_tokens",
            f"{experiment.min_output_tokens} is more than max_output_tokens ({experiment.max_output_tokens}).",
            "Lower it, or raise the other.",
        )
    yield from _batching_objections(experiment)
    yield from _decoder_objections(experiment.decoder)
    yield from _quantization_objections(experiment.quantization)
    yield from _compile_objections(experiment)
    if experiment.energy.trace is not None and experiment.energy.name != "replay":
        yield _without_effect("energy.trace", "only the replay meter reads a trace.", "Use energy=replay.")


def _batching_objections(experiment: Experiment) -> Iterator[Objection]:
    batching = experiment.batching
    is_dynamic, budget = batching.strategy.endswith("dynamic"), batching.max_tokens_per_batch
    if is_dynamic and budget is None:
        yield Objection(
            "impossible",
            "batching.max_tokens_per_batch",
            f"{batching.strategy} batching needs a token budget.",
            "Set it, for example to 8192, or use static batching.",
        )
    if not is_dynamic and budget is not None:
        yield _without_effect(
            "batching.max_tokens_per_batch",
            f"{batching.strategy} batching has no token budget.",
            "Use batching.strategy=dynamic.",
        )


def _decoder_objections(decoder: Decoder) -> Iterator[Objection]:
    if decoder.do_sample:
        return
    neutral = Decoder()
    for name in ("temperature", "top_k", "top_p", "min_p"):
        if getattr(decoder, name) != getattr(neutral, name):
            yield _without_effect(
                f"decoder.{name}",
                "it is not used without sampling.",
                "Set decoder.do_sample=true, or leave it out.",
            )


def _quantization_objections(wanted: Quantization) -> Iterator[Objection]:
    path = "quantization.quantization"
    if wanted.load_in_4bit and wanted.load_in_8bit:
        yield Objection("impossible", path, "4-bit and 8-bit exclude each other.", "Choose one.")
    elif wanted.quantization and not (wanted.load_in_4bit or wanted.load_in_8bit):
        yield Objection(
            "impossible",
            path,
            "it does not say to how many bits.",
            "Set quantization.load_in_8bit or quantization.load_in_4bit to true.",
        )
    elif not wanted.quantization and (wanted.load_in_4bit or wanted.load_in_8bit):
        yield _without_effect(path, "load_in_… is set but quantization is off.", "Set it to true.")
    neutral = Quantization()
    if not (wanted.quantization and wanted.load_in_4bit):
        for name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"):
            if getattr(wanted, name) != getattr(neutral, name):
                yield _without_effect(f"quantization.{name}", "it belongs to 4-bit weights.", "Leave it out.")


def _compile_objections(experiment: Experiment) -> Iterator[Objection]:
    options = experiment.backend
    if not isinstance(options, PytorchBackend) or options.torch_compile:
        return
    if options.torch_compile_mode != PytorchBackend().torch_compile_mode:
        yield _without_effect("backend.torch_compile_mode", "torch_compile is off.", "Set backend.torch_compile=true.")


def _without_effect(path: str, reason: str, remedy: str) -> Objection:
    return Objection("inadvisable", path, f"it would have no effect: {reason}", remedy)


# ------------------------------------------------------------------ meters
def _energy_objections(experiment: Experiment, host: Host) -> Iterator[Objection]:
    energy = experiment.energy
    try:
        carbon_intensity(energy)
    except ConfigError as error:
        yield Objection("impossible", "energy.country_iso_code", str(error).partition(": ")[2], "")
    if energy.name == "nvml" and not host.gpus:
        yield Objection("impossible", "energy", "nvml needs a visible NVIDIA GPU.", "Use energy=auto.")
    if energy.name == "nvml" and host.gpus and not backend_class(experiment.backend.name).wants_gpu(experiment, host):
        yield Objection("impossible", "energy", "nvml meters GPUs, and none is used.", "Use energy=auto.")
    if energy.name == "zeus" and not host.has("zeus"):
        yield Objection("impossible", "energy", "the zeus meter needs the package zeus.", "pip install 'lem[zeus]'.")
    if energy.name == "rapl":
        yield from _rapl_objections(energy.powercap_dir)
    if energy.name == "replay":
        yield from _trace_objections(energy.trace)


def _rapl_objections(powercap_dir: str) -> Iterator[Objection]:
    """Open the meter once: it says best what is missing, and reading its counters costs nothing."""
    meter = RaplMeter(powercap_dir)
    try:
        meter.open()
    except BadInput as error:
        yield Objection("impossible", "energy", str(error), "")
    finally:
        meter.close()


def _trace_objections(trace: str | None) -> Iterator[Objection]:
    from pathlib import Path

    if trace is None:
        yield Objection("impossible", "energy.trace", "the replay meter needs a trace.", "Name a CSV file.")
        return
    try:
        read_trace(Path(trace))
    except BadInput as error:
        yield Objection("impossible", "energy.trace", str(error), "")
