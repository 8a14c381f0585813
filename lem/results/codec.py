"""Converts plans, records and configurations to and from JSON, by their types; knows nothing about files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import msgspec

from lem.record import MOST, ROUNDING
from lem.results.plan import Plan, PromptsInfo
from lem.spec.campaign import CampaignCell
from lem.spec.experiment import Experiment
from lem.spec.schedule import ScheduleRun

T = TypeVar("T")

# Cached, because building an adapter takes milliseconds.
_ADAPTERS: dict[Any, Any] = {}
_READERS: dict[Any, Callable[[str | bytes], Any]] = {}


def adapter(cls: Any) -> Any:
    """Return the pydantic object that reads and writes values of a type."""
    if cls not in _ADAPTERS:
        from pydantic import TypeAdapter

        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


def to_json(value: Any) -> str:
    """Return a plan, a record or a configuration as JSON."""
    if isinstance(value, msgspec.Struct):
        return msgspec.json.format(msgspec.json.encode(value)).decode()
    return str(adapter(type(value)).dump_json(value, indent=2).decode())


def to_plain(value: Any) -> Any:
    """Return a plan, a record or a configuration as plain data."""
    if isinstance(value, msgspec.Struct):
        return msgspec.to_builtins(value)
    return adapter(type(value)).dump_python(value, mode="json")


def from_json(cls: type[T], content: str | bytes) -> T:
    """Read the output of `to_json`; raises ValueError if the content is anything else."""
    if cls not in _READERS:
        _READERS[cls] = _reader(cls)
    try:
        result: T = _READERS[cls](content)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from None
    return result


def _reader(cls: Any) -> Callable[[str | bytes], Any]:
    """Return the function that reads a type's JSON; every value must have its declared type.

    msgspec reads records in a quarter of the time that pydantic takes. A configuration, however, chooses among several
    dataclasses for its backend. msgspec does not support such a choice, so pydantic reads configurations.
    """
    try:
        return msgspec.json.Decoder(cls).decode
    except TypeError:
        return _with_short_errors(adapter(cls).validate_json)


def _with_short_errors(validate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Wrap pydantic's reader so that it reports only the first error, on one line."""
    from pydantic import ValidationError

    def read(content: str | bytes) -> Any:
        try:
            return validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from None

    return read


# Matches the names of fields that cannot be negative; `lem.record` declares these as an `Amount` or a `Count`.
AMOUNT = re.compile(
    r".*(energy_j|duration_s|tokens|bytes|planned|completed|resolution_[js]|total|uncertainty_j|per_kwh|prompts|power_w"
    r"|latency_s|ttft_s|tpot_s|itl_s|import_s|encode_s|recording_s|cores)"
)


def check_numbers(content: bytes) -> None:
    """Check whether an impossible number is the reason why JSON or JSON lines could not be read.

    Raises:
        ValueError: a number is too large, or one that cannot be negative is negative; the message says which.
    """
    for document in _documents(content):
        _check_numbers(document, "", "")


def _documents(content: bytes) -> Iterator[Any]:
    """Yield the parsed content if it is a single JSON document; otherwise, each of its lines that can be parsed."""
    whole = _plain(content)
    parts = [whole] if whole is not None else map(_plain, content.splitlines())
    yield from (part for part in parts if part is not None)


def _plain(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _check_numbers(value: Any, path: str, name: str) -> None:
    if isinstance(value, dict):
        for key, child in value.items():
            _check_numbers(child, f"{path}.{key}" if path else key, key)
    elif isinstance(value, list):
        for i, child in enumerate(value):
            _check_numbers(child, f"{path}.{i}", name)
    elif isinstance(value, (int, float)):
        is_too_large = abs(value) > MOST or (isinstance(value, int) and value >= 1 << 63)
        if is_too_large or (value < -ROUNDING and AMOUNT.fullmatch(name)):
            raise ValueError(f"{path} is {value:.6g}, which is impossible: the file was edited or is damaged")


def config_sha256(experiment: Experiment) -> str:
    """Return the digest of a configuration without its results directory, which does not affect the measurement."""
    values = to_plain(experiment)
    del values["io"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def arrivals_sha256(times_s: Sequence[float]) -> str:
    """Return the digest of a trace's arrivals."""
    return hashlib.sha256(json.dumps(list(times_s)).encode()).hexdigest()


# ------------------------------------------------------------------ the part of a plan from which rows are computed
class _Named(msgspec.Struct, gc=False):
    name: str


class _Batching(msgspec.Struct, gc=False):
    strategy: str
    batch_size: int


class _Traffic(msgspec.Struct, gc=False):
    ttft_limit_s: float | None
    itl_limit_s: float | None
    pattern: str = "closed"
    concurrency: int | None = None


class ExperimentExcerpt(msgspec.Struct, gc=False):
    """The configuration values that have columns of their own in the tables."""

    model: str | None
    backend: _Named
    dataset: _Named
    decoder: _Named
    batching: _Batching
    traffic: _Traffic
    max_output_tokens: int
    seed: int
    cycles: int


class PlanExcerpt(msgspec.Struct, gc=False):
    """The part of a plan that is needed to compute rows; `config_json` is the whole configuration as JSON.

    Reading the excerpt takes a third of the time that reading the plan takes, and needs no pydantic. This matters
    because a results directory may contain tens of thousands of plans.
    """

    experiment_id: str
    experiment: ExperimentExcerpt
    prompts: PromptsInfo
    config_sha256: str = ""
    processes: int = 1
    overrides: list[str] = []
    campaign: CampaignCell | None = None
    schedule: ScheduleRun | None = None
    config_json: str = ""


class _Configured(msgspec.Struct, gc=False):
    experiment: msgspec.Raw


def read_excerpt(content: bytes) -> PlanExcerpt:
    """Read the excerpt of a plan; raises ValueError if the plan is damaged."""
    try:
        return _excerpt(content)
    except ValueError:  # a plan from an older version may lack a value for which only `Plan` has a default
        return excerpt_of(from_json(Plan, content))


def excerpt_of(plan: Plan) -> PlanExcerpt:
    """Return the excerpt of a plan."""
    return _excerpt(to_json(plan).encode())


def _excerpt(content: bytes) -> PlanExcerpt:
    excerpt = from_json(PlanExcerpt, content)
    configuration = bytes(from_json(_Configured, content).experiment)
    excerpt.config_json = msgspec.json.format(configuration, indent=-1).decode()
    return excerpt
