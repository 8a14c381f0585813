"""`lem doctor`: what it prints for people and for programs, its exit codes, and what it refuses."""

from __future__ import annotations

import json
import re

import pytest

from lem.runner.finding import CHECKS, GROUPS
from tests.cli.test_cli import HEAVY, modules_after
from tests.conftest import command
from tests.nvml_standin import environment, scenario

TWO_GPUS = """
    devices 2
    device 0 name NVIDIA H100
    device 1 name NVIDIA H100
    device 0 tick_ms 100
    device 1 tick_ms 100
    device 0 persistence 0
    device 1 process 11 100 evil\x1b[31m.py
"""


@pytest.fixture
def doctor(standin, tmp_path):
    """Return a function that runs `lem doctor` on a scenario."""

    def run(text: str, *arguments: str, **env: str):
        return command(
            "doctor", *arguments, cwd=tmp_path, **environment(standin, scenario(tmp_path / "s", text), **env)
        )

    return run


def test_the_table_has_groups_and_each_check_with_its_status_and_remedy(doctor):
    done = doctor(TWO_GPUS)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].startswith("Energy measured: GPU; estimated: ")
    assert [line for line in lines if line in GROUPS.values()] == list(GROUPS.values())
    assert any(
        re.fullmatch(r"ok       GPU energy       GPU 0(, 1)?: energy counter, tick 1?\d\d ms\.", x) for x in lines
    )
    assert "ok       GPU power        GPU 0, 1: instant value (NVML_FI_DEV_POWER_INSTANT)." in lines
    off = next(i for i, line in enumerate(lines) if line.startswith("limited  persistence      GPU 0: off"))
    assert lines[off + 1].strip() == "→ sudo nvidia-smi -pm 1, or start nvidia-persistenced."
    assert lines[off + 2].startswith("ok       persistence      GPU 1: on.")
    assert not [line for line in lines if line != line.rstrip()]


def test_names_from_the_machine_paint_no_terminal(doctor):
    assert "evil\\u001b[31m.py" in doctor(TWO_GPUS).out
    done = doctor(TWO_GPUS, "--json")
    assert "\x1b" not in done.out
    processes = [each for each in json.loads(done.out)["findings"] if each["check"] == "gpu_processes"]
    assert processes[1]["values"]["processes"] == [{"pid": 11, "used_bytes": 100 * 2**20, "name": "evil\x1b[31m.py"}]


def test_the_json_has_the_documented_shape(lem):
    shown = json.loads(lem("doctor", "--json").out)
    assert list(shown) == [
        "format_version", "lem_version", "can_measure", "energy", "measured", "estimated", "engines", "verdict",
        "findings",
    ]  # fmt: skip
    assert (shown["format_version"], shown["can_measure"]) == (1, True)
    for each in shown["findings"]:
        assert list(each) == ["group", "check", "device", "status", "fact", "remedy", "values"]
        assert CHECKS[each["check"]][0] == each["group"]
        assert each["status"] in ("ok", "limited", "missing")


def test_where_nothing_can_be_measured_the_exit_code_is_1_and_it_says_why(lem, tmp_path):
    (tmp_path / "file").touch()
    done = lem("doctor", "-o", "file")
    assert done.code == 1
    assert done.out.startswith("Nothing can be measured here: the results directory cannot be written to.\n")
    assert json.loads(lem("doctor", "-o", "file", "--json").out)["can_measure"] is False


def test_it_leaves_nothing_behind_and_reads_the_environments_results_directory(lem, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_ENERGY_RESULTS_DIR", "elsewhere")
    assert "results          elsewhere: will be created." in lem("doctor").out
    assert not list(tmp_path.iterdir())


@pytest.mark.processes
def test_it_imports_nothing_heavy_but_the_drivers_binding(tmp_path):
    assert not modules_after("doctor", cwd=tmp_path) & (set(HEAVY) - {"pynvml"})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["a.yaml"], "a.yaml"),
        (["-c", "3"], "--cycles"),
        (["--warmup-timeout", "3", "--cool-to", "45"], "--warmup-timeout, --cool-to"),
        (["--campaign-name", "x"], "--campaign-name"),
        (["-m", "tiny", "-y"], "--model, --yes"),
        (["--resume", "x"], "--resume"),
        (["--difference", "0.1"], "--difference"),
    ],
)
def test_what_only_noise_reads_is_refused_without_it(lem, arguments, named):
    done = lem("doctor", *arguments)
    assert done.code == 2
    assert done.err == f"Error: {named}: accepted only together with --noise. Add --noise to measure the noise.\n"


def test_every_option_is_refused_without_noise_or_read(lem):
    """No option is accepted and ignored."""
    from typer.main import get_command

    from lem.cli.commands import all_commands

    read = {"arguments", "noise", "as_json", "results_dir", "help"}
    for parameter in get_command(all_commands()).commands["doctor"].params:
        if parameter.name in read:
            continue
        flag = max(parameter.opts, key=len)
        value = [] if parameter.is_flag else ["3"]
        done = lem("doctor", flag, *value)
        assert done.code == 2, flag
        assert re.search(rf"Error: {flag}: accepted only together with --noise", done.err), (flag, done.err)
