"""Grids: the syntax of --vary, what the files compose to, what is refused, and that no other file is touched."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from lem.config import files
from lem.config.compose import prepare
from lem.config.options import Options
from lem.config.overrides import quoted
from lem.config.yamlfile import read
from lem.config.yamltext import block, flow
from lem.errors import ConfigError
from lem.studies import grid
from tests.conftest import Finished

BASE = "model: any\nbackend: simulated\ndataset: {name: sample, sample_size: 2}\nenergy: none\nwarmup: {prompts: 0}\n"


@pytest.fixture
def base(tmp_path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path / "base.yaml"


@pytest.fixture
def generate(lem, base):
    """Run `lem config generate-grid base.yaml -o grid` with these --vary values and flags."""

    def run(*vary: str, flags: tuple[str, ...] = (), output: str = "grid", file: str = "base.yaml") -> Finished:
        varied = [part for text in vary for part in ("--vary", text)]
        return lem("config", "generate-grid", file, *varied, "-o", output, *flags)

    return run


def index(folder: str = "grid") -> dict:
    return yaml.safe_load(Path(folder, "grid.yaml").read_text())


def names(folder: str = "grid") -> set[str]:
    return {path.name for path in Path(folder).iterdir()} - {"grid.yaml", ".lem-schema.json"}


def axes(*vary: str) -> dict[str, list]:
    return {axis.key: list(axis.plain) for axis in grid.read_axes(vary, Options())[0]}


# ------------------------------------------------------------------ what is varied
@pytest.mark.parametrize(
    ("text", "key", "values"),
    [
        ("batch_size=1,2", "batching.batch_size", [1, 2]),
        ("batching.batch_size=4", "batching.batch_size", [4]),
        ("load_in_8bit=true,false", "quantization.load_in_8bit", [True, False]),
        ("max_input_tokens=null,64", "max_input_tokens", [None, 64]),
        ("temperature=0.5,1e-2", "decoder.temperature", [0.5, 0.01]),
        ("model='a,b',\"c d\",e", "model", ["a,b", "c d", "e"]),
        ("gpus=[0,1],[2,3]", "gpus", [[0, 1], [2, 3]]),
        ("seed=range(1,4)", "seed", [1, 2, 3]),
        ("seed=range(0,10,4)", "seed", [0, 4, 8]),
        ("top_p=range(0.25,1.0,0.25)", "decoder.top_p", [0.25, 0.5, 0.75]),
        ("seed=choice(3,1)", "seed", [3, 1]),
        ("backend=pytorch,simulated", "backend", ["pytorch", "simulated"]),
        ("energy.name=none,auto", "energy", ["none", "auto"]),
        ("dataset=sample,p.txt,owner/name", "dataset", ["sample", "p.txt", "owner/name"]),
        ("preset=benchmark,null", "preset", ["benchmark", None]),
        ("decoder=glob(*a*,exclude=[creative,s*])", "decoder", ["factual"]),
        ("batching={batch_size:1},{batch_size:2,strategy:static}", "batching",
         [{"batch_size": 1}, {"batch_size": 2, "strategy": "static"}]),
    ],
)  # fmt: skip
def test_a_text_is_read_as_multirun_reads_it(text, key, values):
    assert axes(text) == {key: values}


@pytest.mark.parametrize(
    ("vary", "says"),
    [
        (["batch_sise=1"], r"batch_sise: unknown key.*batch_size"),
        (["strategy=static"], r"batching\.strategy, parallelism\.strategy"),
        (["batch_size=1", "batching.batch_size=2"], r"batching\.batch_size is varied more than once"),
        (["batching={batch_size:1}", "batching.batch_size=2"], r"part of batching"),
        (["batch_size"], r"KEY=VALUE"),
        (["batch_size="], r"KEY=VALUE"),
        (["seed=interval(0,1)"], r"has no values"),
        (["backend=pytorch,pytorsh"], r"no option 'pytorsh'.*Did you mean 'pytorch'"),
        (["model=a{b"], r"cannot be read"),
        (["seed=range(0,1000)", "batch_size=range(1,1001)"], r"1000000 points; at most 100000"),
        ([], r"No key is varied"),
    ],
)
def test_what_names_no_values_of_a_key_is_refused(vary, says):
    with pytest.raises(ConfigError, match=says):
        axes(*vary)


def test_all_problems_are_reported_at_once_with_exit_code_2(generate):
    done = generate("batch_sise=1", "strategy=static", "seed=1,2")
    assert done.code == 2
    assert "batch_sise" in done.err
    assert "parallelism.strategy" in done.err
    assert not Path("grid").exists()


def test_a_value_that_is_given_twice_is_used_once_with_a_note(generate):
    done = generate("batch_size=1,2,1", "temperature=1,1.0")
    assert done.code == 0
    assert "batching.batch_size: 1 is given more than once" in done.err
    assert "decoder.temperature: 1.0 is given more than once" in done.err
    assert len(names()) == 2


def test_truth_values_are_not_numbers():
    assert axes("model=1,true,'1','true'")["model"] == [1, True, "1", "true"]


# ------------------------------------------------------------------ what the files are
def test_the_product_in_the_order_given_the_last_varies_fastest(generate):
    generate("seed=1,2", "batch_size=4,2")
    points = [tuple(entry["point"].values()) for entry in index()["files"]]
    assert points == [(1, 4), (1, 2), (2, 4), (2, 2)]
    assert [entry["file"] for entry in index()["files"]][:2] == [
        "seed-1--batch_size-4.yaml",
        "seed-1--batch_size-2.yaml",
    ]


def test_a_file_inherits_and_holds_only_what_is_varied(generate):
    generate("batch_size=4", "fp_precision=float16", "backend=simulated")
    text = Path("grid", "batch_size-4--fp_precision-float16--backend-simulated.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=.lem-schema.json\n# Point 1 of 1")
    assert yaml.safe_load(text) == {
        "defaults": ["../base"],
        "batching": {"batch_size": 4},
        "fp_precision": "float16",
        "backend": "simulated",
    }
    assert Path("grid", ".lem-schema.json").is_file()


PLACES = [
    ("base.yaml", "grid"),
    ("base.yml", "a/b/c"),
    ("deep/er/base.yaml", "grid"),
    ("deep/base.yaml", "deep"),
    ('it\'s "my" base, #1.yaml', "to: {grid}/[x]"),
    ("_self_.yaml", "."),
    ("deep/base.v1.yaml", "deep/base.v1/grid"),
]
VARIED = [
    "batch_size=1,3",
    "dataset=sample,'pro mpts.txt'",
    "dataset.sample_size=1,2",
    "temperature=0.5,1e-3",
    "revision='yes','a: ${seed}'",
]


@pytest.mark.parametrize(("where", "output"), PLACES, ids=[where for where, _ in PLACES])
def test_files_compose_to_what_the_overrides_compose_to(lem, tmp_path, monkeypatch, where, output):
    Path(where).parent.mkdir(parents=True, exist_ok=True)
    Path(where).write_text(BASE.replace("sample_size: 2", "sample_size: 2, column: text"))
    Path("pro mpts.txt").write_text("one\ntwo\n")
    varied = [part for text in VARIED for part in ("--vary", text)]
    assert lem("config", "generate-grid", where, *varied, "-o", output).code == 0
    entries = index(output)["files"]
    assert len(entries) == 32
    assert (Path(output) / index(output)["base"]).resolve() == Path(where).resolve()
    for entry in entries[::11]:
        point = entry["point"]
        overrides = [f"{key}={quoted(v) if isinstance(v, str) else v}" for key, v in point.items()]
        file = Path(output, entry["file"])
        assert prepare(file, []).experiment() == prepare(Path(where), overrides).experiment()


def test_a_parent_with_a_like_named_neighbour_is_named_with_its_suffix(generate, tmp_path):
    (tmp_path / "base.yml").write_text("model: tiny\n")
    generate("seed=1", file="base.yml")
    assert prepare(Path("grid/seed-1.yaml"), []).experiment().model == "tiny"


def test_a_link_to_a_folder_elsewhere_finds_its_base(generate, tmp_path):
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    assert generate("seed=7", output="link").code == 0
    assert prepare(Path("link/seed-7.yaml"), []).experiment().seed == 7


def test_no_preset_is_a_value_too(generate, base):
    base.write_text(BASE + "preset: throughput\n")
    assert generate("preset=throughput,null").code == 0
    sizes = [prepare(Path("grid", file), []).experiment().batching.batch_size for file in sorted(names())]
    assert sizes == [1, 8]  # preset-null, preset-throughput


def test_a_users_own_options_are_found_beside_the_base(generate, tmp_path):
    (tmp_path / "conf" / "preset").mkdir(parents=True)
    (tmp_path / "conf" / "preset" / "mine.yaml").write_text("# Mine\nseed: 99\n")
    done = generate("preset=mine,null")
    assert done.code == 0
    assert prepare(Path("grid/preset-mine.yaml"), []).experiment().seed == 99


# ------------------------------------------------------------------ names
def test_leaf_names_that_are_shared_are_written_in_full():
    assert list(
        grid.stems(grid.read_axes(["batching.strategy=static", "parallelism.strategy=none"], Options())[0])
    ) == ["batching.strategy-static--parallelism.strategy-none"]


@given(
    st.lists(st.text(max_size=300), min_size=1, max_size=8, unique=True),
    st.lists(st.one_of(st.integers(), st.floats(allow_nan=False), st.text(max_size=8)), min_size=1, max_size=8),
)
@example(["a--b", "a", "A", "", "-", "a/b", "a b"], ["b--c", "b", 1, "1", -1, "minus1"])
@example(["x" * 290 + "1", "x" * 290 + "2", "../../etc/passwd"], [1])
def test_names_are_plain_short_and_never_collide(models, others):
    distinct = list({repr(value): value for value in others}.values())
    found = list(grid.stems([grid.Axis("model", tuple(models)), grid.Axis("revision", tuple(distinct))]))
    assert len({name.casefold() for name in found}) == len(models) * len(distinct)
    for name in found:
        assert re.fullmatch(r"[a-z][A-Za-z0-9_.-]*", name)
        assert shlex.quote(name) == name
        assert len(f"{name}.yaml".encode()) < 200


# ------------------------------------------------------------------ YAML
TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN)
@example(
    [
        "1e5",
        "1e-05",
        "0x1f",
        "yes",
        "null",
        "~",
        "2020-01-01",
        "1_000",
        "12:30",
        "<<",
        "=",
        "${x}",
        "a: b",
        "#",
        "-",
        "\x7f\u2028\x00\ud7ff",
    ]
)
@example([1e-05, 1e22, float("inf"), -0.0, 0.1])
def test_what_is_written_reads_back_the_same(tmp_path_factory, value):
    text = "\n".join(block({"key": value}))
    assert yaml.safe_load(text) == {"key": value}
    assert yaml.safe_load(flow({"key": value})) == {"key": value}
    file = tmp_path_factory.getbasetemp() / "value.yaml"
    file.write_text(text, encoding="utf-8", newline="")
    document = read(file)
    assert document.problems or document.values == {"key": value}
    assert not [problem for problem in document.problems if problem.code not in ("bad_key", "too_large")]


# ------------------------------------------------------------------ invalid points
def test_without_flags_all_are_written_and_the_invalid_are_reported(generate):
    done = generate("batch_size=1,70000")
    assert done.code == 0
    assert names() == {"batch_size-1.yaml", "batch_size-70000.yaml"}
    assert "Invalid points (1 of 2) are written all the same" in done.err
    assert "65536" in done.err
    assert index()["files"][1]["problems"]
    assert index()["skipped"] == []


def test_validate_leaves_the_invalid_out_and_lists_them(generate):
    done = generate("batch_size=1,70000", "min_output_tokens=0,500", flags=("--validate",))
    assert done.code == 0
    assert names() == {"batch_size-1--min_output_tokens-0.yaml"}
    assert "Invalid points (3 of 4) are left out" in done.err
    skipped = index()["skipped"]
    assert [entry["point"]["batching.batch_size"] for entry in skipped] == [1, 70000, 70000]
    assert "max_output_tokens (128)" in skipped[0]["problems"][0]


def test_validate_with_nothing_valid_writes_nothing(generate):
    done = generate("batch_size=0,-1", flags=("--validate",))
    assert done.code == 2
    assert not Path("grid").exists()


def test_strict_writes_nothing_if_any_is_invalid(generate):
    done = generate("batch_size=1,70000", flags=("--strict",))
    assert done.code == 2
    assert "because of invalid points (1 of 2)" in done.err
    assert "batching.batch_size=70000" in done.err
    assert not Path("grid").exists()
    assert generate("batch_size=1,2", flags=("--strict",)).code == 0


def test_an_interpolation_of_the_base_follows_what_is_varied(generate, base):
    base.write_text(BASE + "min_output_tokens: ${max_input_tokens}\n")
    generate("max_input_tokens=64,256", flags=("--validate",))
    assert names() == {"max_input_tokens-64.yaml"}


def test_an_option_without_effect_is_invalid_unless_it_has_one(generate):
    generate("decoder=deterministic,creative", "decoder.temperature=0.5", flags=("--validate",))
    assert names() == {"decoder-creative--temperature-0.5.yaml"}


def test_what_is_wrong_on_this_machine_only_can_be_left_out(generate):
    vary = ("backend=pytorch", "gpus=[4000]")
    assert generate(*vary, flags=("--strict",)).code == 2
    assert generate(*vary, flags=("--strict", "--any-machine")).code == 0


def test_validate_says_the_same_of_the_files(generate, lem):
    generate("backend=pytorch,simulated", "backend.gpus=0", "min_output_tokens=0,500", "device=cpu,auto")
    for entry in index()["files"]:
        assert lem("config", "validate", f"grid/{entry['file']}").code == (2 if "problems" in entry else 0), entry


def test_a_bad_base_is_reported_once(generate, base):
    base.write_text("model: [\n")
    done = generate("seed=1,2")
    assert done.code == 2
    assert "base.yaml:2" in done.err
    assert done.err.count("broken YAML") == 1


# ------------------------------------------------------------------ a folder that is not empty
def test_an_earlier_grid_is_replaced_by_force_alone_and_nothing_else_is_touched(generate):
    generate("seed=1,2,3")
    Path("grid/mine.yaml").write_text("model: tiny\n")
    Path("grid/seed-9.yaml").write_text("model: tiny\n")
    before = {path: path.read_text() for path in Path("grid").iterdir()}
    refused = generate("seed=3,4")
    assert refused.code == 2
    assert "--force" in refused.err
    assert {path: path.read_text() for path in Path("grid").iterdir()} == before
    assert generate("seed=3,4", flags=("--force",)).code == 0
    assert names() == {"seed-3.yaml", "seed-4.yaml", "seed-9.yaml", "mine.yaml"}
    assert [entry["file"] for entry in index()["files"]] == ["seed-3.yaml", "seed-4.yaml"]


def test_a_file_of_the_users_is_not_overwritten_even_by_force(generate):
    generate("seed=1")
    Path("grid/seed-2.yaml").write_text("model: mine\n")
    done = generate("seed=1,2", flags=("--force",))
    assert done.code == 2
    assert "seed-2.yaml would be overwritten" in done.err
    assert Path("grid/seed-2.yaml").read_text() == "model: mine\n"


def test_an_index_that_lists_other_folders_deletes_nothing_there(generate):
    Path("precious.yaml").write_text("model: mine\n")
    Path("grid").mkdir()
    Path("grid/grid.yaml").write_text(
        "lem_grid: 1\nfiles: [{file: ../precious.yaml}, {file: /etc/x.yaml}, {file: a.txt}]\n"
    )
    Path("grid/a.txt").write_text("mine")
    assert generate("seed=1", flags=("--force",)).code == 0
    assert Path("precious.yaml").exists()
    assert Path("grid/a.txt").exists()


@pytest.mark.parametrize(
    "content", ["model: tiny\n", "lem_grid: 1\nfiles: nonsense\n", "lem_grid: [\n", "lem_grid: 1\n"]
)
def test_a_grid_yaml_that_is_no_index_stays(generate, content):
    Path("grid").mkdir()
    Path("grid/grid.yaml").write_text(content)
    assert generate("seed=1", flags=("--force",)).code == 2
    assert Path("grid/grid.yaml").read_text() == content


def test_the_base_is_never_one_of_the_files_that_go(generate):
    generate("seed=1,2")
    done = generate("batch_size=1,2", file="grid/seed-1.yaml", flags=("--force",))
    assert done.code == 2
    assert "is itself one of the grid" in done.err
    assert generate("batch_size=1,2", file="grid/seed-1.yaml", output="finer").code == 0
    assert prepare(Path("finer/batch_size-2.yaml"), []).experiment().seed == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(generate, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert generate("seed=1", output="locked/grid").code == 2


def test_an_output_that_is_a_file(generate):
    done = generate("seed=1", output="base.yaml")
    assert done.code == 2
    assert Path("base.yaml").read_text() == BASE


# ------------------------------------------------------------------ index, batch, multirun
def test_the_index_says_where_all_came_from(generate):
    done = generate("seed=1,2", flags=("--json",))
    printed = json.loads(done.out)
    assert printed == index()
    assert printed["lem_grid"] == 1
    assert printed["base"] == "../base.yaml"
    assert printed["vary"] == {"seed": [1, 2]}
    assert printed["files"] == [
        {"file": "seed-1.yaml", "point": {"seed": 1}},
        {"file": "seed-2.yaml", "point": {"seed": 2}},
    ]
    assert {"created_at", "lem_version"} <= set(printed)


def test_batch_runs_a_grid_and_passes_over_its_index(generate, lem):
    generate("batch_size=1,2")
    assert [path.name for path in files.find(["grid/*.yaml"])] == ["batch_size-1.yaml", "batch_size-2.yaml"]
    assert files.is_index(Path("grid/grid.yaml"))
    assert not files.is_index(Path("base.yaml"))
    done = lem("batch", "grid/*.yaml", "--yes", "-o", "results")
    assert done.code == 0, done.err
    assert len(list(Path("results").glob("raw/*"))) == 2


def test_the_same_texts_run_as_a_multirun(lem, base):
    done = lem("experiment", "base.yaml", "batching.batch_size=1,2", "--multirun", "--dry-run")
    assert done.code == 0, done.err
    assert "[2/2]" in done.out


PLAIN_APP = """
import hydra, json
from dataclasses import asdict
from lem.config.compose import register_schema, to_experiment
register_schema()

@hydra.main(version_base="1.3", config_path="pkg://lem.conf", config_name="config")
def main(composed):
    print(json.dumps(asdict(to_experiment(composed))))

main()
"""


@pytest.mark.processes
def test_as_a_group_plain_hydra_goes_through_the_files(generate, tmp_path):
    varied = ("backend=pytorch,simulated", "model='a: ${seed}',b", "preset=throughput,null")
    assert generate(*varied, output="configs/grid", flags=("--as-group",)).code == 0
    arguments = ["--config-dir", "configs", "--multirun", "+grid=glob(*,exclude=grid)"]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_APP, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    composed = sorted(done.stdout.splitlines())
    points = [(entry["file"], entry["point"]) for entry in index("configs/grid")["files"]]
    overrides = [
        [f"{k}={quoted(v) if isinstance(v, str) else 'null'}" for k, v in point.items()] for _, point in points
    ]
    expected = [prepare(Path("base.yaml"), texts).experiment() for texts in overrides]
    assert composed == sorted(json.dumps(asdict(experiment)) for experiment in expected)
    # The same files are config files for lem itself, which lem batch accepts as well.
    assert [prepare(Path("configs/grid", file), []).experiment() for file, _ in points] == expected


@pytest.mark.processes
def test_as_a_group_the_tools_own_hydra_app_runs_the_files(generate, tmp_path):
    assert generate("seed=1,2", output="configs/grid", flags=("--as-group",)).code == 0
    arguments = ["--config-dir", "configs", "--multirun", "+grid=glob(*,exclude=grid)"]
    done = subprocess.run(
        [sys.executable, "-m", "lem.cli.hydra_app", *arguments],
        capture_output=True, text=True, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plans = [json.loads(file.read_text()) for file in (tmp_path / "results").glob("raw/*/spec.json")]
    assert sorted(plan["experiment"]["seed"] for plan in plans) == [1, 2]


@pytest.mark.parametrize("swept", ["seed=range(0,1e9)", "seed=shuffle(range(0,1000000000))"])
def test_a_range_that_no_memory_holds_is_refused(lem, swept):
    done = lem("experiment", swept, "--multirun", "--dry-run")
    assert done.code == 2
    assert "expands to more than 100,000 values" in done.err


def test_points_are_composed_without_hydra(generate, monkeypatch):
    import hydra

    def never(*_: object, **__: object) -> None:
        raise AssertionError("composed by Hydra")

    monkeypatch.setattr(hydra, "compose", never)
    assert generate("batch_size=range(1,101)", "seed=range(0,10)").code == 0
    assert len(names()) == 1000
