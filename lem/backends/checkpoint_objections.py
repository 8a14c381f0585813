"""Objections to a model's files (weights, tokenizer and chat template), found before loading.

The checks look at config.json, indexes and headers. The tokenizer is loaded only if a chat template is requested.
Checks that need transformers run in a process of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from lem.backends import chat, fit, transformers_source
from lem.backends.checkpoint import tokenizer_of, without_torch
from lem.spec.experiment import Experiment
from lem.spec.rules import Objection
from lem.workload import apart, weights
from lem.workload.models import Model, shown
from lem.workload.offline import is_offline
from lem.workload.weights import summary

# A model has a tokenizer if any of these files exists.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


# ------------------------------------------------------------------ config.json
def values(model: Model) -> Iterator[Objection]:
    """Object to values in config.json whose types transformers rejects.

    The values are first compared with the types in transformers' source code, which is fast. If a type differs, lem has
    transformers load the file, which takes seconds, to find out whether transformers really rejects the value.
    """
    parts = [model.config] if model.text_config is model.config else [model.config, model.text_config]
    for part in parts:
        types = transformers_source.value_types(str(part.get("model_type")))
        odd = [name for name, kind in types.items() if name in part and not _is_of_type(part[name], kind)]
        message = apart.call("transformers", _rejection, model.path, model.revision) if odd else ""
        for name in odd:
            if f"'{name}'" in message:  # the message names only one of the values
                fact = f"{name} is {shown(part[name])}, but transformers expects {types[name]}"
                yield Objection("config_value_type", "model", f"{model.name}/config.json: {fact}.")


def _is_of_type(value: Any, annotation: str) -> bool:
    """Return whether a JSON value evidently has the annotated type; the elements of containers are not checked."""
    plain = {"bool": bool, "int": int, "float": float, "str": str, "None": type(None)}
    kinds = [kind.strip() for kind in annotation.split("|")]
    if "Any" in kinds or type(value) in (plain.get(kind) for kind in kinds):
        return True
    return isinstance(value, list | dict) and any(kind not in plain for kind in kinds)


def _rejection(path: str, revision: str | None) -> str:
    """Return the message with which transformers rejects a model's config.json; empty if it accepts the file."""
    import transformers

    try:
        transformers.AutoConfig.from_pretrained(path, revision=revision)
    except Exception as error:  # the classes of transformers and huggingface_hub raise errors of many types
        return str(error)
    return ""


# ------------------------------------------------------------------ weights
def weights_of(experiment: Experiment, model: Model | None, *, of_any_name: bool = False) -> Iterator[Objection]:
    """Object to weights that are missing or damaged, or that do not fit the model described in config.json.

    If `of_any_name` is True, the weights may be in files of any name, because some engines read such files.
    """
    folder = None if model is None else model.folder
    if model is None or folder is None:
        return
    damaged = [*damaged_weights(model), *_none(model, folder, of_any_name)]
    yield from damaged
    found = None if damaged else fit.foreseen(model, experiment)
    if found is not None and found.missing:
        yield Objection("weights_missing", "model", f"{model.name} lacks {summary(found.missing)}.")
    if found is not None and found.mismatched:
        yield Objection("weights_mismatched", "model", f"these weights differ in shape: {summary(found.mismatched)}.")


def _is_all_there_is(model: Model) -> bool:
    """Return whether missing files will stay missing, because the model is local or the hub's client is offline."""
    return model.is_local or is_offline()


def damaged_weights(model: Model | None) -> Iterator[Objection]:
    """Object to weight files that are missing, cut short, or Git LFS pointers."""
    folder = None if model is None else model.folder
    if model is None or folder is None:
        return
    for flaw in weights.flaws(folder):
        if flaw.kind == "pointer":
            yield Objection("git_lfs_pointer", "model", flaw.fact)
        elif flaw.kind == "damaged" or _is_all_there_is(model):
            yield Objection("weights_incomplete", "model", flaw.fact)


def _none(model: Model, folder: Path, of_any_name: bool) -> Iterator[Objection]:
    if _is_all_there_is(model) and not weights.has_any(folder, of_any_name=of_any_name):
        names = " nor ".join((*weights.SINGLE_FILES, "an index of weight files"))
        yield Objection("weights_incomplete", "model", f"{folder} contains neither {names}.")


# ------------------------------------------------------------------ tokenizer
def tokenizer(model: Model) -> Iterator[Objection]:
    """Object to a tokenizer that is missing, is a Git LFS pointer, or has tokens without an embedding in the model."""
    folder = model.folder
    if folder is None:
        return
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if model.is_local and not files:
        yield Objection("no_tokenizer", "model", f"{model.path} has no tokenizer.")
    for file in files:
        if flaw := weights.pointer(file):
            yield Objection("git_lfs_pointer", "model", flaw.fact)
    rows, largest = model.text_config.get("vocab_size"), largest_id(folder)
    if isinstance(rows, int) and largest is not None and largest >= rows:
        fact = f"the tokenizer has ids up to {largest}, but the model's embedding has {rows} rows."
        yield Objection("tokenizer_too_large", "model", fact)


def padding(model: Model) -> Iterator[Objection]:
    """Yield an objection if the configured padding token is outside the vocabulary."""
    config = model.text_config
    rows, pad = config.get("vocab_size"), config.get("pad_token_id")
    if isinstance(rows, int) and isinstance(pad, int) and not -rows <= pad < rows:
        fact = f"pad_token_id is {pad}, but the vocabulary has {rows} tokens, so the embedding layer cannot be created."
        yield Objection("pad_token_outside", "model", fact)


def largest_id(folder: Path) -> int | None:
    """Return the largest token id that a prompt's text can produce; None if that cannot be determined.

    Special tokens are ignored, because many tokenizers have special tokens that their model never receives, such as one
    for images.
    """
    file = next((folder / name for name in ("tokenizer.json", "vocab.json") if (folder / name).is_file()), None)
    return None if file is None else _largest_in(str(file), file.stat().st_size, file.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _largest_in(file: str, _size: int, _mtime_ns: int) -> int | None:
    """Return the largest id in tokenizer.json or vocab.json; None if the file has an unknown layout."""
    content = _read(Path(file))
    try:
        if not file.endswith("tokenizer.json"):
            return max(content.values(), default=None)
        vocabulary, added = content["model"]["vocab"], content.get("added_tokens") or ()
        ids = set(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))
        ids -= {each["id"] for each in added if each.get("special")}
        return max(ids | {each["id"] for each in added if not each.get("special")}, default=None)
    except (AttributeError, LookupError, TypeError):
        return None


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# ------------------------------------------------------------------ chat template
def chat_template(experiment: Experiment, model: Model) -> Iterator[Objection]:
    """Yield an objection if the chat template is missing or cannot wrap a prompt."""
    if experiment.chat_template:
        rows = model.text_config.get("vocab_size")
        source = (model.path, model.revision, experiment.trust_remote_code)
        for code, fact in _faults_of_template(model.name, *source, rows, _stamps(model)):
            yield Objection(code, "chat_template", fact)


def _stamps(model: Model) -> tuple[tuple[str, int], ...]:
    """Return the path and modification time of each file of a local model, as part of a key for cached results."""
    files = sorted(Path(model.path).glob("*")) if model.is_local else []
    return tuple((str(file), file.stat().st_mtime_ns) for file in files if file.is_file())


@lru_cache(maxsize=8)
def _faults_of_template(
    name: str, path: str, revision: str | None, trusted: bool, rows: Any, _stamps: tuple[tuple[str, int], ...]
) -> list[tuple[str, str]]:
    """Return a chat template's faults as pairs (code, fact); cached, because a study's cells often share a model."""
    hidden = without_torch(trusted=trusted)
    return apart.call_without(hidden, "transformers", _faults_seen, name, path, revision, trusted, rows)


def _faults_seen(name: str, path: str, revision: str | None, trusted: bool, rows: Any) -> list[tuple[str, str]]:
    """Load the tokenizer in this process, and return the faults of its chat template as pairs (code, fact)."""
    loaded = tokenizer_of(path, revision=revision, trust_remote_code=trusted)
    templates = getattr(loaded, "chat_template", None)
    if not templates:
        return [("no_chat_template", f"{name} has no chat template.")]
    if isinstance(templates, dict) and "default" not in templates:
        return [("bad_chat_template", f"{name} has several chat templates ({', '.join(templates)}) but no default.")]
    if fault := chat.problem_of(loaded):
        return [("bad_chat_template", f"{name}: {fault}")]
    # Tokens that the template itself adds may have no embedding.
    largest = max(loaded(chat.rendered(loaded, chat.PROBE), add_special_tokens=False)["input_ids"], default=0)
    if isinstance(rows, int) and largest >= rows:
        fact = f"the chat template adds the token {largest}, but the model's embedding has {rows} rows."
        return [("tokenizer_too_large", fact)]
    return []
