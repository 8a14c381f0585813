"""What lem reads of a model in addition to its weights: tokenized prompts, end tokens, sizes, an adapter's files.

Read through transformers, so it is the same for every engine that runs the model; knows nothing about engines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lem.backends.base import Encoded
from lem.backends.engine import reason_of
from lem.errors import RunError
from lem.spec.experiment import Experiment
from lem.workload.flops import Architecture
from lem.workload.models import Model, find

# Files of an adapter, as peft writes them.
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Layers of hybrid models whose cost does not grow with the number of attended positions.
NOT_SOFTMAX_ATTENTION = ("linear_attention", "mamba", "recurrent", "conv", "mlp")


@dataclass(frozen=True)
class Checkpoint:
    """A model without its weights.

    `hollow` is transformers' model on the device `meta`, which has sizes but no values; None if transformers does
    not know the model.
    """

    model: Model
    tokenizer: Any
    hollow: Any
    end_tokens: frozenset[int]

    def architecture(self, adapter_weights: tuple[int, int] = (0, 0)) -> Architecture | None:
        """Return the sizes that decide the FLOPs, with an adapter's weights in the body and the output projection."""
        found = None if self.hollow is None else architecture_of(self.hollow)
        if found is None:
            return None
        of_body, of_head = adapter_weights
        return Architecture(found.body_weights + of_body, found.head_weights + of_head, found.attention_width)


def read(experiment: Experiment, config_changes: Mapping[str, Any] | None) -> Checkpoint:
    """Read the experiment's model.

    Args:
        experiment: names the model.
        config_changes: what the engine changes in the model's config; None if it uses a different config, so that
            the sizes are unknown.

    Raises:
        ModelError: there is no such model.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    model = find(experiment.model or "", experiment.revision)
    source = source_of(model, experiment)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.path, **source)
    hollow = None if config_changes is None else _hollow(model, source, config_changes)
    return Checkpoint(model, tokenizer, hollow, end_tokens(_generation_config(model, source), tokenizer))


def source_of(model: Model, experiment: Experiment) -> dict[str, Any]:
    """Return the options by which transformers finds a model's parts."""
    return {"revision": model.revision, "trust_remote_code": experiment.trust_remote_code}


def _hollow(model: Model, source: Mapping[str, Any], config_changes: Mapping[str, Any]) -> Any:
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(model.path, **source)
        config.update(config_changes)
        with torch.device("meta"):
            trusted = source["trust_remote_code"]
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    except (ValueError, KeyError, ImportError, NotImplementedError):
        return None


def _generation_config(model: Model, source: Mapping[str, Any]) -> Any:
    import transformers

    try:
        return transformers.GenerationConfig.from_pretrained(model.path, revision=model.revision)
    except OSError:
        config = transformers.AutoConfig.from_pretrained(model.path, **source)
        return transformers.GenerationConfig.from_model_config(config)


def quantization_of(model: Model) -> str | None:
    """Return how a checkpoint's weights are quantized; None if they are not, or if its files do not say."""
    config = model.config.get("quantization_config") or {}
    file = Path(model.path) / "hf_quant_config.json"
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8")).get("quantization", {})
    return config.get("quant_algo") or config.get("quant_method")


def weights_bytes(model: Model) -> int | None:
    """Return the size of a local checkpoint's weights; None if they are not in a directory."""
    return sum(file.stat().st_size for file in Path(model.path).glob("*.safetensors")) or None


def end_tokens(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Return the ids that end a sequence, from the model's generation config or else from the tokenizer."""
    ids = generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


# ------------------------------------------------------------------ prompts
def encode(
    tokenizer: Any,
    texts: Sequence[str],
    experiment: Experiment,
    positions: int | None,
    *,
    vocabulary: int | None = None,
) -> list[Encoded]:
    """Tokenize each text separately, with the model's own special tokens, and cut it to `max_input_tokens`.

    Args:
        tokenizer: the model's.
        texts: the prompts.
        experiment: has the limits, and says whether there is a chat template.
        positions: maximum number of tokens of a prompt and its output together; None if there is no limit.
        vocabulary: number of the model's embeddings; None leaves tokens beyond them to the engine.

    Raises:
        RunError: a prompt has no tokens, does not fit, or has a token without an embedding.
    """
    limit = experiment.max_input_tokens
    encoded = []
    for index, text in enumerate(texts):
        ids = _token_ids(tokenizer, text, chat=experiment.chat_template)
        encoded.append(Encoded(index, tuple(ids[:limit]), limit is not None and len(ids) > limit))
    _check_lengths(encoded, positions, experiment.max_output_tokens)
    if vocabulary is not None:
        _check_vocabulary(encoded, vocabulary)
    return encoded


def _check_vocabulary(encoded: Sequence[Encoded], vocabulary: int) -> None:
    """Refuse tokens that have no embedding, which the model would fail on."""
    for prompt in encoded:
        largest = max(prompt.token_ids)
        if largest >= vocabulary:
            raise RunError(
                f"Prompt {prompt.index} has the token {largest}, but the model has {vocabulary} embeddings: the "
                "tokenizer belongs to another model."
            )


def _token_ids(tokenizer: Any, text: str, *, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer(text)["input_ids"])
    turns = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    # The template has already added the special tokens.
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def _check_lengths(encoded: Sequence[Encoded], positions: int | None, max_output_tokens: int) -> None:
    """Refuse prompts that do not fit into the model's positions, before anything is measured."""
    if not encoded:
        return
    empty = next((p for p in encoded if not p.token_ids), None)
    if empty is not None:
        raise RunError(f"Prompt {empty.index} has no tokens in this model's tokenizer; leave it out.")
    longest = max(encoded, key=lambda p: len(p.token_ids))
    if positions is not None and len(longest.token_ids) + max_output_tokens > positions:
        raise RunError(
            f"Prompt {longest.index} has {len(longest.token_ids)} tokens; with max_output_tokens {max_output_tokens} "
            f"that is more than the model's {positions} positions. "
            f"Set max_input_tokens={max(1, positions - max_output_tokens)} or less."
        )


# ------------------------------------------------------------------ adapters
def adapter_folder(adapter: str) -> Path:
    """Return the directory of an adapter, fetched from the hub unless it is a local one.

    Raises:
        RunError: it cannot be fetched.
    """
    local = Path(adapter).expanduser()
    if local.is_dir():
        return local
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(adapter))
    except Exception as error:  # the client also raises its transport's errors
        raise RunError(f"The adapter {adapter} cannot be fetched from the hub: {reason_of(error)}") from error


def adapter_rank(folder: Path) -> int:
    """Return the rank of an adapter's matrices."""
    return int(json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["r"])


def adapter_weights(folder: Path) -> tuple[int, int]:
    """Return the number of weights in an adapter's matrices: in the model's body, and at its output projection."""
    from safetensors import safe_open

    of_body = of_head = 0
    with safe_open(folder / ADAPTER_WEIGHTS, framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - no mapping
            rows, *columns = tensors.get_slice(name).get_shape()
            size = rows * columns[0] if len(columns) == 1 else 0
            if "lm_head" in name:
                of_head += size
            else:
                of_body += size
    return of_body, of_head


# ------------------------------------------------------------------ sizes
def architecture_of(model: Any) -> Architecture | None:
    """Return the sizes of transformers' model, or None when its matrix weights are unknown."""
    import torch

    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    share = _active_share_of_experts(config)
    body = 0.0
    # An adapter on the output projection is a module inside it.
    of_head = set(head.modules()) if head is not None else set()
    for name, module in model.named_modules():
        if module in of_head:
            continue
        parts = name.split(".")
        is_expert = "experts" in parts and "shared_experts" not in parts
        body += _matrix_weights(torch, module) * (share if is_expert else 1.0)
    attention_width = _attention_width(config)
    if body == 0 or head is None or attention_width is None:
        return None
    return Architecture(
        body_weights=round(body),
        head_weights=sum(_matrix_weights(torch, module) for module in of_head),
        attention_width=attention_width,
    )


def _matrix_weights(torch: Any, module: Any) -> int:
    """Return the number of a module's own weights that take part in matrix products."""
    if isinstance(module, torch.nn.Embedding):
        return 0
    own = module.named_parameters(recurse=False)
    # Conv1D of GPT-2 is a transposed linear layer; experts are fused into three-dimensional weights.
    held = sum(int(p.numel()) for name, p in own if (p.ndim == 2 and name == "weight") or p.ndim == 3)
    if hasattr(module, "in_features") and hasattr(module, "out_features") and not list(module.children()):
        # Quantized weights are packed into fewer values; an adapter that is split over processes reports its own share
        # of the features, while its weight has the size of the whole.
        return max(int(module.in_features * module.out_features), held)
    return held


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
    """Return the bytes of one token's keys and values in all attention layers, or None when unknown."""
    width = _attention_width(config)
    heads = getattr(config, "num_attention_heads", None)
    if width is None or not heads:
        return None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * width * kv_heads // heads * bytes_per_value)
