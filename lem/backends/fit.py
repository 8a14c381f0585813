"""Whether the tensors of a checkpoint are those that transformers' model needs.

transformers draws at random whatever a checkpoint lacks. Before the run the names and shapes in the files' headers are
compared with the model without its weights, by transformers' own loading code; while the real weights are loaded, the
loader reports the same. Importing transformers takes seconds, so an evidently complete checkpoint is not compared.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from lem.backends import transformers_source
from lem.spec.experiment import Experiment
from lem.workload import weights
from lem.workload.models import Model
from lem.workload.weights import Fit, Tensor

LAYER = re.compile(r"^(.*?\b(?:layers?|h|blocks?)\.)(\d+)\.(.+)$")
EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")
HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.weight$")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# safetensors' names of the types of values, and torch's.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def reported(loading_info: Mapping[str, Iterable[Any]]) -> Fit:
    """Return what transformers' loader reports."""
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
    """Return what the loader will report; None if that cannot be known from the files that are there.

    It is not known for quantized checkpoints, whose tensors have names of their own, and for code that comes with a
    model.
    """
    folder, known = model.folder, transformers_source.language_models()
    kind = model.config.get("model_type")
    if folder is None or kind not in known or "quantization_config" in model.config or experiment.trust_remote_code:
        return None
    found = weights.tensors(folder)
    if found is None or any(tensor.dtype not in DTYPES for tensor in found.values()):
        return None
    return Fit() if _is_evidently_complete(model, found, known[str(kind)]) else _compared(model, found)


# ------------------------------------------------------------------ without transformers
def _is_evidently_complete(model: Model, found: Mapping[str, Tensor], class_name: str) -> bool:
    """Return whether a checkpoint has all layers, alike and as wide as they should be, an embedding, and a head."""
    config = model.config
    shapes = [found[name].shape for name in found if EMBEDDING.search(name)]
    has_head = config.get("tie_word_embeddings") is True or any(HEAD.search(name) for name in found)
    layers, sizes = _layers(found)
    counts = [config[name] for name in LAYER_COUNTS if name in config]
    return (
        class_name in (config.get("architectures") or ())
        and len(shapes) == 1
        and shapes[0] == (config.get("vocab_size"), config.get("hidden_size", config.get("n_embd")))
        and has_head
        and counts == [layers]
        and len(sizes) == 1
        and _widths(config) <= {size for held in sizes for _, shape in held for size in shape}
    )


def _widths(config: Mapping[str, Any]) -> set[int | None]:
    """Return sizes that matrices of each layer must have."""
    hidden, heads = config.get("hidden_size", config.get("n_embd")), config.get("num_attention_heads", 1)
    kv_heads, size = config.get("num_key_value_heads"), config.get("head_dim")
    mlp = {config["intermediate_size"]} if config.get("intermediate_size") else set()
    keys = {kv_heads * (size or hidden // heads)} if kv_heads else set()
    return {hidden} | mlp | keys


def _layers(found: Mapping[str, Tensor]) -> tuple[int, set[frozenset[tuple[str, tuple[int, ...]]]]]:
    """Return the number of consecutive layers from 0, and what they hold: one set if all are alike."""
    held: dict[tuple[str, int], set[tuple[str, tuple[int, ...]]]] = defaultdict(set)
    for name, tensor in found.items():
        if match := LAYER.match(name):
            held[match[1], int(match[2])].add((match[3], tensor.shape))
    prefixes, numbers = {prefix for prefix, _ in held}, sorted(number for _, number in held)
    if len(prefixes) != 1 or numbers != list(range(len(numbers))):
        return 0, set()
    return len(numbers), set(map(frozenset, held.values()))


# ------------------------------------------------------------------ with transformers
def _compared(model: Model, found: Mapping[str, Tensor]) -> Fit | None:
    """Return what transformers' loader says of these tensors, given without their values."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    hollow = {
        name: torch.empty(tensor.shape, dtype=getattr(torch, DTYPES[tensor.dtype]), device="meta")
        for name, tensor in found.items()
    }
    try:
        config = transformers.AutoConfig.from_pretrained(model.path, revision=model.revision)
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
    except Exception:  # whatever a model's code raises without values: loading the real weights will tell
        return None
    return reported(info)


def _shape(size: Any) -> str:
    return "×".join(map(str, size))
