"""Finds a model (built in, in a local directory or on the hub) and reads its config.json, but loads no weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lem.errors import ModelError, did_you_mean
from lem.spec.paths import expanded
from lem.workload import tiny
from lem.workload.offline import is_unreachable, use_cache_if_unreachable

OFFLINE_HINT = "Use a local directory, or --model tiny for the model that comes with lem."
ADAPTER_FILE = "adapter_config.json"
# Keys under which a multimodal model's configuration has the configuration of its language model.
LANGUAGE_PARTS = ("text_config", "llm_config", "language_config")

# The largest plausible number of layers, and the maximum length in characters of a value in a message.
MOST_LAYERS = 10_000
LONGEST_SHOWN = 40


@dataclass(frozen=True)
class Model:
    """A model's location and its config.json; `path` is a directory or a hub id, as transformers accepts it."""

    name: str
    path: str
    revision: str | None
    config: dict[str, Any]

    @property
    def random_weights(self) -> bool:
        """Whether the weights are random, so that the model's text is meaningless."""
        return self.name == tiny.NAME

    @property
    def quantization_config(self) -> dict[str, Any]:
        """How the weights are quantized, according to config.json; empty if they are not quantized."""
        found = self.config.get("quantization_config")
        return found if isinstance(found, dict) else {}

    @property
    def text_config(self) -> dict[str, Any]:
        """The configuration of the language model, which is the whole configuration unless the model is multimodal."""
        parts = (self.config.get(name) for name in LANGUAGE_PARTS)
        return next((part for part in parts if isinstance(part, dict)), self.config)

    @property
    def folder(self) -> Path | None:
        """The directory with the model's files, local or in the hub's cache; None if the model is in neither place."""
        if Path(self.path).is_dir():
            return Path(self.path)
        import huggingface_hub

        try:
            file = huggingface_hub.try_to_load_from_cache(self.path, "config.json", revision=self.revision)
        except (OSError, ValueError):  # for example, the path is not a hub id
            return None
        return Path(file).parent if isinstance(file, str) else None

    @property
    def is_local(self) -> bool:
        """Whether the model is a local directory, so that nothing needs to be downloaded."""
        return Path(self.path).is_dir()


def find(name: str, revision: str | None = None) -> Model:
    """Find a model by its name: `tiny`, a local directory or a hub id.

    Raises:
        ModelError: the model does not exist, its config.json cannot be used, or it is not cached and the hub cannot be
            reached.
    """
    if name == tiny.NAME:
        folder = tiny.path()
        return Model(name, str(folder), None, _read_config(folder))
    local = expanded(name)
    if local.is_dir():
        return Model(name, str(local), None, _read_config(local))
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ModelError(f"There is no model directory {name}.")
    suggestion = did_you_mean(name, [tiny.NAME])
    if "/" not in name and suggestion:
        raise ModelError(f"There is no model '{name}'.{suggestion}")
    return Model(name, name, revision, _hub_config(name, revision))


def _read_config(folder: Path) -> dict[str, Any]:
    _refuse_adapter(folder)
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} is not a model directory: it has no config.json.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} is not a model's configuration: it contains no JSON object.")
    for part in (content, *(content[name] for name in LANGUAGE_PARTS if isinstance(content.get(name), dict))):
        _refuse_odd_values(file, part)
    return content


def _refuse_odd_values(file: Path, config: dict[str, Any]) -> None:
    """Reject model types and classes that are not names, and a number of layers that is not plausible."""
    kind, layers, classes = (config.get(name) for name in ("model_type", "num_hidden_layers", "architectures"))
    if not isinstance(kind, str | None):
        raise ModelError(f"{file}: model_type is {shown(kind)}, not a name; correct the file.")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(each, str) for each in classes)):
        raise ModelError(f"{file}: architectures is {shown(classes)}, not a list of names; correct the file.")
    if layers is not None and (type(layers) is not int or not 0 <= layers <= MOST_LAYERS):
        limit = f"not a whole number from 0 to {MOST_LAYERS}"
        raise ModelError(f"{file}: num_hidden_layers is {shown(layers)}, {limit}; correct the file.")


def shown(value: Any) -> str:
    """Return a value of a configuration as JSON, shortened if necessary."""
    text = json.dumps(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def _refuse_adapter(folder: Path) -> None:
    """Reject the directory of a LoRA adapter, because transformers would silently load only the base model."""
    file = folder / ADAPTER_FILE
    if not file.is_file():
        return
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    raise ModelError(
        f"{folder} is a LoRA adapter, not a model. Name its base as the model, and the adapter separately: "
        f"--model {base or 'BASE'} --adapter {folder}."
    )


def _hub_config(name: str, revision: str | None) -> dict[str, Any]:
    use_cache_if_unreachable()
    import huggingface_hub
    from huggingface_hub import errors

    # The hub's client logs its retries as warnings; only the final error is reported here.
    huggingface_hub.logging.set_verbosity_error()
    try:
        file = huggingface_hub.hf_hub_download(name, "config.json", revision=revision)
    except errors.GatedRepoError:
        raise ModelError(
            f"The model {name} is gated: accept its terms on the hub, then set HF_TOKEN to your access token."
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(f"There is no model '{name}' on the hub, or it is private (set HF_TOKEN).") from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"The model {name} has no revision '{revision}'.") from None
    except errors.HFValidationError:
        raise ModelError(f"'{name}' is neither a model directory nor a hub id (owner/name).") from None
    except Exception as error:  # the hub's client also raises errors of its HTTP library
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            raise ModelError(
                f"{name} has no config.json on the hub, so it is not a model that transformers can load. If it is a "
                "LoRA adapter, name its base with --model and the adapter with --adapter."
            ) from None
        if is_unreachable(error):
            reason = "is not cached on this machine, and the hub cannot be reached."
        else:
            reason = f"cannot be read from the hub: {' '.join(str(error).split())[:200].rstrip('.')}."
        raise ModelError(f"The model {name} {reason} {OFFLINE_HINT}") from None
    return _read_config(Path(file).parent)
