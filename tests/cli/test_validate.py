"""`lem config validate` and `lem config show`: which problems are found, on which lines, and which source wins."""

from __future__ import annotations

import json
import os
import time

import pytest
import yaml

from lem.config.compose import prepare
from lem.spec.rules import RULES

SOUND = "model: tiny\ndataset: sample\nenergy: none\n"


@pytest.fixture
def write(tmp_path):
    """Write files given as path and text; conf/… are the user's own options."""

    def run(**files: str | bytes) -> None:
        for name, content in files.items():
            path = tmp_path / (name.replace("__", "/") + ".yaml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return run


@pytest.fixture
def problems_of(lem):
    """Validate files and return (file, line, path, code) of each problem, with the exit code."""

    def run(*arguments: str) -> tuple[int, list[tuple]]:
        done = lem("config", "validate", *arguments, "--json")
        found = [problem for verdict in json.loads(done.out) for problem in verdict["problems"]]
        return done.code, [(p["file"], p["line"], p["path"], p["code"]) for p in found]

    return run


# ------------------------------------------------------------------ validate
def test_a_good_file_is_valid(lem, write):
    write(a=SOUND)
    done = lem("config", "validate", "a.yaml")
    assert (done.code, done.out) == (0, "a.yaml: valid\n")


def test_problems_of_all_kinds_are_reported_together_in_the_order_of_the_lines(lem, write):
    write(
        base="model: tiny\ndataset: sample\nenergy: none\ncooldown:\n  max_s: 3\nwarmup: {prompts: -1}\n",
        a="""\
            defaults: [base, nowhere]
            batching:
              batch_size: 0
              stratgy: static
            fp_precision: fp16
            preset: quick
            hydra: {run: x}
            seed: "1"
            decoder:
              temperature: 0.5
            """.replace(" " * 12, ""),
    )
    done = lem("config", "validate", "a.yaml")
    assert done.code == 2
    lines = done.out.splitlines()
    for line, part in zip(lines, [
        "a.yaml:1: error: defaults.1: the file inherits from 'nowhere', which does not exist.",
        "a.yaml:3: error: batching.batch_size: must be greater than or equal to 1, not 0. [out_of_range]",
        "a.yaml:4: error: batching.stratgy: unknown key. Did you mean 'batching.strategy'",
        "a.yaml:5: error: fp_precision: must be 'auto', 'float32', 'float16' or 'bfloat16', not \"fp16\".",
        "a.yaml:6: error: preset: there is no option 'quick'. Did you mean 'quick-test'?",
        "a.yaml:7: error: hydra: Hydra settings belong on the command line",
        "a.yaml:8: error: seed: must be a valid integer, not \"1\". [wrong_type]",
        "a.yaml:10: error: decoder.temperature: it would have no effect",
        "base.yaml:5: error: cooldown.max_s: it would have no effect",
        "base.yaml:6: error: warmup.prompts: must be greater than or equal to 0, not -1. [out_of_range]",
    ], strict=True):  # fmt: skip
        assert part in line


@pytest.mark.parametrize(
    ("text", "line", "path", "code"),
    [
        ("model: tiny\nbatching: {batch_size: 4\nx: 1\n", 3, None, "yaml_syntax"),
        (b"# Ma\xdfe\nmodel: x\n", 1, None, "not_utf8"),
        ("model: tiny\n".encode("utf-16"), None, None, "not_utf8"),
        ("model: tiny\nrevision: 'a\x00b'\n", 2, None, "yaml_syntax"),
        ("model: tiny\n---\nmodel: b\n", 2, None, "several_documents"),
        ("model: " + "[" * 3000 + "]" * 3000, 1, None, "too_large"),
        (f"seed: 1\nmodel: {'a' * 1_000_000}\n", 2, "model", "too_large"),
        ("seed: 1\nmodel: &a [*a]\n", 2, None, "yaml_syntax"),
        ("seed: 1\n1: x\n", 2, None, "bad_key"),
        ("seed: 1\nseed: 2\n", 2, "seed", "duplicate_key"),
        ("seed: 1\nmodel: !!python/object/apply:os.mkdir [ran]\n", 2, "model", "forbidden_tag"),
        ("- a\n", 1, None, "not_a_mapping"),
        ("seed: 1\ndefaults: [a]\n", 2, "defaults", "inheritance_cycle"),
        ("seed: 1\ndefaults: base\n", 2, "defaults", "bad_defaults"),
        ("seed: 1\ndefaults:\n- base\n- override hydra/launcher: x\n", 4, "defaults.1", "forbidden_key"),
        ("seed: 1\nbackend: null\n", 2, "backend", "wrong_type"),
        ("seed: 1\ndecoder: null\n", 2, "decoder", "wrong_type"),
        ("seed: 1\ndataset: null\n", 2, "dataset", "wrong_type"),
        ("seed: 1\npreset: [benchmark]\n", 2, "preset", "wrong_type"),
        ("seed: 1\npreset: 3\n", 2, "preset", "wrong_type"),
        ("seed: 1\nenergy:\n  name: 4\n", 3, "energy.name", "wrong_type"),
        ("seed: 1\nmodel: ???\n", 2, "model", "missing_value"),
        ("seed: 1\nmodel: ${oc.env:NOT_SET}\n", 2, "model", "bad_interpolation"),
        ("revision: ${model}\nmodel: ${revision}\n", 2, "model", "bad_interpolation"),
        ("seed: 1\nmodel: ${\n", 2, "model", "bad_interpolation"),
        ("seed: 1\nbatching:\n  _target_: os.system\n", 3, "batching._target_", "unknown_key"),
        ("seed: 1\ngpus:\n- 0\n- 1.5\n", 4, "gpus.1", "wrong_type"),
        ("seed: 1\nbackend: {name: simulated,\n  device: cpu}\n", 3, "backend.device", "unknown_key"),
        ("min_output_tokens: 9\nmax_output_tokens: 3\n", 1, "min_output_tokens", "min_above_max"),
    ],
)  # fmt: skip
def test_each_problem_has_its_code_its_path_and_its_line(problems_of, write, tmp_path, text, line, path, code):
    write(a=text)
    exit_code, found = problems_of("a.yaml")
    assert exit_code == 2
    assert ("a.yaml", line, path, code) in found
    assert not (tmp_path / "ran").exists()


def test_broken_yaml_has_a_column_as_well(lem, write):
    write(a="model: tiny\nbatching: {batch_size: 4\n")
    assert lem("config", "validate", "a.yaml").out.startswith("a.yaml:3:1: error: broken YAML")


@pytest.mark.parametrize(
    "text",
    [
        "x0: &a0 [1]\n" + "".join(f"x{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)),
        "x0: &a0 {k: 1}\n" + "".join(f"x{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30)),
        "[" * 1_000_000,
        "{a: " * 1_000_000,
        "defaults: [" + ", ".join(["b"] * 40) + "]\n",
    ],
    ids=["aliases", "merges", "brackets", "braces", "parents"],
)
def test_what_grows_without_end_is_refused_soon(problems_of, write, text):
    write(a=text, b=f"defaults: [{', '.join(['c'] * 40)}]", c=f"defaults: [{', '.join(['d'] * 40)}]", d="seed: 1")
    began = time.process_time()
    exit_code, found = problems_of("a.yaml")
    assert exit_code == 2
    assert any(code == "too_large" for *_, code in found)
    assert time.process_time() - began < 5


def test_files_that_cannot_be_opened(problems_of, write, tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    write(a="defaults: ['x\\0y', ../folder]\n")
    found = problems_of("nowhere.yaml", "folder.yaml", "loop.yaml", "a.yaml")[1]
    assert [code for *_, code in found if code != "no_model"] == [
        "missing_file", "unreadable_file", "unreadable_file", "missing_parent", "missing_parent",
    ]  # fmt: skip


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(problems_of, write, tmp_path):
    write(a=SOUND)
    (tmp_path / "a.yaml").chmod(0)
    assert problems_of("a.yaml")[1] == [("a.yaml", None, None, "unreadable_file")]


def test_an_empty_file_and_one_without_a_model_are_valid_bases_with_a_warning(lem, write):
    write(a="", b="# all of it is comment\n", c="seed: 1\ndataset: sample\nenergy: none\n")
    done = lem("config", "validate", "a.yaml", "b.yaml", "c.yaml", "--any-machine")
    assert done.code == 0
    assert done.out.count("[empty_file]") == 2
    assert done.out.count("warning: model: no model is set") == 3
    assert done.out.endswith("3 files: 3 valid, 0 invalid.\n")


def test_utf8_with_a_byte_order_mark_is_utf8(problems_of, write):
    write(a=SOUND.encode("utf-8-sig"))
    assert problems_of("a.yaml") == (0, [])


def test_numbers_are_those_of_yaml_1_2(write, lem):
    write(a="warmup: {until_cv: 1e-2}\ncooldown: {wait_s: 2E0}\nmodel: 2024-01-01\nrevision: 12e\n")
    shown = json.loads(lem("config", "show", "a.yaml", "--json").out)
    assert (shown["warmup"]["until_cv"], shown["cooldown"]["wait_s"]) == (0.01, 2)
    assert (shown["model"], shown["revision"]) == ("2024-01-01", "12e")


def test_what_is_inadvisable_passes_by_force_and_what_is_impossible_does_not(lem, write):
    write(a=SOUND + "decoder: {temperature: 0.5}\n", b=SOUND + "decoder: {temperature: 50}\n")
    refused = lem("config", "validate", "a.yaml")
    assert (refused.code, "--force" in refused.out) == (2, True)
    forced = lem("config", "validate", "a.yaml", "--force")
    assert (forced.code, "a.yaml:4: warning: decoder.temperature" in forced.out) == (0, True)
    assert lem("config", "validate", "b.yaml", "--force").code == 2


def test_what_only_this_machine_cannot_do_can_be_left_out(problems_of, write, monkeypatch):
    monkeypatch.setattr("lem.machine.gpu.visible", list)
    write(a="model: tiny\ndataset: sample\nbackend: {device: cuda}\n")
    exit_code, found = problems_of("a.yaml")
    assert exit_code == 2
    assert all(RULES[code].scope == "machine" for *_, code in found)
    assert found[0][:3] == ("a.yaml", 3, "backend.device")
    assert problems_of("a.yaml", "--any-machine") == (0, [])


def test_a_rule_about_a_wrong_value_is_not_reported(problems_of, write):
    write(a=SOUND + 'min_output_tokens: 200\nmax_output_tokens: "300"\n')
    assert [code for *_, code in problems_of("a.yaml")[1]] == ["wrong_type"]


def test_a_rule_on_a_presets_value_points_to_where_the_preset_is_chosen(problems_of, write):
    write(a="model: tiny\ndataset: sample\nenergy: none\npreset: throughput\nbatching: {strategy: static}\n")
    assert ("a.yaml", 4, "batching.max_tokens_per_batch", "no_effect_token_budget") in [
        (file, 4 if line in (4, 5) else line, path, code) for file, line, path, code in problems_of("a.yaml")[1]
    ]


def test_json_is_a_list_of_verdicts(lem, write):
    write(a="seed: -1\n")
    (verdict,) = json.loads(lem("config", "validate", "a.yaml", "--json").out)
    assert (verdict["file"], verdict["valid"]) == ("a.yaml", False)
    problem = next(problem for problem in verdict["problems"] if problem["path"] == "seed")
    assert problem == {
        "code": "out_of_range",
        "severity": "impossible",
        "path": "seed",
        "message": "must be greater than or equal to 0, not -1.",
        "file": "a.yaml",
        "line": 1,
        "column": 1,
    }


def test_experiment_reports_the_same_lines(lem, write):
    write(base="seed: -1\n", a="defaults: [base]\nmodel: tiny\nbatching:\n  batchsize: 3\npreset: quick\n")
    done = lem("experiment", "a.yaml", "fp_precision=fp16", "-y")
    assert done.code == 2
    for part in (
        "base.yaml:1: seed: ",
        "a.yaml:4: batching.batchsize: ",
        "a.yaml:5: preset: ",
        "Error: fp_precision: ",
    ):
        assert part in done.err


def test_a_value_of_the_command_line_has_no_line_of_the_file(lem, write):
    write(a="model: tiny\nseed: 3\n")
    done = lem("experiment", "a.yaml", "seed=-1", "-y")
    assert "Error: seed (--seed): must be" in done.err


def test_every_code_of_a_problem_is_in_the_catalogue():
    import re
    from pathlib import Path

    import lem

    rooms = [Path(lem.__path__[0]) / room for room in ("cli", "config")]
    texts = [path.read_text() for room in rooms for path in room.glob("*.py")]
    calls = r'(?:Problem|_report|_fatal|Problems\.one)\(\s*"(\w+)"'
    made = {code for text in texts for code in re.findall(calls, text)}
    assert made >= {"yaml_syntax", "unknown_key", "missing_parent", "no_model"}
    assert made <= set(RULES)


# ------------------------------------------------------------------ show
@pytest.fixture
def origins(lem):
    """Show a configuration with origins; return the value and origin of a path as printed."""

    def run(path: str, *arguments: str) -> tuple:
        done = lem("config", "show", *arguments, "--origin", "--json")
        assert done.code == 0, done.err
        found = json.loads(done.out)[path]
        place = f"{found['origin']['file']}:{found['origin']['line']}" if found["origin"]["file"] else None
        return found["value"], found["origin"]["kind"], found["origin"]["name"], place

    return run


PRESET = {"conf__preset__mine": "# Mine\nio: {results_dir: from-preset}\ndecoder: factual\nenergy: {idle_s: 7.0}\n"}


def test_default_environment_preset_file_and_command_line_in_that_order(origins, write, monkeypatch):
    path = "io.results_dir"
    write(**PRESET, a="seed: 1\n", both="preset: mine\nio: {results_dir: x}\n")
    write(base="io: {results_dir: from-parent}\n", child="defaults: [base]\n")
    write(own="defaults: [base]\nio:\n  results_dir: from-child\n")
    assert origins(path, "a.yaml") == ("results", "default", None, None)
    monkeypatch.setenv("LLM_ENERGY_RESULTS_DIR", "")
    assert origins(path, "a.yaml") == ("results", "default", None, None)
    monkeypatch.setenv("LLM_ENERGY_RESULTS_DIR", "from-environment")
    assert origins(path, "a.yaml") == ("from-environment", "environment", "LLM_ENERGY_RESULTS_DIR", None)
    preset = ("from-preset", "preset", "mine", "conf/preset/mine.yaml:2")
    assert origins(path, "a.yaml", "preset=mine") == preset
    assert origins(path, "a.yaml", "--preset", "mine") == preset
    assert origins(path, "both.yaml") == ("x", "file", "both.yaml", "both.yaml:2")
    assert origins(path, "both.yaml", "preset=throughput") == ("x", "file", "both.yaml", "both.yaml:2")
    assert origins(path, "child.yaml", "preset=mine") == ("from-parent", "file", "base.yaml", "base.yaml:1")
    assert origins(path, "own.yaml") == ("from-child", "file", "own.yaml", "own.yaml:3")
    text = "io.results_dir='from-flag'"
    assert origins(path, "own.yaml", "--results-dir", "from-flag") == ("from-flag", "command line", text, None)
    assert origins(path, "own.yaml", "io.results_dir=x")[:2] == ("x", "command line")


def test_options_lie_below_presets_and_files(origins, write):
    write(**PRESET, a="decoder: {name: creative, top_p: 0.5}\n", b="preset: mine\nenergy: {idle_s: 1.5}\n")
    assert origins("decoder.do_sample", "a.yaml")[:3] == (True, "option", "decoder=creative")
    assert origins("decoder.top_p", "a.yaml") == (0.5, "file", "a.yaml", "a.yaml:1")
    assert origins("decoder.top_k", "a.yaml")[:2] == (0, "default")
    assert origins("decoder.name", "b.yaml")[:3] == ("factual", "option", "decoder=factual")
    assert origins("decoder.name", "a.yaml", "preset=mine")[:3] == ("creative", "option", "decoder=creative")
    assert origins("energy.idle_s", "preset=mine")[:3] == (7.0, "preset", "mine")
    assert origins("energy.idle_s", "b.yaml") == (1.5, "file", "b.yaml", "b.yaml:2")
    assert origins("backend.device", "backend=pytorch")[:2] == ("auto", "default")
    assert origins("backend.name", "backend=simulated")[:3] == ("simulated", "option", "backend=simulated")


def test_a_source_comes_from_where_it_is_named(origins, write):
    write(**PRESET, a="dataset: p.csv\n", b="preset: p\n", conf__preset__p="dataset: {path: q.csv}\n")
    assert origins("dataset.path", "a.yaml") == ("p.csv", "file", "a.yaml", "a.yaml:1")
    assert origins("dataset.path", "b.yaml") == ("q.csv", "preset", "p", "conf/preset/p.yaml:1")
    for file in ("a.yaml", "b.yaml"):
        assert origins("dataset.path", file, "-d", "own/er") == ("own/er", "command line", "dataset=own/er", None)


def test_a_preset_may_hold_a_whole_decoder(origins, write):
    import json
    from dataclasses import asdict

    from lem.spec.experiment import Decoder

    write(conf__preset__p=f"decoder: {json.dumps(asdict(Decoder(name='label', do_sample=True, top_k=3)))}\n")
    assert origins("decoder.name", "preset=p")[:3] == ("label", "preset", "p")
    assert origins("decoder.top_k", "preset=p")[:3] == (3, "preset", "p")


def test_a_presets_values_go_with_the_option_that_it_chose(origins, write):
    write(conf__preset__p="decoder: {name: creative, temperature: 0.4}\nenergy: {idle_s: 9.0}\n", a="preset: p\n")
    assert origins("decoder.temperature", "a.yaml") == (0.4, "preset", "p", "conf/preset/p.yaml:1")
    assert origins("decoder.temperature", "a.yaml", "decoder=standard")[:3] == (0.7, "option", "decoder=standard")
    assert origins("energy.idle_s", "a.yaml", "energy=none")[:3] == (9.0, "preset", "p")


def test_origins_are_comments_of_a_config_that_fits_a_terminal(lem, write):
    write(a="model: tiny\nbatching: {batch_size: 4}\n")
    done = lem("config", "show", "a.yaml", "--origin", "seed=3")
    lines = {line.split("#")[0].strip(): line.split("# ")[-1] for line in done.out.splitlines() if "#" in line}
    assert lines["batch_size: 4"] == "a.yaml:2"
    assert lines["seed: 3"] == "command line"
    assert lines["name: pytorch"] == "option backend=pytorch"
    assert lines["cycles: 1"] == "default"
    assert max(map(len, done.out.splitlines())) <= 100
    assert len({line.index("#") for line in done.out.splitlines() if "#" in line}) == 1


@pytest.mark.parametrize("text", [
    "model: 'yes'", "model: '1e5'", "model: 'v${seed}'", "model: 'a: b # c'", "model: '~'", "model: \"a\\nb\"",
    "cooldown: {wait_s: 1e-5}", "gpus: [0, GPU-1]", "dataset: owner/name", "dataset: {path: p.csv, column: q}",
    "decoder: {name: creative, temperature: 0.3}", "backend: simulated", "preset: benchmark", "model: \\${seed}",
])  # fmt: skip
def test_what_is_shown_is_a_config_that_resolves_to_the_same(lem, write, tmp_path, text):
    write(a=text + "\n")
    for flags in ((), ("--origin",)):
        write(again=lem("config", "show", "a.yaml", *flags).out)
        shown, again = (prepare(tmp_path / name, []).experiment() for name in ("a.yaml", "again.yaml"))
        assert shown == again


def test_show_without_a_file_and_as_json(lem):
    done = lem("config", "show", "-m", "tiny", "-d", "p.txt", "--backend", "simulated", "--json")
    shown = json.loads(done.out)
    assert (shown["model"], shown["dataset"]["path"], shown["backend"]["name"]) == ("tiny", "p.txt", "simulated")
    assert yaml.safe_load(lem("config", "show").out)["dataset"]["name"] == "ai-energy-score"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("seed=-1",), "seed (--seed): must be greater"),
        (("seed=1,2",), "seed=1,2: several values are given"),
        (("hydra.run.dir=x",), "a Hydra setting has no effect here"),
        (("nowhere.yaml",), "nowhere.yaml: no such config file"),
        (("a.yaml", "b.yaml"), "one config file, not 2"),
        (("--config-dir", "nowhere"), "nowhere: this config directory contains no options"),
    ],
)
def test_show_refuses_what_cannot_be_resolved(lem, arguments, message):
    done = lem("config", "show", *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


# ------------------------------------------------------------------ a user's own options
def test_a_users_options_are_chosen_by_name(lem, write):
    write(
        conf__decoder__hot="# Hot\ndo_sample: true\ntemperature: 2.0\n",
        conf__dataset__mine="# Mine\npath: q.csv\ncolumn: question\n",
        conf__backend__slow="# Slow\nname: simulated\ndecode_s_per_token: 0.5\n",
        conf__preset__mine="# Mine\ndecoder: hot\nbackend: slow\n",
        a="preset: mine\ndataset: mine\n",
    )
    shown = json.loads(lem("config", "show", "a.yaml", "--json").out)
    assert (shown["decoder"]["name"], shown["decoder"]["temperature"]) == ("hot", 2.0)
    assert (shown["dataset"]["name"], shown["dataset"]["column"]) == ("mine", "question")
    assert (shown["backend"]["name"], shown["backend"]["decode_s_per_token"]) == ("simulated", 0.5)


def test_a_users_option_wins_over_a_built_in_one(origins, write):
    write(conf__preset__benchmark="seed: 5\n")
    assert origins("seed", "preset=benchmark") == (5, "preset", "benchmark", "conf/preset/benchmark.yaml:1")
    assert origins("warmup.prompts", "preset=benchmark")[0] == 2


def test_the_directory_may_be_named_or_lie_beside_a_parent(origins, write):
    write(mine__preset__p="seed: 5\n", sub__conf__preset__p="seed: 6\n", sub__base="preset: p\n",
          child="defaults: [sub/base]\n")  # fmt: skip
    assert origins("seed", "preset=p", "--config-dir", "mine")[0] == 5
    assert origins("seed", "child.yaml")[0] == 6
    assert origins("seed", "child.yaml", "--config-dir", "mine")[0] == 5


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("conf__preset__mine", "# x\nsede: 5\n", ("conf/preset/mine.yaml", 2, "sede", "unknown_key")),
        ("conf__preset__mine", "# x\nseed: [\n", ("conf/preset/mine.yaml", 3, None, "yaml_syntax")),
        ("conf__preset__mine", "# x\nhydra: {a: 1}\n", ("conf/preset/mine.yaml", 2, "hydra", "forbidden_key")),
        ("conf__preset__mine", "# x\npreset: benchmark\n", ("conf/preset/mine.yaml", 2, "preset", "wrong_type")),
        ("conf__preset__mine", "decoder: warm\n", ("conf/preset/mine.yaml", 1, "decoder", "unknown_option")),
        ("conf__preset__mine", "seed: !!python/name:os.system\n",
         ("conf/preset/mine.yaml", 1, "seed", "forbidden_tag")),
        ("conf__preset__mine", "seed: ${nowhere}\n", ("conf/preset/mine.yaml", 1, "seed", "bad_interpolation")),
        ("conf__preset__mine", "seed: -1\n", ("conf/preset/mine.yaml", 1, "seed", "out_of_range")),
    ],
)  # fmt: skip
def test_a_problem_of_an_option_is_reported_with_its_line(problems_of, write, name, text, problem):
    write(a=SOUND + "preset: mine\n", **{name: text})
    exit_code, found = problems_of("a.yaml")
    assert (exit_code, found) == (2, [problem])


def test_a_backend_option_must_name_its_engine(problems_of, write):
    write(a=SOUND + "backend: fast\n", conf__backend__fast="torch_compile: true\n")
    assert ("conf/backend/fast.yaml", None, "name", "unknown_option") in problems_of("a.yaml")[1]


def test_a_campaign_file_without_arms_is_a_problem_of_its_arms(lem, tmp_path):
    (tmp_path / "c.yaml").write_text("name: x\narms: []\n")
    done = lem("config", "validate", "c.yaml")
    assert (done.code, "at least two configurations, not 0" in done.out) == (2, True), done
