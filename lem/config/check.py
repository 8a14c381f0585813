"""Checks composed values against the schema: resolves interpolations and collects all problems with types and ranges.

Each problem has the path of its value; this module does not know which source the value came from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from pydantic import ValidationError

from lem.config.problem import Problem, Problems, shortened
from lem.config.yamlfile import KeyPath, dotted
from lem.errors import did_you_mean
from lem.results.codec import adapter
from lem.spec.engines import BACKENDS
from lem.spec.experiment import Experiment
from lem.spec.schema import leaves

MISSING = "???"
Values = dict[str, Any]
Found = list[tuple[KeyPath, Problem]]


def check(values: Values) -> Experiment:
    """Return the experiment that a plain mapping defines; raises `Problems` (a `ConfigError`) if it is invalid."""
    experiment, found = examine(values)
    if experiment is None:
        raise Problems(problem for _, problem in found)
    return experiment


def examine(values: Values) -> tuple[Experiment | None, Found]:
    """Return the experiment that the values define, or None if they are invalid, and the problems with the values."""
    try:
        text = json.dumps(values)
    except (TypeError, ValueError, RecursionError) as error:
        message = f"the configuration contains a value that is not plain data: {shortened(str(error))}."
        return None, [((), Problem("wrong_type", "", message))]
    try:
        # The values are passed as JSON, because pydantic's JSON mode is strict about types but builds dataclasses.
        return adapter(Experiment).validate_json(text), []
    except ValidationError as error:
        return None, list(_problems(values, error.errors(include_url=False)))


def without(values: Values, paths: Iterable[KeyPath]) -> Values:
    """Return the values without those at the given paths."""
    result: Values = json.loads(json.dumps(values))
    for *parents, last in paths:
        holder: Any = result
        for part in parents:
            holder = holder.get(part) if isinstance(holder, dict) else None
        if isinstance(holder, dict):
            holder.pop(last, None)
    return result


# ------------------------------------------------------------------ pydantic's errors as problems
def _problems(values: Values, details: Iterable[Any]) -> Iterator[tuple[KeyPath, Problem]]:
    by_path: dict[KeyPath, list[Any]] = {}
    for detail in details:
        by_path.setdefault(_path(values, detail["loc"]), []).append(detail)
    for path, same in by_path.items():
        yield path, _problem(path, same, backend_of(values))


def _path(values: Values, location: tuple[str | int, ...]) -> KeyPath:
    """Return the path of a value, without the names of union members (such as pytorch in backend.pytorch.device)."""
    path: list[str | int] = []
    holder: Any = values
    for part in location:
        inside = part in holder if isinstance(holder, dict) else isinstance(part, int) and isinstance(holder, list)
        if inside:
            path.append(part)
            holder = holder[part]
    return tuple(path)


def _problem(path: KeyPath, details: list[Any], backend: str | None) -> Problem:
    kind, name = details[0]["type"], dotted(path)
    if kind == "unexpected_keyword_argument":
        return Problem("unknown_key", name, unknown_key(path, backend))
    if kind.startswith("union_tag"):
        tag = details[0].get("ctx", {}).get("tag")
        wrong = "no backend is given" if tag is None else f"there is no backend {shortened(str(tag))!r}"
        message = f"{wrong}; choose one of {', '.join(BACKENDS)}."
        return Problem("unknown_option", f"{name}.name", message)
    wanted = " or ".join(dict.fromkeys(str(detail["msg"]).removeprefix("Input should be ") for detail in details))
    given = shortened(json.dumps(details[0]["input"], ensure_ascii=False, default=str))
    return Problem(_code(kind), name, f"must be {wanted}, not {given}.")


def _code(kind: str) -> str:
    if kind == "literal_error":
        return "unknown_option"
    is_type = kind.endswith(("_type", "_parsing", "_from_float")) or kind in ("json_invalid", "int_from_float")
    return "wrong_type" if is_type else "out_of_range"


def backend_of(values: Values) -> str | None:
    """Return the name of the backend that the values choose; None if they choose none, or one that does not exist."""
    backend = values.get("backend")
    name = backend.get("name") if isinstance(backend, dict) else None
    return name if name in BACKENDS else None


def unknown_key(path: KeyPath | str, backend: str | None = None) -> str:
    """Return the message for a key that does not exist, with the most similar existing keys.

    Args:
        path: the key's path; a plain string is a single key, even if it contains dots.
        backend: the chosen backend; only its `backend.…` keys are suggested. None allows the keys of all backends.
    """
    parts = (path,) if isinstance(path, str) else path
    name = dotted(parts)
    paths = sorted(known_keys())
    if len(parts) == 1 and name in paths and "." in name:
        outer, _, inner = name.partition(".")
        return f"in a file, write this key nested, as in {outer}: {{{inner}: …}}."
    if about := _about_backends_key(name, backend):
        return f"unknown key: {about}"
    others = set() if backend is None else {key for key in paths if key.startswith("backend.")} - _keys_of(backend)
    usable = [known for known in paths if known not in others]
    # Users often know only the last part of a path: batch_size, temperature.
    by_leaf = [known for known in usable if known.split(".")[-1] == name.split(".")[-1]]
    beside = [known for known in usable if "." in name and known.rpartition(".")[0] == name.rpartition(".")[0]]
    if name in paths:
        near = did_you_mean(name, beside) if backend else ""
        return f"unknown key: the chosen options have no such key.{near}"
    hint = f" Did you mean '{by_leaf[0]}'?" if len(by_leaf) == 1 else did_you_mean(name, beside or usable)
    return f"unknown key.{hint}"


def _about_backends_key(name: str, backend: str | None) -> str | None:
    """Return the backend's own message about a key that its engine may know, or None if there is no such message."""
    from lem.backends import backend_class

    group, _, key = name.partition(".")
    if backend is None or group != "backend":
        return None
    # In the schema, an engine's extra arguments are a single value, which is a mapping.
    return backend_class(backend).about_key(key.removeprefix("engine_args.").removeprefix("extra_args."))


@cache
def _keys_of(backend: str) -> frozenset[str]:
    return _with_parents(leaf.path for leaf in leaves(BACKENDS[backend], "backend."))


@cache
def known_keys() -> frozenset[str]:
    """Return the dotted paths of all values and of the mappings that contain them."""
    return _with_parents(leaf.path for leaf in leaves()) | {"preset"}


def _with_parents(paths: Iterable[str]) -> frozenset[str]:
    paths = set(paths)
    return frozenset(paths | {path.rpartition(".")[0] for path in paths if "." in path})


# ------------------------------------------------------------------ interpolations, secrets
def resolved(values: Values) -> tuple[Values, Found]:
    """Return the values with interpolations resolved, and a problem for each string that is unusable.

    The unusable strings are ???, interpolations that cannot be resolved, and strings that contain the Hugging Face
    token or a null character.
    """
    found_texts = list(texts(values))
    message = "??? marks a value that must be set; set it."
    found = [(path, Problem("missing_value", dotted(path), message)) for path, text in found_texts if text == MISSING]
    interpolated = [path for path, text in found_texts if "${" in text]
    if interpolated:
        values, unresolved = _interpolated(values, interpolated)
        found += unresolved
    return values, found + secrets(values) + unusable(values)


def secrets(values: Values) -> Found:
    """Return a problem for each value that contains the Hugging Face token, because configurations get published."""
    token = os.environ.get("HF_TOKEN")
    message = "the value contains your HF_TOKEN; remove the token, which the hub client reads from the environment."
    found = (path for path, text in texts(values) if token in text) if token else ()
    return [(path, Problem("secret", dotted(path), message)) for path in found]


def unusable(values: Values) -> Found:
    """Return a problem for each string with a null character, because no name, path or request can contain one."""
    message = "the text contains a null character; remove it."
    return [(path, Problem("out_of_range", dotted(path), message)) for path, text in texts(values) if "\0" in text]


def texts(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Yield the path and value of each string in nested plain data."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from texts(child, (*path, key))
    elif isinstance(value, list):
        for i, child in enumerate(value):
            yield from texts(child, (*path, i))


def _interpolated(values: Values, paths: list[KeyPath]) -> tuple[Values, Found]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    problems: dict[KeyPath, Problem] = {}
    for path in paths:
        # Each string is parsed alone, because OmegaConf rejects the whole configuration if it cannot parse one of them.
        try:
            OmegaConf.create({"value": _at(values, path)})
        except (OmegaConfBaseException, RecursionError) as error:
            problems[path] = _bad_interpolation(path, _at(values, path), error)
    config = OmegaConf.create(_replaced(values, dict.fromkeys(problems)))
    results: dict[KeyPath, Any] = {}
    for path in paths:
        if path in problems:
            continue
        try:
            value = _at(config, path)
            results[path] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except Exception as error:  # a resolver may raise anything
            problems[path] = _bad_interpolation(path, _at(values, path), error)
    return _replaced(values, results), list(problems.items())


def _bad_interpolation(path: KeyPath, text: str, error: BaseException) -> Problem:
    reason = shortened(str(error).splitlines()[0] if str(error) else type(error).__name__, 200)
    circle = isinstance(error, RecursionError) or "recursi" in str(error).casefold()
    reason = "it refers to itself" if circle else reason
    return Problem("bad_interpolation", dotted(path), f"{shortened(text)!r} cannot be resolved: {reason.rstrip('.')}.")


def _at(values: Any, path: KeyPath) -> Any:
    for part in path:
        values = values[part]
    return values


def _replaced(values: Any, news: dict[KeyPath, Any], path: KeyPath = ()) -> Any:
    if path in news:
        return news[path]
    if isinstance(values, dict):
        return {key: _replaced(child, news, (*path, key)) for key, child in values.items()}
    if isinstance(values, list):
        return [_replaced(child, news, (*path, i)) for i, child in enumerate(values)]
    return values
