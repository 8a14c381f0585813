"""Reading a loaded transformers model's sizes off its modules, for the FLOPs formula.

Takes any causal language model made of linear layers (LoRA and quantized ones included), fused experts and
softmax attention. Returns None when it meets something else that does the work.
"""

from __future__ import annotations

from typing import Any

from lem.flops import Architecture

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
