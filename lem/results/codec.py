"""Plans, records and configurations as JSON: written and read by their types. Knows no file."""

from __future__ import annotations

import hashlib
import json
import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cache
from operator import attrgetter
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from lem.record import COMMON, ProcessRecord, RequestRecord
from lem.results.plan import Plan
from lem.spec.experiment import Experiment

T = TypeVar("T")


# Building one takes milliseconds.
_ADAPTERS: dict[Any, Any] = {}
_READERS: dict[Any, Callable[[str | bytes], Any]] = {}


def adapter(cls: Any) -> Any:
    """Return the type's reader and writer."""
    if cls not in _ADAPTERS:
        from pydantic import TypeAdapter

        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


def to_json(value: Any, *, indent: int | None = 2) -> str:
    """Write a plan, a record or a configuration as JSON."""
    return str(adapter(type(value)).dump_json(value, indent=indent).decode())


def to_compact_json(value: Any) -> str:
    """Write the same without line breaks, in a third of the time."""
    import msgspec

    return msgspec.json.encode(value).decode()


def from_json(cls: type[T], text: str | bytes) -> T:
    """Read what `to_json` wrote; raises ValueError when it is something else."""
    result: T = reader(cls)(text)
    return result


def reader(cls: Any) -> Callable[[str | bytes], Any]:
    """Return what reads a type's JSON, each value of which must be of its type; it raises ValueError.

    msgspec reads records in half of the time that pydantic takes; only types that choose among dataclasses, as a
    configuration does among backends, are left to pydantic.
    """
    if cls not in _READERS:
        import msgspec

        try:
            _READERS[cls] = with_value_errors(msgspec.json.Decoder(cls).decode)
        except TypeError:
            _READERS[cls] = _with_short_errors(adapter(cls).validate_json)
    return _READERS[cls]


def _with_short_errors(validate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return pydantic's reader with the first of its errors in a line."""
    from pydantic import ValidationError

    def read(content: str | bytes) -> Any:
        try:
            return validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from None

    return read


def with_value_errors(decode: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a reader of msgspec's that raises ValueError where its own errors are something else."""
    import msgspec

    damaged = msgspec.MsgspecError

    def read(content: str | bytes) -> Any:
        try:
            return decode(content)
        except damaged as error:
            raise ValueError(str(error)) from None

    return read


def to_plain(value: Any) -> Any:
    """Return a plan, a record or a configuration as plain data."""
    return adapter(type(value)).dump_python(value, mode="json")


def config_sha256(experiment: Experiment) -> str:
    """Return the digest of what is measured: of every value but where the results go."""
    values = to_plain(experiment)
    del values["io"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def arrivals_sha256(times_s: Sequence[float]) -> str:
    """Return the digest of the arrivals of a trace."""
    return hashlib.sha256(json.dumps(list(times_s)).encode()).hexdigest()


# Fields that no row is made from.
LEFT_OUT = frozenset(
    {
        *(f"ProcessRecord.{name}" for name in ("format_version", "counters")),
        *(f"EnergyReading.{name}" for name in ("method", "resolution_j")),
        *(f"ModelInfo.{name}" for name in ("name", "revision", "architecture")),
        *(f"EngineInfo.{name}" for name in ("backend", "settings")),
        *(f"Environment.{name}" for name in ("hostname", "os", "cpu_model", "memory_bytes", "gpus", "versions")),
        *(f"Environment.{name}" for name in ("cpu_governor", "driver_version", "cuda_version", "git_commit")),
        *(f"Environment.{name}" for name in ("git_dirty", "container", "slurm", "devices_after")),
        *(f"DeviceState.{name}" for name in ("sm_clock_mhz", "memory_clock_mhz", "max_sm_clock_mhz", "ecc", "mig")),
        *(f"DeviceState.{name}" for name in ("temperature_c", "power_limit_w", "default_power_limit_w")),
        *(f"DeviceState.{name}" for name in ("persistence", "throttle_reasons", "foreign_processes")),
    }
)


@cache
def _brief(record_type: type[Any], optional: tuple[str, ...] = ()) -> Any:
    """Return a msgspec type with the fields of a record type that are needed, and its methods."""
    hints = get_type_hints(record_type)
    kept = [f for f in fields(record_type) if f"{record_type.__name__}.{f.name}" not in LEFT_OUT]
    methods = {name: each for name, each in vars(record_type).items() if isinstance(each, types.FunctionType)}
    return msgspec.defstruct(
        f"Brief{record_type.__name__}",
        [(f.name, _brief_hint(hints[f.name]), *((None,) if f.name in optional else _default(f))) for f in kept],
        namespace={name: each for name, each in methods.items() if not name.startswith("__")},
        kw_only=True,
        gc=False,  # none of them can be part of a cycle
    )


def _brief_hint(hint: Any) -> Any:
    if is_dataclass(hint):
        return _brief(hint)  # type: ignore[arg-type]
    if get_origin(hint) in (Union, types.UnionType):
        return Union[tuple(map(_brief_hint, get_args(hint)))]  # noqa: UP007 - made at run time
    if get_origin(hint) is tuple:
        return tuple[tuple(map(_brief_hint, get_args(hint)))]  # type: ignore[misc]
    return hint


def _default(f: Any) -> tuple[Any, ...]:
    if f.default_factory is not MISSING:
        return (msgspec.field(default_factory=f.default_factory),)
    return () if f.default is MISSING else (f.default,)


_read_record = with_value_errors(msgspec.json.Decoder(_brief(ProcessRecord)).decode)


def read_record(content: bytes) -> ProcessRecord:
    """Read a process's record, as far as it is needed; raises ValueError when it is damaged."""
    found: ProcessRecord = _read_record(content)
    return found


# A request's row: it has all fields of a RequestRecord. Those which all rows of a window share stand in the window's
# record, not in the journal's lines.
BriefRow: type[RequestRecord] = _brief(RequestRecord, COMMON)


_own_values = attrgetter(*(f.name for f in fields(RequestRecord)))


def whole(row: RequestRecord) -> RequestRecord:
    """Return a brief row as the record that it was written from."""
    return RequestRecord(*_own_values(row))


def changed(record: T, **values: Any) -> T:
    """Return a record with other values, be it brief or whole."""
    if isinstance(record, msgspec.Struct):
        return msgspec.structs.replace(record, **values)
    return replace(record, **values)  # type: ignore[type-var]


class _Named(msgspec.Struct, gc=False):
    name: str


class _Batching(msgspec.Struct, gc=False):
    strategy: str
    batch_size: int


class _Traffic(msgspec.Struct, gc=False):
    ttft_limit_s: float | None
    itl_limit_s: float | None


class BriefExperiment(msgspec.Struct, gc=False):
    """What rows say of a configuration, but for the whole of it."""

    model: str | None
    backend: _Named
    dataset: _Named
    decoder: _Named
    batching: _Batching
    traffic: _Traffic
    max_output_tokens: int
    seed: int
    cycles: int


class _BriefPrompts(msgspec.Struct, gc=False):
    count: int
    sha256: str


class BriefPlan(msgspec.Struct, gc=False):
    """A plan, as far as rows need it; `config_json` is the whole configuration as JSON."""

    experiment_id: str
    experiment: BriefExperiment
    prompts: _BriefPrompts
    config_sha256: str
    processes: int
    overrides: list[str]
    config_json: str


class _OnDisk(msgspec.Struct, gc=False):
    experiment_id: str
    experiment: msgspec.Raw
    prompts: _BriefPrompts
    config_sha256: str = ""
    processes: int = 1
    overrides: list[str] = []


_read_on_disk = with_value_errors(msgspec.json.Decoder(_OnDisk).decode)


_read_experiment = with_value_errors(msgspec.json.Decoder(BriefExperiment).decode)


def read_plan(content: bytes) -> BriefPlan:
    """Read a plan; raises ValueError when it is damaged."""
    try:
        return _plan(content)
    except ValueError:  # an older version's may lack what has a default: the whole reader knows it
        return of_plan(from_json(Plan, content))


def of_plan(plan: Plan) -> BriefPlan:
    """Return what rows need of a plan."""
    return _plan(to_json(plan, indent=None).encode())


def _plan(content: bytes) -> BriefPlan:
    found = _read_on_disk(content)
    return BriefPlan(
        found.experiment_id,
        _read_experiment(found.experiment),
        found.prompts,
        found.config_sha256,
        found.processes,
        found.overrides,
        msgspec.json.format(bytes(found.experiment), indent=-1).decode(),
    )
