"""Finds the programs, code and API keys that a configuration would run or send, and whether the user asked for them.

This covers a program that starts a server, Python code that comes with a model or is named by an engine's argument, and
an API key that would be sent to another machine. If a config file asks for one of these, the user must confirm it
(`lem.studies.consent`); if the command line asks for it, no confirmation is needed. This module runs nothing and
imports no code of a model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lem.config.layers import Sources, holds, origin
from lem.config.problem import Location, shown_path
from lem.errors import ConfigError
from lem.spec.engines import OpenaiBackend, SimulatedBackend, TensorrtBackend, VllmBackend
from lem.spec.experiment import Experiment
from lem.workload import tiny

Kind = Literal["command", "code", "key"]
# The digest of a file covers at most this many bytes. A server's binary may be larger, but scripts are not.
MOST_BYTES = 64_000_000
# Files of a model that determine which code is loaded.
CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")

# The resolver that interpolates environment variables. A variable's value may be a secret if it has at least
# SHORTEST_SECRET characters.
OF_ENVIRONMENT = "oc.env"
SHORTEST_SECRET = 8


@dataclass(frozen=True)
class Asked:
    """A configuration's request to run a program or code, or to send an API key.

    `path` is the key whose value makes the request, and `text` says what would be run or sent. `digest` identifies the
    request and the content of the files that it names. `is_own` means that the request is on the command line;
    otherwise, `where` is its place in a file, if known.
    """

    kind: Kind
    path: str
    text: str
    digest: str
    is_own: bool = False
    where: Location | None = None


def asked_by(experiment: Experiment, sources: Sources) -> list[Asked]:
    """Return everything that a composed experiment asks to run or send, with the origin of each request."""
    layers = sources.layers()
    return [*(_with_origin(each, layers) for each in all_asked(experiment)), *_variables(experiment.backend, layers)]


def _with_origin(asked: Asked, layers: list[Any]) -> Asked:
    paths = [tuple(path.split(".")) for path in (asked.path, *(("backend.url",) if asked.kind == "key" else ()))]
    found = [(path, layer) for path in paths if (layer := origin(layers, path)) and layer.kind != "default"]
    # An interpolation brings in text from elsewhere, even if the user typed the interpolation.
    foreign = [(path, layer) for path, layer in found if layer.kind != "command line" or _interpolates(layer, path)]
    if found and not foreign:
        return replace(asked, is_own=True)
    for path, layer in foreign:
        above = (layer.locations.get(path[:end]) for end in range(len(path), 0, -1))
        if location := next(filter(None, above), None):
            return replace(asked, where=location)
    return asked


def _interpolates(layer: Any, path: tuple[str, ...]) -> bool:
    value = layer.values
    for part in path:
        value = value[part] if holds(value, (part,)) else None
    return "${" in json.dumps(value, default=str)


def all_asked(experiment: Experiment) -> Iterator[Asked]:
    """Yield everything that an experiment asks to run or send, except environment variables; `is_own` stays False."""
    backend = experiment.backend
    if isinstance(backend, OpenaiBackend):
        if backend.command is not None:
            yield _asked("command", "backend.command", backend.command, _files_named_in(backend.command))
        yield from _key(backend)
    if not experiment.trust_remote_code or isinstance(backend, SimulatedBackend):
        return
    yield _code_of_models(experiment)
    named: dict[str, Any] = {}
    if isinstance(backend, VllmBackend):
        from lem.backends import vllm_options

        named = vllm_options.code_arguments(backend)
    elif isinstance(backend, TensorrtBackend):
        from lem.backends import tensorrt_options

        named = tensorrt_options.code_arguments(backend)
    for path, value in named.items():
        yield _asked("code", path, f"{path.rpartition('.')[2]}={json.dumps(value, default=str)}")


def _asked(kind: Kind, path: str, text: str, files: Iterable[Path] = ()) -> Asked:
    digest = hashlib.sha256(json.dumps([kind, path, text]).encode())
    for file in files:
        digest.update(_digest_of(file).encode())
    return Asked(kind, path, text, digest.hexdigest())


# ------------------------------------------------------------------ commands
def _files_named_in(command: str) -> Iterator[Path]:
    """Yield the files that a command names.

    Consent covers their content, because the same command may run a different script in another folder.
    """
    with suppress(ValueError):
        for word in shlex.split(command):
            module = Path(*word.split(".")) if word.replace(".", "").isidentifier() else None
            beside = [module.with_suffix(".py"), module / "__main__.py"] if module else []
            yield from (file for file in (Path(word).expanduser(), *beside) if _is_file(file))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError, RuntimeError):
        return False


def _digest_of(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.sha256(opened.read(MOST_BYTES)).hexdigest()
    except OSError as error:
        return f"unreadable: {error.strerror}"


# ------------------------------------------------------------------ code
def _code_of_models(experiment: Experiment) -> Asked:
    """Return the request to run the code that comes with the experiment's models."""
    drafts = getattr(getattr(experiment.backend, "speculative", None), "model", None)
    names = [name for name in (experiment.model, drafts, experiment.adapter) if name]
    folders = {name: folder for name in names if (folder := _local_folder(name)) is not None}
    texts, files = [], []
    for name in names:
        if name in folders:
            inside = _code_files(folders[name])
            files += [*inside, *(folders[name] / config for config in CONFIGS if (folders[name] / config).is_file())]
            listed = ", ".join(str(file.relative_to(folders[name])) for file in inside)
            texts.append(f"the Python code in {shown_path(folders[name])}: {listed or 'no file at present'}")
        else:
            revision = f" at revision {experiment.revision}" if experiment.revision and name == experiment.model else ""
            texts.append(f"the Python code that comes with {name}{revision}")
    return _asked("code", "trust_remote_code", "; ".join(texts), files)


def _local_folder(name: str) -> Path | None:
    if name == tiny.NAME:
        return None
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, ValueError, RuntimeError):
        return None


def _code_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*.py") if _is_file(file))


# ------------------------------------------------------------------ keys
def _key(backend: OpenaiBackend) -> Iterator[Asked]:
    """Yield the request to send the API key, if the key is set and the server is on another machine."""
    if not os.environ.get(backend.api_key_env) or backend.url is None:
        return
    if machine := _other_machine(backend):
        yield _asked("key", "backend.api_key_env", f"the value of {backend.api_key_env} to {machine}")


def _variables(backend: object, layers: list[Any]) -> Iterator[Asked]:
    """Yield what the configuration asks for: to send environment variables in a file to another machine."""
    if not isinstance(backend, OpenaiBackend) or (machine := _other_machine(backend)) is None:
        return
    from_files = [layer for layer in layers if layer.kind in ("option", "preset", "file")]
    if not any(OF_ENVIRONMENT in json.dumps(layer.values, default=str) for layer in from_files):
        return
    sent = json.dumps(asdict(backend), default=str)
    held = {name: json.dumps(value)[1:-1] for name, value in os.environ.items() if len(value) >= SHORTEST_SECRET}
    if names := sorted(name for name, value in held.items() if value in sent):
        yield _asked("key", "backend", f"the value of {', '.join(names)} to {machine}")


def _other_machine(backend: OpenaiBackend) -> str | None:
    """Return the address of the backend's server, or None if the server is on this machine or has no valid address."""
    if backend.url is None:
        return None
    from lem.backends.openai_options import address_of

    try:
        address = address_of(backend)
    except ConfigError:
        return None  # the address is rejected elsewhere
    return None if address.is_here else f"{address.scheme}://{address.host}:{address.port}"
