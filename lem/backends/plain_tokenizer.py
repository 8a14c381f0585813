"""Loads a tokenizer from tokenizer.json without transformers, which takes seconds to import.

This module is used only if transformers, too, would use tokenizer.json unchanged. The model's other files must name
neither a special tokenizer class nor any token that tokenizer.json lacks. If any file or the model's type might change
the tokenizer, `load` returns None. A test compares these tokenizers with the tokenizers of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lem.backends import transformers_source
from lem.workload.models import Model

# The general classes; a model that names one of these has no special tokenizer class.
CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
# Options in tokenizer_config.json that do not change the tokens of a prompt. If there is a tokenizer.json, transformers
# ignores add_bos_token and add_eos_token.
WITHOUT_EFFECT = frozenset({
    "add_bos_token", "add_eos_token", "backend", "chat_template", "clean_up_tokenization_spaces", "is_local",
    "local_files_only", "model_input_names", "model_max_length", "name_or_path", "padding_side", "processor_class",
    "tokenizer_class", "truncation_side",
})  # fmt: skip
NAMED = frozenset(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
SEVERAL = frozenset({"additional_special_tokens", "extra_special_tokens"})
# If the vocabulary is larger, transformers looks for a fault of Mistral's tokenizers and corrects it.
LARGEST_VOCABULARY = 100_000


class PlainTokenizer:
    """A tokenizer with only those methods of transformers' tokenizers that prompts without a chat template need."""

    def __init__(self, tokenizer: Any) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.model_max_length = 0  # not needed: the caller applies lem's own limit

    def __call__(self, text: str) -> dict[str, list[int]]:
        """Return the token ids of a text, with the special tokens that the tokenizer adds."""
        return {"input_ids": self._tokenizer.encode(text).ids}

    def decode(self, token_ids: Sequence[int], *, clean_up_tokenization_spaces: bool) -> str:
        """Return the text to which the token ids decode."""
        if clean_up_tokenization_spaces:
            raise NotImplementedError
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))


def load(model: Model) -> PlainTokenizer | None:
    """Return the model's tokenizer, or None if it must be loaded with transformers."""
    folder = model.folder
    if folder is None or not _takes_it_as_it_is(model):
        return None
    content, config = _read(folder / "tokenizer.json"), _read(folder / "tokenizer_config.json")
    if not content or config.get("tokenizer_class") not in CLASSES or not _is_complete(folder, content, config):
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return PlainTokenizer(tokenizer) if tokenizer.get_vocab_size() <= LARGEST_VOCABULARY else None


def _takes_it_as_it_is(model: Model) -> bool:
    kind = model.config.get("model_type")
    is_known = isinstance(kind, str) and kind in transformers_source.model_types()
    return is_known and "auto_map" not in model.config and transformers_source.takes_tokenizer_as_it_is(str(kind))


def _is_complete(folder: Path, content: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Return whether tokenizer.json contains everything about tokens that the other files contain."""
    if not content.get("post_processor") or (folder / "added_tokens.json").exists():
        return False
    if not WITHOUT_EFFECT | NAMED | SEVERAL | {"added_tokens_decoder"} >= config.keys():
        return False
    there = {token["content"]: token for token in content.get("added_tokens") or ()}
    named = {**config, **_read(folder / "special_tokens_map.json")}
    if any(_content(token) not in there for token in _special(named)):
        return False
    described = config.get("added_tokens_decoder") or {}
    return all({**token, "id": int(number)} == there.get(_content(token)) for number, token in described.items())


def _special(named: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the special tokens that a file names, and any values of unknown meaning.

    Values of unknown meaning are not tokens of tokenizer.json, so they make `_is_complete` return False.
    """
    for key, value in named.items():
        if key in SEVERAL:
            yield from value.values() if isinstance(value, dict) else value or ()
        elif value is not None and key not in WITHOUT_EFFECT and key != "added_tokens_decoder":
            yield value


def _content(token: Any) -> Any:
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
