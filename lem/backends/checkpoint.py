"""What an engine's own loader does not tell of a model: its tokenizer, its sizes, the tokens that end an output.

Loaded by transformers, without the weights. Shared by the engines that load the weights themselves; knows none of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lem.backends.engine import reason_of
from lem.errors import RunError
from lem.workload.flops import Architecture
from lem.workload.models import Model


def source(model: Model, *, trusted: bool) -> dict[str, Any]:
    """Return the options by which transformers finds a model's parts; `trusted`: it may run the model's code."""
    return {"revision": model.revision, "trust_remote_code": trusted}


def load_tokenizer(model: Model, *, trusted: bool) -> Any:
    """Return the model's tokenizer."""
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers.AutoTokenizer.from_pretrained(model.path, **source(model, trusted=trusted))


def load_hollow(model: Model, *, trusted: bool, changes: Mapping[str, Any] | None = None) -> Any:
    """Return the model without weights, of which its sizes are read; None where transformers does not know it.

    `changes` are those that an engine is told to make in the model's config.
    """
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(model.path, **source(model, trusted=trusted))
        config.update(changes or {})
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    except (ValueError, KeyError, ImportError, NotImplementedError):
        return None


def generation_config(model: Model, *, trusted: bool) -> Any:
    """Return what the model says about the end of a sequence, as transformers would take it."""
    import transformers

    try:
        return transformers.GenerationConfig.from_pretrained(model.path, revision=model.revision)
    except OSError:
        config = transformers.AutoConfig.from_pretrained(model.path, **source(model, trusted=trusted))
        return transformers.GenerationConfig.from_model_config(config)


def sizes(hollow: Any, adapter_weights: tuple[int, int] = (0, 0)) -> Architecture | None:
    """Read the sizes off a model without weights, and add an adapter's: in the body, and at the output projection."""
    found = None if hollow is None else architecture_of(hollow)
    if found is None:
        return None
    of_body, of_head = adapter_weights
    return Architecture(found.body_weights + of_body, found.head_weights + of_head, found.attention_width)


def quantization_of(model: Model) -> str | None:
    """Return how a checkpoint's weights are quantized; None when they are not, or it does not say."""
    said = model.config.get("quantization_config") or {}
    file = Path(model.path) / "hf_quant_config.json"
    if file.is_file():
        said = json.loads(file.read_text(encoding="utf-8")).get("quantization", {})
    return said.get("quant_algo") or said.get("quant_method")


def bytes_of(model: Model) -> int | None:
    """Return the size of a local checkpoint's weights; None where they are not in a directory."""
    return sum(file.stat().st_size for file in Path(model.path).glob("*.safetensors")) or None


WEIGHTS = "adapter_model.safetensors"


CONFIG = "adapter_config.json"


def folder_of(adapter: str) -> Path:
    """Return the directory of an adapter, fetched from the hub if it is no local one; raises `RunError`."""
    local = Path(adapter).expanduser()
    if local.is_dir():
        return local
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(adapter))
    except Exception as error:  # the client raises those of its transport as well
        raise RunError(f"The adapter {adapter} cannot be had from the hub: {reason_of(error)}") from error


def rank_of(folder: Path) -> int:
    """Return the rank of an adapter's matrices."""
    return int(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["r"])


def weights_of(folder: Path) -> tuple[int, int]:
    """Return the weights of an adapter's matrices: those in the model's body, and those at its output projection."""
    from safetensors import safe_open

    of_body = of_head = 0
    with safe_open(folder / WEIGHTS, framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - no mapping
            rows, *columns = tensors.get_slice(name).get_shape()
            size = rows * columns[0] if len(columns) == 1 else 0
            if "lm_head" in name:
                of_head += size
            else:
                of_body += size
    return of_body, of_head


# Layers of hybrid models whose cost does not grow with the number of attended positions.
NOT_SOFTMAX_ATTENTION = ("linear_attention", "mamba", "recurrent", "conv", "mlp")


def architecture_of(model: Any) -> Architecture | None:
    """Return the sizes of a loaded model, or None when its matrix weights cannot be told."""
    import torch

    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    share = _active_share_of_experts(config)
    body = 0.0
    # An adapter on the output projection is a part of it: it is met where the projection is.
    of_head = set(head.modules()) if head is not None else set()
    for name, module in model.named_modules():
        if module in of_head:
            continue
        weights = _matrix_weights(torch, module)
        body += weights * (share if _is_expert(name) else 1.0)
    attention_width = _attention_width(config)
    if body == 0 or head is None or attention_width is None:
        return None
    return Architecture(
        body_weights=round(body),
        head_weights=sum(_matrix_weights(torch, module) for module in of_head),
        attention_width=attention_width,
    )


def _matrix_weights(torch: Any, module: Any) -> int:
    """Return the number of weights of one module that take part in matrix products."""
    if isinstance(module, torch.nn.Embedding):
        return 0
    own = module.named_parameters(recurse=False)
    # Conv1D of GPT-2 is a transposed linear layer; experts are fused into three-dimensional weights.
    held = sum(int(p.numel()) for name, p in own if (p.ndim == 2 and name == "weight") or p.ndim == 3)
    if hasattr(module, "in_features") and hasattr(module, "out_features") and not list(module.children()):
        # Quantized weights are packed into fewer values; an adapter that is split over processes tells its own share
        # of the features, while its weight has the size of the whole.
        return max(int(module.in_features * module.out_features), held)
    return held


def _is_expert(name: str) -> bool:
    parts = name.split(".")
    return "experts" in parts and "shared_experts" not in parts


def _active_share_of_experts(config: Any) -> float:
    total = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    total = total or getattr(config, "n_routed_experts", None)
    active = getattr(config, "num_experts_per_tok", None)
    return active / total if total and active else 1.0


def _attention_width(config: Any) -> int | None:
    heads = getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(heads, int) or not isinstance(layers, int):
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = getattr(config, "layer_types", None)
    if kinds:
        layers = sum(not any(word in kind for word in NOT_SOFTMAX_ATTENTION) for kind in kinds)
    return int(heads * head_dim * layers)


def kv_bytes_per_token(config: Any, bytes_per_value: int) -> int | None:
    """Return the bytes that one token's keys and values take in all attention layers, or None when unknown."""
    width = _attention_width(config)
    heads = getattr(config, "num_attention_heads", None)
    if width is None or not heads:
        return None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * width * kv_heads // heads * bytes_per_value)
