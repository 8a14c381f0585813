"""The parts of a model other than its weights: tokenizer, end tokens, sizes, and an adapter's files.

These parts are read by transformers, or in the way that transformers reads them, so they are the same for every engine
that runs the model. This module knows nothing about engines.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lem.backends import plain_tokenizer
from lem.backends.base import Encoded
from lem.backends.chat import rendered
from lem.backends.engine import failing_as, reason_of
from lem.backends.sizing import architecture_of
from lem.errors import RunError
from lem.spec.experiment import Experiment
from lem.spec.paths import expanded
from lem.workload import apart
from lem.workload.flops import Architecture, UnknownArchitecture
from lem.workload.models import Model, find

# The names that peft gives an adapter's files.
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A model without its weights.

    `hollow` is the transformers model on the device `meta`, where tensors have shapes but no values. It is None if
    transformers does not know the model, or if the engine uses a config of its own.
    """

    model: Model
    tokenizer: Any
    hollow: Any
    end_tokens: frozenset[int]

    def architecture(self, adapter_weights: tuple[int, int] = (0, 0)) -> Architecture:
        """Return the sizes that determine the FLOPs of the model and of its adapter, if it has one.

        Args:
            adapter_weights: how many of the adapter's weights belong to the model's body, and how many to its output
                projection.

        Raises:
            UnknownArchitecture: the sizes cannot be determined; the message is the reason.
        """
        if self.hollow is None:
            raise UnknownArchitecture("transformers does not know the model, or the engine uses a config of its own")
        return architecture_of(self.hollow).with_adapter(*adapter_weights)


def read(experiment: Experiment, config_changes: Mapping[str, Any] | None) -> Checkpoint:
    """Read everything about the experiment's model except its weights.

    Args:
        experiment: the experiment, which names the model.
        config_changes: the changes that the engine makes to the model's config; None if the engine uses a config of its
            own, so that the sizes are unknown.

    Raises:
        ModelError: the model does not exist.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    model = find(experiment.model or "", experiment.revision)
    source = source_of(model, experiment)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.path, **source)
    hollow = None if config_changes is None else _hollow(model, source, config_changes)
    return Checkpoint(model, tokenizer, hollow, end_tokens(_generation_config(model, source), tokenizer))


def source_of(model: Model, experiment: Experiment) -> dict[str, Any]:
    """Return the arguments that transformers' loading functions need in addition to the model's path."""
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
    """Return the method by which a checkpoint's weights are quantized; None if its files name no method."""
    config = model.quantization_config
    file = Path(model.path) / "hf_quant_config.json"
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8")).get("quantization", {})
    return config.get("quant_algo") or config.get("quant_method")


def weights_bytes(model: Model) -> int | None:
    """Return the size of a local checkpoint's weights in bytes; None if it has no safetensors files."""
    return sum(file.stat().st_size for file in Path(model.path).glob("*.safetensors")) or None


def end_tokens(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Return the token ids that end a sequence, from the model's generation config or else from the tokenizer."""
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
    """Tokenize each text separately, with the model's own special tokens, and keep at most `max_input_tokens` tokens.

    Args:
        tokenizer: the model's tokenizer.
        texts: the prompts.
        experiment: the experiment, which sets the limits and whether to use the chat template.
        positions: the maximum length of a sequence (prompt and output) in tokens; None if there is no limit.
        vocabulary: the number of embeddings of the model; if None, token ids are not checked here.

    Raises:
        RunError: a prompt has no tokens, does not fit, or contains a token without an embedding.
    """
    if not isinstance(tokenizer.model_max_length, int | float):
        tokenizer.model_max_length = sys.maxsize  # the tokenizer compares lengths with it; lem has its own limit
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
    """Reject tokens without an embedding, which would make the model fail."""
    for prompt in encoded:
        largest = max(prompt.token_ids)
        if largest >= vocabulary:
            raise RunError(
                f"Prompt {prompt.index} contains token {largest}, but the model has only {vocabulary} embeddings: the "
                "tokenizer belongs to another model."
            )


def _token_ids(tokenizer: Any, text: str, *, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer(text)["input_ids"])
    # The template has already added the special tokens.
    return list(tokenizer(rendered(tokenizer, text), add_special_tokens=False)["input_ids"])


def without_torch(*, trusted: bool) -> tuple[str, ...]:
    """Return the libraries to hide from transformers in a process that loads only a tokenizer.

    transformers imports torch if torch is installed, which takes seconds. The tokenizers of transformers do not need
    torch, but a model's own code, which runs only if it is `trusted`, may need torch.
    """
    return () if trusted else ("torch",)


def tokenizer_of(path: str, **source: Any) -> Any:
    """Load a tokenizer as transformers does; `source` holds the arguments that `source_of` returns."""
    # If this variable is unset and torch is missing, transformers prints a notice on import.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers.AutoTokenizer.from_pretrained(path, **source)


def as_sent(experiment: Experiment, model: Model, texts: Sequence[str]) -> list[tuple[Encoded, str]]:
    """Return each prompt as the model receives it: its tokens, and the text to which they decode.

    No weights are loaded. If transformers is needed, for the tokenizer or a chat template, it runs in its own process.

    Raises:
        RunError: the tokenizer cannot be loaded, a prompt has no tokens, or the chat template fails or drops a prompt.
    """
    is_plain = not (experiment.chat_template or experiment.trust_remote_code)
    if is_plain and (tokenizer := plain_tokenizer.load(model)) is not None:
        return _sent_by(tokenizer, experiment, texts)
    hidden = without_torch(trusted=experiment.trust_remote_code)
    return apart.call_without(hidden, "transformers", _as_sent, experiment, model, texts)


def _as_sent(experiment: Experiment, model: Model, texts: Sequence[str]) -> list[tuple[Encoded, str]]:
    with failing_as(f"The tokenizer of {model.name} cannot be loaded"):
        tokenizer = tokenizer_of(model.path, **source_of(model, experiment))
    return _sent_by(tokenizer, experiment, texts)


def _sent_by(tokenizer: Any, experiment: Experiment, texts: Sequence[str]) -> list[tuple[Encoded, str]]:
    return [
        (each, tokenizer.decode(each.token_ids, clean_up_tokenization_spaces=False))
        for each in encode(tokenizer, texts, experiment, None)
    ]


def _check_lengths(encoded: Sequence[Encoded], positions: int | None, max_output_tokens: int) -> None:
    """Reject empty prompts, and prompts that together with their outputs are too long for the model.

    This happens before anything is measured.
    """
    if not encoded:
        return
    empty = next((p for p in encoded if not p.token_ids), None)
    if empty is not None:
        raise RunError(f"This model's tokenizer turns prompt {empty.index} into zero tokens; leave the prompt out.")
    longest = max(encoded, key=lambda p: len(p.token_ids))
    if positions is not None and len(longest.token_ids) + max_output_tokens > positions:
        raise RunError(
            f"Prompt {longest.index} has {len(longest.token_ids)} tokens; with max_output_tokens={max_output_tokens}, "
            f"that is more than the model's {positions} positions. "
            f"Set max_input_tokens to {max(1, positions - max_output_tokens)} or less."
        )


# ------------------------------------------------------------------ adapters
def adapter_folder(adapter: str) -> Path:
    """Return an adapter's directory, after fetching the adapter from the hub unless it is local.

    Raises:
        RunError: the adapter cannot be fetched.
    """
    local = expanded(adapter)
    if local.is_dir():
        return local
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(adapter))
    except Exception as error:  # the hub's client also raises errors of its HTTP library
        raise RunError(f"The adapter {adapter} cannot be fetched from the hub: {reason_of(error)}") from error


def adapter_rank(folder: Path) -> int:
    """Return the rank of an adapter's matrices."""
    return int(json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["r"])


def adapter_weights(folder: Path) -> tuple[int, int]:
    """Return how many of an adapter's weights belong to the model's body, and how many to its output projection."""
    from safetensors import safe_open

    of_body = of_head = 0
    with safe_open(folder / ADAPTER_WEIGHTS, framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            rows, *columns = tensors.get_slice(name).get_shape()
            size = rows * columns[0] if len(columns) == 1 else 0
            if "lm_head" in name:
                of_head += size
            else:
                of_body += size
    return of_body, of_head
