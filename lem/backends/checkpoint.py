"""What an engine's own loader does not tell of a model: its tokenizer, its sizes, the tokens that end an output.

Loaded by transformers, without the weights. Shared by the engines that load the weights themselves; knows none of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lem.backends.architecture import architecture_of
from lem.flops import Architecture
from lem.models import Model


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
