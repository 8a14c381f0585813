"""What speaks against an experiment on the pytorch backend, found before anything heavy is loaded.

Looks at the options, the host, and the model's config.json; loads no weights. Only where a chat template is asked
for is the tokenizer loaded, to see whether it has one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lem.host import Host
from lem.models import Model
from lem.objection import Objection
from lem.spec import Experiment, PytorchBackend

# Any of these is a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
# Packages behind the attention kernels that do not come with PyTorch.
ATTENTION_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def objections(experiment: Experiment, model: Model | None, host: Host) -> list[Objection]:
    """Return all objections; `model` is None when none was found, which has been objected to already."""
    options = experiment.backend
    assert isinstance(options, PytorchBackend)
    return [
        *_device_objections(options, host),
        *_attention_objections(options, experiment, host),
        *_cache_objections(options),
        *_package_objections(experiment, host),
        *_model_objections(experiment, model),
        *_chat_template_objections(experiment, model),
        *_precision_objections(options, experiment, host),
    ]


def _device_objections(options: PytorchBackend, host: Host) -> Iterator[Objection]:
    if options.device == "cuda" and not host.gpus:
        yield Objection("impossible", "backend.device", "no NVIDIA GPU is visible.", "Use backend.device=auto or cpu.")


def _attention_objections(options: PytorchBackend, experiment: Experiment, host: Host) -> Iterator[Objection]:
    kernel = options.attn_implementation
    package = ATTENTION_PACKAGES.get(kernel)
    if package is None:
        return
    path = "backend.attn_implementation"
    if not host.has(package):
        yield Objection("impossible", path, f"{kernel} needs the package {package}.", "Install it, or use sdpa.")
    if not host.gpus or options.device == "cpu":
        yield Objection("impossible", path, f"{kernel} runs on NVIDIA GPUs only.", "Use sdpa or eager.")
    if experiment.fp_precision == "float32":
        yield Objection("impossible", path, f"{kernel} has no float32.", "Use fp_precision float16 or bfloat16.")


def _cache_objections(options: PytorchBackend) -> Iterator[Objection]:
    if options.cache_implementation == "none":
        yield Objection(
            "warning",
            "backend.cache_implementation",
            "without a cache every step recomputes the whole sequence; FLOPs count each token once.",
            "Use dynamic unless that is what you study.",
        )


def _package_objections(experiment: Experiment, host: Host) -> Iterator[Objection]:
    if experiment.adapter is not None and _is_missing_adapter(experiment.adapter):
        yield Objection(
            "impossible",
            "adapter",
            f"there is no LoRA adapter at {experiment.adapter}.",
            "Name a directory with an adapter_config.json, or a hub id.",
        )
    if experiment.adapter is not None and not host.has("peft"):
        yield Objection("impossible", "adapter", "LoRA adapters need the package peft.", "pip install 'lem[lora]'.")
    if experiment.quantization.quantization and not host.has("bitsandbytes"):
        yield Objection(
            "impossible",
            "quantization.quantization",
            "quantized weights need the package bitsandbytes.",
            "pip install 'lem[bitsandbytes]'.",
        )


def _is_missing_adapter(adapter: str) -> bool:
    local = Path(adapter).expanduser()
    if local.is_dir():
        return not (local / "adapter_config.json").is_file()
    return adapter.startswith(("/", ".", "~")) or adapter.count("/") != 1


def _model_objections(experiment: Experiment, model: Model | None) -> Iterator[Objection]:
    if model is None:
        return
    folder = Path(model.path)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        yield Objection("impossible", "model", f"{model.path} has no tokenizer.", "Save one beside the weights.")
    positions = model.config.get("max_position_embeddings", model.config.get("n_positions"))
    if isinstance(positions, int) and experiment.max_output_tokens >= positions:
        yield Objection(
            "impossible",
            "max_output_tokens",
            f"{experiment.max_output_tokens} leave no room for a prompt in the model's {positions} positions.",
            "Lower it.",
        )
    if model.config.get("is_encoder_decoder"):
        yield Objection(
            "impossible",
            "model",
            f"{model.name} is an encoder-decoder model; lem measures decoder-only models.",
            "Choose a causal language model.",
        )
    if "auto_map" in model.config and not experiment.trust_remote_code and "model_type" not in model.config:
        yield Objection(
            "impossible",
            "trust_remote_code",
            f"{model.name} comes with its own code.",
            "Set trust_remote_code=true if you trust its authors.",
        )


def _chat_template_objections(experiment: Experiment, model: Model | None) -> Iterator[Objection]:
    if model is None or not experiment.chat_template:
        return
    import transformers  # seconds, but only where a template is asked for

    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        model.path, revision=model.revision, trust_remote_code=experiment.trust_remote_code
    )
    if not getattr(tokenizer, "chat_template", None):
        yield Objection("impossible", "chat_template", f"{model.name} has no chat template.", "Leave it off.")


def _precision_objections(options: PytorchBackend, experiment: Experiment, host: Host) -> Iterator[Objection]:
    on_cpu = not host.gpus or options.device == "cpu"
    if on_cpu and experiment.fp_precision == "float16":
        yield Objection(
            "warning",
            "fp_precision",
            "most CPUs emulate float16, which is slow.",
            "Use float32 or bfloat16 for numbers that matter.",
        )
