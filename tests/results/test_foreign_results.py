"""A results directory from someone else can do no harm: links, pipes, edited numbers, odd ids."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec import inspect

from lem.errors import ResultsError
from lem.record import MOST, ROUNDING, ProcessRecord
from lem.results import codec, journal
from lem.results.codec import check_numbers
from lem.results.store import Store
from tests.conftest import SIMULATED, command

ESC, BEL = "\x1b", "\x07"
PAINT = f"{ESC}[31mred{ESC}]0;title{BEL}\nforged line"
ESCAPED = "\\u001b[31mred\\u001b]0;title\\u0007\\nforged line"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A results directory with a completed experiment and one that failed halfway."""
    there = tmp_path_factory.mktemp("made")
    (there / "power.csv").write_text("t_s,power_w\n0,10\n1000,20\n")
    replayed = (*SIMULATED[:-2], "energy=replay", "energy.trace=power.csv", "-y", "-n", "4")
    for arguments in ((), ("backend.fail_at_request=2", "batching.batch_size=2")):
        command("experiment", *replayed, *arguments, cwd=there)
    assert len(Store(there / "results").ids()) == 2
    return there / "results"


@pytest.fixture
def theirs(made, tmp_path) -> Path:
    """A copy of the directory in the working directory."""
    shutil.copytree(made, tmp_path / "results")
    shutil.copy(made.parent / "power.csv", tmp_path)
    return tmp_path / "results"


def of_the_failed(theirs: Path) -> Path:
    return theirs / "raw" / Store(theirs).ids()[1]


def of_the_completed(theirs: Path) -> Path:
    return theirs / "raw" / Store(theirs).ids()[0]


# ------------------------------------------------------------------ links and pipes
@pytest.mark.parametrize("name", ["worker_0.log", "server.log", "journal_0_a2.jsonl", ".lock", "notes"])
def test_a_link_does_not_make_another_file_grow(name, theirs, lem, tmp_path):
    victim = tmp_path / "bashrc"
    victim.write_text("mine\n")
    folder = of_the_failed(theirs)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(victim)
    done = lem("experiment", "--resume", folder.name, "-y")
    assert done.code == 2
    assert "replace it with a plain file." in done.err or "cannot be read" in done.err
    assert victim.read_text() == "mine\n"


@pytest.mark.parametrize(
    "name", ["spec.json", "state.json", "process_0_c1_a1.json", "journal_0_a1.jsonl", "aggregated.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "loop"])
def test_pipes_and_devices_are_not_waited_for(name, kind, theirs, lem):
    file = of_the_completed(theirs) / name
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(name if kind == "loop" else kind)
    for arguments in (("list", "-a"), ("show", file.parent.name), ("show", file.parent.name, "--raw")):
        done = lem("results", *arguments)
        assert done.code in (0, 1, 2)
        assert all(line.startswith("Error: ") for line in done.err.splitlines())
    assert lem("aggregate", "--all", "--force").code in (0, 1)


def test_a_table_that_is_a_pipe_is_not_waited_for(theirs, lem):
    os.mkfifo(theirs / "experiments" / "exp_20200101_000000.parquet")
    assert lem("results", "list").code == 0


def test_a_link_to_a_plain_file_can_be_read(theirs, lem, tmp_path):
    file = of_the_completed(theirs) / "process_0_c1_a1.json"
    file.rename(tmp_path / "elsewhere.json")
    file.symlink_to(tmp_path / "elsewhere.json")
    assert lem("results", "show", file.parent.name, "--raw").code == 0


# ------------------------------------------------------------------ ids and names
@pytest.mark.parametrize("name", ["../../..", "/etc", "exp_../x", f"exp_{PAINT}", "a\0b", "~", "*", ""])
def test_an_id_is_no_path(name, theirs, lem):
    for arguments in (("results", "show", name), ("experiment", "--resume", name, "-y"), ("aggregate", name)):
        done = lem(*arguments)
        assert done.code == 2
        assert done.err.startswith("Error: ")
        assert done.err.count("\n") == 1
        assert ESC not in done.err


@pytest.mark.parametrize("name", ["../../../../tmp", "/tmp", "exp_20200101_000000/..", PAINT, "[red]x"])
def test_a_row_with_an_odd_id_is_named_and_not_followed(name, theirs, lem):
    (file,) = (theirs / "experiments").glob(f"{Store(theirs).ids()[0]}*.parquet")
    table = pq.read_table(file)
    odd = table.set_column(table.schema.get_field_index("experiment_id"), "experiment_id", pa.array([name]))
    for wanted in ("exp_20200101_000000", "exp_20200101_000000-exp_20200101_000001-0123abcd"):
        pq.write_table(odd.cast(table.schema), theirs / "experiments" / f"{wanted}.parquet")
    done = lem("results", "list")
    assert done.code == 1
    assert all("which is not a valid experiment id" in line for line in done.err.splitlines())
    assert ESC not in done.err
    assert lem("results", "show", name).code == 2


def test_names_in_rows_and_records_are_shown_escaped(theirs, lem):
    (file,) = (theirs / "experiments").glob(f"{Store(theirs).ids()[0]}*.parquet")
    table = pq.read_table(file)
    for column in ("model", "dataset", "backend", "device", "status", "energy_components", "decoder"):
        at = table.schema.get_field_index(column)
        table = table.set_column(at, table.schema.field(at), pa.array([PAINT], table.schema.field(at).type))
    pq.write_table(table, file)
    name = Store(theirs).ids()[0]
    for arguments in (("list",), ("list", "-a"), ("show", name), ("list", "--json"), ("show", name, "--json")):
        done = lem("results", *arguments)
        assert done.code == 0, done.err
        assert ESC not in done.out
        assert BEL not in done.out
        if "--json" in arguments:
            found = json.loads(done.out)
            assert (found[0] if isinstance(found, list) else found)["model"] == PAINT
        else:
            assert ESCAPED in done.out
            assert not any(line.startswith("forged") for line in done.out.splitlines())


# ------------------------------------------------------------------ numbers
ODD_NUMBERS = ["1e308", "-1e308", "-1", "1e400", str(1 << 63), "NaN", "Infinity", "-5.5"]
# Numbers that no file of a run has below 0, although their names are not those of amounts.
NEVER_NEGATIVE = ("requests_failed", "counters")
AMOUNTS = ["energy_j", "duration_s", "output_tokens", "requests_completed", "peak_bytes", "resolution_s"]


@pytest.mark.parametrize("number", ODD_NUMBERS)
@pytest.mark.parametrize("name", AMOUNTS)
def test_a_record_edited_by_hand_is_refused(name, number, theirs, lem):
    file = of_the_completed(theirs) / "process_0_c1_a1.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(_changed(content, name)).replace('"odd"', number))
    folder = file.parent.name
    done = lem("aggregate", folder, "--force")
    assert done.code == 1
    assert str(file.relative_to(theirs.parent)) in done.err
    assert done.err.count("\n") == 1
    assert lem("results", "show", folder, "--raw").code == 2
    assert lem("results", "list", "-a").code == 0


def _changed(value, name):
    """Return the record with all values under one name replaced."""
    if isinstance(value, dict):
        return {k: "odd" if k == name and v is not None else _changed(v, name) for k, v in value.items()}
    return [_changed(each, name) for each in value] if isinstance(value, list) else value


def numbers_in(of: inspect.Type, name: str, found: dict[tuple[str, type[Any]], Any]) -> None:
    """Collect the numbers that a record type declares, with the name of their field."""
    if isinstance(of, inspect.IntType | inspect.FloatType):
        found.setdefault((name, type(of)), []).append(of)
    elif isinstance(of, inspect.StructType):
        for field in of.fields:
            numbers_in(field.type, field.name, found)
    elif isinstance(of, inspect.UnionType):
        for each in of.types:
            numbers_in(each, name, found)
    elif isinstance(of, inspect.DictType):
        numbers_in(of.value_type, name, found)
    elif isinstance(of, inspect.ListType | inspect.VarTupleType):
        numbers_in(of.item_type, name, found)
    else:
        assert isinstance(of, inspect.StrType | inspect.BoolType | inspect.NoneType | inspect.LiteralType)


def test_every_number_in_a_record_and_a_journal_has_the_bounds_of_its_name():
    """The types refuse impossible numbers, and the names of the fields tell the user which of them it was."""
    found: dict[tuple[str, type[Any]], Any] = {}
    for read in (ProcessRecord, journal._Rows, journal._Done):
        numbers_in(inspect.type_info(read), "", found)
    assert {"energy_j", "latency_s", "itl_s", "peak_bytes", "energy_at_s", "pid"} <= {name for name, _ in found}
    for (name, kind), numbers in found.items():
        is_amount = codec.AMOUNT.fullmatch(name) or name in NEVER_NEGATIVE
        for number in numbers:
            if kind is inspect.IntType:
                assert (number.ge, number.le) == (0 if is_amount else -(1 << 63), (1 << 63) - 1), name
            elif is_amount:
                assert number.ge == -ROUNDING, name
                assert number.lt == 2.0**63 or (name, number.le) == ("total", MOST), name
            else:
                assert (number.ge, number.le) == (-MOST, MOST), name


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": {"energy_j": 1e9}}', b'{"latency_s": -1e-9}', b'{"text": "energy_j: -1e99"}',
        b'{"temperature_c": -20}', b'{"offset_s": -3}', b"[" * 100_000, b"\xff -1",
        b'{"energy_j": 1.5}\n{"done": [{"latency_s": -1e-12}]}\n{"cut',
    ],
)  # fmt: skip
def test_numbers_that_a_run_can_have(content):
    check_numbers(content)


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b'{"record": {}}\n{"done": [{"itl_s": [0.1, -0.5]}]}\n', "done.0.itl_s.1 is -0.5"),
        (b'{\n "phases": [{"energy": [{"trace_energy_j": -2}]}]\n}', "phases.0.energy.0.trace_energy_j is -2"),
        (b'{"anything": 1e31}', "anything is 1e\\+31"),
        (b'{"pid": 12345678901234567890123456789012}', "pid is 1.23457e\\+31"),
    ],
)
def test_numbers_that_no_run_can_have(content, where):
    with pytest.raises(ValueError, match=f"{where}, which is impossible"):
        check_numbers(content)


def test_the_impossible_number_of_a_file_that_cannot_be_read_is_named(theirs):
    directory = Store(theirs).directory(of_the_completed(theirs).name)
    for name, old, new, where in (
        (
            "process_0_c1_a1.json",
            '"duration_s": ',
            '"duration_s": -',
            r"phases.0.duration_s is -\S+, which is impossible",
        ),
        ("journal_0_a1.jsonl", '"latency_s":', '"latency_s":-', r"done.0.latency_s is -\S+, which is impossible"),
    ):
        file = directory.path / name
        content = file.read_text()
        file.write_text(content.replace(old, new))
        with pytest.raises(ResultsError, match=f"{name} cannot be read: {where}"):
            directory.parts()
        file.write_text(content)
        assert directory.parts()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e308, -1e308, -1.0])
def test_a_row_edited_by_hand_can_be_shown_and_json_stays_valid(number, theirs, lem):
    (file,) = (theirs / "experiments").glob(f"{Store(theirs).ids()[0]}*.parquet")
    table = pq.read_table(file)
    for column in table.schema:
        if column.type == pa.float64():
            at = table.schema.get_field_index(column.name)
            table = table.set_column(at, column, pa.array([number], column.type))
    pq.write_table(table, file)
    name = Store(theirs).ids()[0]
    for arguments in (("list",), ("show", name)):
        assert lem("results", *arguments).code == 0
    shown = lem("results", "show", name, "--json").out
    found = json.loads(shown, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert found["energy_j"] == (number if math.isfinite(number) else None)


# ------------------------------------------------------------------ the directory's own name
@pytest.mark.parametrize("name", ["${x}", "${oc.env:HOME}", "a b", f"x{ESC}[31m", "a,b", "it's", "{a: b}", "\\${x}"])
def test_a_results_directory_is_called_what_the_flag_says(name, lem, tmp_path):
    (tmp_path / "inside").mkdir()
    done = lem("experiment", *SIMULATED, "-n", "1", "-o", f"inside/{name}", "--dry-run")
    assert done.code == 0, done.err
    done = lem("config", "show", "--model", "m", "-o", f"inside/{name}", "--json")
    assert json.loads(done.out)["io"]["results_dir"] == f"inside/{name}"
    done = lem("results", "list", "-o", f"inside/{name}")
    assert done.code == 0
    assert ESC not in done.out
