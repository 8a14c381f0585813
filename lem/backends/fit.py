"""Checks that a checkpoint has the tensors that transformers needs for its model.

If a checkpoint lacks weights, transformers initializes them at random. This module recognizes incomplete checkpoints
before the run. It passes tensors without values to transformers' loader; their names and shapes come from the headers
of the files. The loader reports which tensors are missing, unused or of the wrong shape for the model, as it does when
it loads real weights. Importing transformers takes seconds, so this check runs in a process of its own, and is skipped
for checkpoints that are evidently complete.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from lem.backends import transformers_source
from lem.spec.experiment import Experiment
from lem.workload import apart, weights
from lem.workload.models import Model
from lem.workload.weights import Fit, Tensor

# The tensors of the most common model families: in each layer (by model type), outside the layers, and in the head.
_LLAMA = frozenset(
    f"{name}.weight"
    for name in (
        "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
        "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
)  # fmt: skip
LAYERS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA | {f"self_attn.{name}_proj.bias" for name in "qkv"},
    "qwen3": _LLAMA | {"self_attn.q_norm.weight", "self_attn.k_norm.weight"},
}
OUTER = frozenset(["model.embed_tokens.weight", "model.norm.weight"])
HEAD = "lm_head.weight"
# The sizes in config.json that determine the shapes of these tensors.
SIZES = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size",
)  # fmt: skip
# The names of dtypes in safetensors, mapped to their names in torch.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def reported(loading_info: Mapping[str, Iterable[Any]]) -> Fit:
    """Return the report of transformers' loader as a `Fit`: missing, unexpected and mismatched weights."""
    mismatched = [
        f"{name} (file: {_shape(found)}, model: {_shape(needed)})"
        for name, found, needed in loading_info["mismatched_keys"]
    ]
    return Fit(
        missing=tuple(sorted(loading_info["missing_keys"])),
        unexpected=tuple(sorted(loading_info["unexpected_keys"])),
        mismatched=tuple(sorted(mismatched)),
    )


def foreseen(model: Model, experiment: Experiment) -> Fit | None:
    """Return the `Fit` that the loader will report; None if the report cannot be predicted from the available files.

    For example, it cannot be predicted for quantized checkpoints, whose tensors have different names, or if code that
    comes with the model may run.
    """
    folder, known = model.folder, transformers_source.language_models()
    kind = model.config.get("model_type")
    if folder is None or kind not in known or "quantization_config" in model.config or experiment.trust_remote_code:
        return None
    found = weights.tensors(folder)
    if found is None and not weights.archives(folder):
        return None
    if found is not None and any(tensor.dtype not in DTYPES for tensor in found.values()):
        return None
    if found is not None and _is_evidently_complete(model, found, known[str(kind)]):
        return Fit()
    stamps = tuple(
        (str(file), file.stat().st_mtime_ns) for file in (folder / "config.json", *weights.weight_files(folder))
    )
    return _compared(model.path, model.revision, stamps)


# ------------------------------------------------------------------ without transformers
def _is_evidently_complete(model: Model, found: Mapping[str, Tensor], class_name: str) -> bool:
    """Return whether a checkpoint has exactly the tensors of a common model family, with the sizes in its config."""
    config = model.config
    needed = LAYERS.get(str(config.get("model_type")))
    if any(not isinstance(config.get(name), int | None) for name in SIZES):
        return False
    if needed is None or class_name not in (config.get("architectures") or ()):
        return False
    if config.get("attention_bias") or config.get("mlp_bias"):
        return False
    outer = OUTER if config.get("tie_word_embeddings") is True else OUTER | {HEAD}
    layers = config.get("num_hidden_layers") or 0
    if len(found) != len(outer) + layers * len(needed):
        return False
    in_layers = {f"model.layers.{number}.{name}" for number in range(layers) for name in needed}
    return found.keys() == outer | in_layers and all(_has_its_shape(config, name, found[name]) for name in found)


def _has_its_shape(config: Mapping[str, Any], name: str, tensor: Tensor) -> bool:
    """Return whether a tensor has the shape that the config implies; False if the config lacks a size.

    Only the shapes of the large matrices are checked; the result is True for any other tensor.
    """
    hidden, heads = config.get("hidden_size") or 0, config.get("num_attention_heads") or 1
    head_dim = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, (config.get("num_key_value_heads") or 0) * head_dim
    inner, vocabulary = config.get("intermediate_size"), config.get("vocab_size")
    shapes = {
        "embed_tokens.weight": (vocabulary, hidden),
        HEAD: (vocabulary, hidden),
        "q_proj.weight": (queries, hidden),
        "k_proj.weight": (keys, hidden),
        "v_proj.weight": (keys, hidden),
        "o_proj.weight": (hidden, queries),
        "gate_proj.weight": (inner, hidden),
        "up_proj.weight": (inner, hidden),
        "down_proj.weight": (hidden, inner),
    }
    return all(tensor.shape == shape for end, shape in shapes.items() if name.endswith(end))


# ------------------------------------------------------------------ with transformers
@lru_cache(maxsize=8)
def _compared(path: str, revision: str | None, stamps: tuple[tuple[str, int], ...]) -> Fit | None:
    """Return the result of `_loaded_without_values`; cached, because a study's cells often share a checkpoint."""
    return apart.call("transformers", _loaded_without_values, path, revision, Path(stamps[0][0]).parent)


def _loaded_without_values(path: str, revision: str | None, folder: Path) -> Fit | None:
    """Have transformers load a checkpoint's tensors without their values, and return the `Fit` that it reports.

    The result is None if this fails, as it may if the model's code needs the values.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        hollow = _hollow(folder)
        config = transformers.AutoConfig.from_pretrained(path, revision=revision)
        with torch.device("meta"):
            model_class = type(transformers.AutoModelForCausalLM.from_config(config))
        _, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=hollow,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception:  # the model's code may fail without values; loading the real weights will show what is missing
        return None
    return reported(info)


def _hollow(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's tensors without their values; only the list of tensors is read from the files."""
    import torch

    archives = weights.archives(folder)
    if archives:
        return {
            name: tensor
            for file in archives
            for name, tensor in torch.load(file, map_location="meta", mmap=True, weights_only=True).items()
        }
    return {
        name: torch.empty(tensor.shape, dtype=getattr(torch, DTYPES[tensor.dtype]), device="meta")
        for name, tensor in (weights.tensors(folder) or {}).items()
    }


def _shape(size: Any) -> str:
    return "×".join(map(str, size))
