"""`lem batch`: many files, checked first, run one after another or several at a time, and each accounted for."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import yaml

from lem.cli.flags import is_override
from lem.config.files import find
from lem.config.yamltext import escaped
from lem.errors import ConfigError
from lem.machine.gpu import Gpu
from lem.studies.pool import Slot, are_disjoint, slots
from tests.conftest import begin, command, wait_for
from tests.nvml_standin import environment, scenario

pytestmark = pytest.mark.processes

CONFIG = {"model": "any", "backend": "simulated", "dataset": {"name": "sample", "sample_size": 4}, "energy": "none"}


def write(file: Path, **values) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(CONFIG | values))
    return file


def write_six(folder: Path, **backend) -> None:
    """Write six configs, the fourth of which fails."""
    for number in range(1, 7):
        fails = {"fail_at_request": 2} if number == 4 else {}
        write(folder / f"e{number}.yaml", seed=number, backend={"name": "simulated", **backend, **fails})


def manifest(tmp_path):
    (file,) = tmp_path.glob("multirun/*/experiments.json")
    return json.loads(file.read_text())


def rows(tmp_path):
    return json.loads(command("results", "list", "--json", cwd=tmp_path).out)


def records(tmp_path):
    return [json.loads(file.read_text()) for file in sorted(tmp_path.glob("results/raw/*/process_0_c1_a1.json"))]


def codes(record):
    return {warning["code"] for warning in record["warnings"]}


# ------------------------------------------------------------------ which files
@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.yaml", "a.yml", "sub/c.yaml", "sub/deep/batch_size=4,x.yaml", "odd[1].yaml"):
        write(Path(name))
    Path("notes.txt").write_text("")
    Path("sub/grid.yaml").write_text("# made by lem\nlem_grid:\n  base: c.yaml\n")
    Path("empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["."], ["a.yml", "b.yaml", "odd[1].yaml"]),
        (["*.yaml"], ["b.yaml", "odd[1].yaml"]),
        (["sub"], ["sub/c.yaml"]),
        (["**/*.yaml"], ["b.yaml", "odd[1].yaml", "sub/c.yaml", "sub/deep/batch_size=4,x.yaml"]),
        (["sub/c.yaml", "b.yaml", "./sub/*"], ["sub/c.yaml", "b.yaml"]),
        (["odd[1].yaml"], ["odd[1].yaml"]),
    ],
)
def test_files_folders_and_patterns_name_configs_each_once(files, patterns, found):
    assert list(map(str, find(patterns))) == found


def test_all_patterns_that_match_nothing_are_reported(files):
    with pytest.raises(ConfigError) as error:
        find(["nope*.yaml", "missing.yaml", "notes.txt", "empty", "sub/grid.yaml", "b.yaml"])
    assert len(error.value.problems) == 5
    assert "There is no such file" in error.value.problems[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed=3", True),
        ("+batching.batch_size=3", True),
        ("io.results_dir=a/b.yaml", True),
        ("hydra/launcher=basic", True),
        ("configs/batch_size=*.yaml", False),
        ("configs/*.yaml", False),
        ("./a=b.yaml", False),
        ("~/configs", False),
    ],
)
def test_an_override_is_distinguished_from_a_pattern(text, expected):
    assert is_override(text) is expected


def test_a_file_whose_name_looks_like_an_override_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_override("batch_size=4.yaml")
    write(Path("batch_size=4.yaml"))
    assert not is_override("batch_size=4.yaml")


# ------------------------------------------------------------------ before the first
def test_all_problems_of_all_files_are_reported_before_anything_runs(lem, tmp_path):
    write(tmp_path / "c/good.yaml")
    write(tmp_path / "c/range.yaml", seed=-1)
    write(tmp_path / "c/rule.yaml", batching={"strategy": "dynamic"})
    (tmp_path / "c/broken.yaml").write_text("model: [any\n")
    refused = lem("batch", "c", "-y")
    assert refused.code == 2
    for word in ("c/range.yaml", "c/rule.yaml", "c/broken.yaml", "seed", "token budget", "YAML"):
        assert word in refused.err, word
    assert "good" not in refused.err
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "multirun").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope/*.yaml"], "matches no config file"),
        (["seed=3"], "needs config files"),
        (["a.yaml", "seed=1,2"], "one value for all files"),
        (["a.yaml", "sead=1"], "seed"),
        (["a.yaml", "-d", "nope"], "there is no option 'nope'"),
        (["a.yaml", "-p", "nope.txt"], "--prompts: there is no file"),
        (["a.yaml", "--parallel", "0"], "--parallel"),
    ],
)
def test_bad_input_is_a_sentence(lem, tmp_path, arguments, message):
    write(tmp_path / "a.yaml")
    refused = lem("batch", *arguments, "-y")
    assert refused.code == 2
    assert message in refused.err


def test_a_grid_index_that_the_shell_names_too_is_passed_over(lem, tmp_path):
    write(tmp_path / "c/a.yaml")
    write(tmp_path / "b.yaml")
    (tmp_path / "c/grid.yaml").write_text("lem_grid: 1\n")
    listed = lem("batch", "c/a.yaml", "c/grid.yaml", "--dry-run")
    assert listed.code == 0
    assert len(listed.out.splitlines()) == 1
    for alone in (["c/grid.yaml"], ["b.yaml", "c/grid.yaml"]):  # its grid would not run, and nobody would notice
        refused = lem("batch", *alone, "--dry-run")
        assert refused.code == 2
        assert "'c/grid.yaml' matches no config file (.yaml, .yml): this file is the index of a grid" in refused.err


def test_a_dry_run_lists_what_each_file_would_run(lem, tmp_path):
    write(tmp_path / "c/a.yaml")
    write(tmp_path / "c/b.yaml", dataset="sample")
    listed = lem("batch", "c/*.yaml", "--dry-run", "-n", "7", "--parallel", "2")
    assert listed.code == 0
    assert listed.out.splitlines() == [
        "[1/2] c/a.yaml: 7 prompts of sample through any (simulated)",
        "[2/2] c/b.yaml: 7 prompts of sample through any (simulated)",
    ]
    assert not (tmp_path / "results").exists()


# ------------------------------------------------------------------ one after another
def test_a_failing_config_ends_nothing(lem, tmp_path):
    write_six(tmp_path / "c")
    done = lem("batch", "c/e[3-5].yaml", "max_output_tokens=8", "-o", "out", "-y")
    assert done.code == 1
    assert "c/e4.yaml: simulated failure at request 2" in done.out
    assert "2 completed, 1 failed" in done.out
    listed = json.loads(lem("results", "list", "--json", "-o", "out").out)
    assert [(row["seed"], row["status"]) for row in listed] == [(3, "completed"), (4, "failed"), (5, "completed")]
    assert {row["max_output_tokens"] for row in listed} == {8}
    assert listed[0]["overrides"] == ["io.results_dir='out'", "max_output_tokens=8"]
    assert [m["config_file"] for m in manifest(tmp_path)] == ["c/e3.yaml", "c/e4.yaml", "c/e5.yaml"]
    assert not any("shared_hardware" in warning for row in listed for warning in row["warnings"])


def test_the_plan_is_what_ran_and_hydra_keeps_its_own_record(lem, tmp_path):
    from lem.config.check import check

    (tmp_path / "p.txt").write_text("one\ntwo\n")
    write(tmp_path / "a.yaml", dataset={"path": "p.txt"}, warmup={"until_cv": 0.05, "max_s": 1e-05})
    assert lem("batch", "a.yaml", "model='any ünï: #x'", "-y").code == 0
    (sweep,) = tmp_path.glob("multirun/*")
    planned = yaml.safe_load((sweep / "plan/cell/c000.yaml").read_text())
    (spec,) = tmp_path.glob("results/raw/*/spec.json")
    ran = json.loads(spec.read_text())["experiment"]
    assert check(planned) == check(ran)
    assert ran["model"] == "any ünï: #x"
    assert ran["warmup"]["max_s"] == 1e-05
    assert (sweep / "multirun.yaml").is_file()


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "a\\${b}", "\\\\${b} ${", "$5 {x} \\", "plain"])
def test_a_plan_holds_texts_as_they_are(text):
    from omegaconf import OmegaConf

    plan = yaml.safe_dump(escaped({"model": [text]}))
    assert OmegaConf.to_container(OmegaConf.create(plan), resolve=True) == {"model": [text]}


def test_fail_fast_starts_nothing_after_a_failure(lem, tmp_path):
    write_six(tmp_path / "c")
    done = lem("batch", "c/e[3-6].yaml", "--fail-fast", "-y")
    assert done.code == 1
    assert [m["status"] for m in manifest(tmp_path)] == ["completed", "failed", "not run", "not run"]
    assert "2 not run" in done.out


# ------------------------------------------------------------------ at once
def test_six_configs_two_at_a_time_one_of_which_fails(tmp_path):
    write_six(tmp_path / "c")
    done = command("batch", "c/*.yaml", "--parallel", "2", "-y", cwd=tmp_path)
    assert done.code == 1, done.err
    made = manifest(tmp_path)
    assert [m["status"] for m in made] == ["completed"] * 3 + ["failed"] + ["completed"] * 2
    assert len({m["experiment_id"] for m in made}) == 6
    assert {row["experiment_id"] for row in rows(tmp_path)} == {m["experiment_id"] for m in made}
    logs = [Path(m["log"]).read_text() for m in made]
    assert all(m["experiment_id"] in log for m, log in zip(made, logs, strict=True))
    assert "simulated failure at request 2" in logs[3]
    assert Path(made[3]["log"]).name in done.out
    assert "6 of 6 ended, 1 failed" in done.err
    found = records(tmp_path)
    assert len(found) == 6
    assert all("shared_hardware" in codes(record) for record in found)


def test_a_child_that_is_killed_is_a_failed_row_and_ends_nothing(tmp_path):
    write_six(tmp_path / "c", decode_s_per_token=0.002)
    process = begin("batch", "c/e[1-3].yaml", "-n", "14", "--parallel", "2", "-y", cwd=tmp_path)
    wait_for(process, "[1] Prompts 0")
    time.sleep(1)
    children = psutil.Process(process.pid).children()
    (victim,) = [child for child in children if any("c000.json" in part for part in child.cmdline())]
    victim.kill()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in err
    killed, *others = manifest(tmp_path)
    assert (killed["status"], [m["status"] for m in others]) == ("failed", ["completed"] * 2)
    assert "SIGKILL" in killed["error"]
    assert "SIGKILL" in out
    # The measurements of its worker are kept.
    (row,) = [row for row in rows(tmp_path) if row["experiment_id"] == killed["experiment_id"]]
    assert (row["status"], 0 < row["requests_completed"] < 14) == ("interrupted", True)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_all_children_and_keeps_what_they_measured(tmp_path, how):
    write_six(tmp_path / "c", decode_s_per_token=0.002)
    process = begin("batch", "c/e[1-3].yaml", "-n", "60", "--parallel", "2", "-y", cwd=tmp_path)
    wait_for(process, "[1] Prompts 0")
    time.sleep(2)
    family = psutil.Process(process.pid).children(recursive=True)
    started_s = time.monotonic()
    os.killpg(process.pid, how)
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - started_s < 10
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not [each for each in family if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    assert [m["status"] for m in manifest(tmp_path)] == ["interrupted", "interrupted", "not run"]
    assert "2 interrupted, 1 not run" in out
    assert all(0 < row["requests_completed"] < 60 for row in rows(tmp_path))


def newest(tmp_path):
    return json.loads(max(tmp_path.glob("multirun/*/experiments.json")).read_text())


@pytest.mark.parametrize(("parallel", "line"), [("1", "Prompts 0"), ("2", "[1] Prompts 0")])
def test_the_same_batch_resumes_what_was_left_unfinished(tmp_path, parallel, line):
    write_six(tmp_path / "c", decode_s_per_token=0.002)
    again = ("batch", "c/e[1-3].yaml", "-n", "14", "--parallel", parallel, "-y")
    process = begin(*again, cwd=tmp_path)
    wait_for(process, line)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert "--resume" not in out + err
    assert err.count("The same command resumes unfinished experiments") == 1
    left = [m["experiment_id"] for m in manifest(tmp_path) if m["status"] == "interrupted"]
    done = {row["experiment_id"]: row["requests_completed"] for row in rows(tmp_path)}
    assert left
    assert 0 < done[left[0]] < 14
    dry = command(*again, "--dry-run", cwd=tmp_path)
    assert f"resuming {left[0]}: {done[left[0]]} of 14 prompts are done" in " ".join(dry.out.split())
    assert "resuming" not in command(*again, "--dry-run", "--fresh", cwd=tmp_path).out
    finished = command(*again, cwd=tmp_path)
    assert finished.code == 0, finished.err
    assert f"resuming {left[0]}" in finished.err
    ids = [m["experiment_id"] for m in newest(tmp_path)]
    assert set(left) <= set(ids)
    assert len(set(ids)) == 3
    found = {row["experiment_id"]: row for row in rows(tmp_path)}
    assert [found[i]["requests_completed"] for i in ids] == [14] * 3
    assert [found[i]["resumed"] for i in ids] == [int(i in left) for i in ids]


def test_of_two_equal_files_one_resumes_and_one_starts(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "c" / f"{name}.yaml", backend={"name": "simulated", "fail_at_request": 2})
    assert command("batch", "c", "-y", cwd=tmp_path).code == 1
    (first, second) = [m["experiment_id"] for m in newest(tmp_path)]
    (tmp_path / "results/unfinished" / first).unlink()
    assert command("batch", "c", "-y", cwd=tmp_path).code == 1
    taken, made = [m["experiment_id"] for m in newest(tmp_path)]
    assert taken == second
    assert made not in (first, second)


def test_a_killed_batch_ends_its_children(tmp_path):
    write_six(tmp_path / "c", decode_s_per_token=0.002)
    process = begin("batch", "c/e[1-2].yaml", "-n", "100", "--parallel", "2", "-y", cwd=tmp_path)
    wait_for(process, "[1] Prompts 0")
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]


# ------------------------------------------------------------------ GPUs
def gpus(count: int) -> list[Gpu]:
    return [Gpu(i, f"GPU-0000000{i}", "H100", None) for i in range(count)]


def test_visible_gpus_are_split_into_disjoint_sets_of_the_same_size():
    assert [place.devices for place in slots(2, gpus(5), {})] == [
        "GPU-00000000,GPU-00000001",
        "GPU-00000002,GPU-00000003",
    ]
    assert [len(place.gpus) for place in slots(3, gpus(8), {})] == [2, 2, 2]


def test_the_users_own_entries_are_used_and_no_hidden_gpu():
    # As in CUDA, the first entry that matches no GPU ends the list: two are visible here.
    places = slots(2, gpus(2), {"CUDA_VISIBLE_DEVICES": "3, MIG-1-0,-1,5"})
    assert [place.devices for place in places] == ["3", "MIG-1-0"]


def test_without_enough_gpus_the_environment_stays_as_it_is():
    assert [place.devices for place in slots(2, gpus(1), {})] == [None, None]
    assert slots(3, [], {"CUDA_VISIBLE_DEVICES": ""}) == [Slot(())] * 3


def test_instances_of_one_gpu_share_it():
    one, other = (Gpu(0, "GPU-0", "H100", None, f"MIG-0-{i}") for i in range(2))
    assert not are_disjoint([Slot((one,)), Slot((other,))])
    assert are_disjoint([Slot((one, other)), Slot((gpus(2)[1],))])


FOUR_GPUS = "devices 4\n" + "".join(f"device {i} power constant {100 * (i + 1)}\n" for i in range(4))


def on_gpus(standin, tmp_path, *arguments, text=FOUR_GPUS, **env):
    known = environment(standin, scenario(tmp_path / "scenario.txt", text), **env)
    return command("batch", "c", "-y", *arguments, cwd=tmp_path, **known)


def test_each_child_has_separate_gpus_and_separate_energy(standin, tmp_path):
    for number in (1, 2):
        write(tmp_path / f"c/e{number}.yaml", seed=number, backend={"name": "simulated", "gpus": 1})
    done = on_gpus(standin, tmp_path, "--parallel", "2", "energy=nvml", "energy.idle_s=0", CUDA_VISIBLE_DEVICES="3,1")
    assert done.code == 0, done.err
    watts = []
    for record in records(tmp_path):
        (phase,) = [phase for phase in record["phases"] if phase["name"] == "measured"]
        watts.append(round(sum(r["energy_j"] for r in phase["energy"]) / phase["duration_s"], -2))
        assert "shared_hardware" not in codes(record)
        assert len(record["environment"]["gpus"]) == 1
    assert sorted(watts) == [200, 400]


def test_whole_machine_meters_are_shared_even_where_gpus_are_not(standin, tmp_path):
    for number in (1, 2):
        write(tmp_path / f"c/e{number}.yaml", seed=number, backend={"name": "simulated", "gpus": 1})
    assert on_gpus(standin, tmp_path, "--parallel", "2", "energy=none").code == 0
    assert all("shared_hardware" in codes(record) for record in records(tmp_path))


def test_a_config_that_needs_more_gpus_than_its_share_is_refused_before_any_runs(standin, tmp_path):
    write(tmp_path / "c/a.yaml", backend={"name": "simulated", "gpus": 2})
    write(tmp_path / "c/b.yaml", backend={"name": "simulated", "gpus": 1})
    write(tmp_path / "c/c.yaml", backend={"name": "simulated", "gpus": 1})
    refused = on_gpus(standin, tmp_path, "--parallel", "3")
    assert refused.code == 2
    assert "--parallel 3 gives each run 1 of 4 GPUs" in refused.err
    assert "c/a.yaml" in refused.err
    assert "c/b.yaml" not in refused.err
    assert not (tmp_path / "results").exists()
    assert on_gpus(standin, tmp_path, "--parallel", "2", "--dry-run").code == 0


def test_more_runs_than_gpus_are_refused_unless_they_use_none(standin, tmp_path):
    for number in (1, 2):
        write(tmp_path / f"c/e{number}.yaml", seed=number, backend={"name": "simulated", "gpus": 1})
    refused = on_gpus(standin, tmp_path, "--parallel", "2", "--dry-run", text="devices 1\n")
    assert refused.code == 2
    assert "Use --parallel 1" in refused.err
    on_cpu = on_gpus(standin, tmp_path, "--parallel", "2", "--dry-run", "backend.gpus=0", text="devices 1\n")
    assert on_cpu.code == 0, on_cpu.err
