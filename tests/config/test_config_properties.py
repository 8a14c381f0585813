"""Properties of all configurations: problems are found, the plain composition equals Hydra's, origins are right."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lem.cli import validate
from lem.config import compose, overrides, userfile
from lem.config.check import examine, known_keys, resolved
from lem.config.layers import leaf_paths, nested, origin
from lem.config.problem import impossible
from lem.config.userfile import merged
from lem.errors import BadInput

QUIET = settings(suppress_health_check=list(HealthCheck), database=None)
# The quick suite runs one example in eight; nox -s properties runs all.
ALL = bool(os.environ.get("LEM_ALL_EXAMPLES"))
CANARY = "canary-ran"

# Values to which no rule objects, whatever the other values are.
VALID: dict[str, list[Any]] = {
    "model": ["tiny", "owner/name", "a: b", "ünï", "1e5", "yes"],
    "fp_precision": ["auto", "float32", "bfloat16"],
    "max_input_tokens": [None, 7, 4096],
    "max_output_tokens": [1, 32, 1_000_000],
    "chat_template": [True, False],
    "seed": [0, 42, 2**32 - 1],
    "cycles": [1, 10],
    "batching.batch_size": [1, 65536],
    "dataset.sample_size": [1, None],
    "dataset.column": ["q", None],
    "warmup.prompts": [0, 3],
    "cooldown.wait_s": [0, 0.5, 1e-5],
    "energy.idle_s": [0, 3.5],
    "energy.power_hz": [1e-3, 20],
    "io.results_dir": ["results", "some where"],
}
WRONG: dict[str, list[Any]] = {
    "model": [3, ["a"], {"_target_": f"os.mkdir {CANARY}"}, True, ""],
    "fp_precision": ["fp16", None, 16],
    "max_input_tokens": [0, "7", 1.5],
    "max_output_tokens": [0, -1, None, "32", 1e3, True, [1]],
    "chat_template": ["true", 1, None],
    "seed": [-1, 2**32, "0", 1.5, float("nan"), float("inf")],
    "cycles": [0, 11, 500, None],
    "batching": [None, 4, [1], "static"],
    "batching.batch_size": [0, 65537, "4", None, {"a": 1}],
    "batching.strategy": ["statik", None],
    "dataset.sample_size": [0, -3, "all"],
    "warmup.prompts": [-1, 0.5],
    "cooldown.wait_s": [-1, 86_401, "0"],
    "energy.power_hz": [0, 101, True],
    "energy.country_iso_code": ["Germany", 276],
    "gpus": [[], "0", [1.5], [None]],
    "io": [None, "results"],
    "io.results_dir": ["", 3],
    "backend": [None, 3, [], ["pytorch"], True, "torch", {"name": None}, {"name": "pytorch", "devise": "cpu"}],
    "decoder": [None, [], "creativ", {"name": 4}, {"temperature": 0}],
    "dataset": [None, 7, "alpacca", {"path": 4}],
    "energy": [None, "nvlm", {"name": "rapel"}],
    "preset": [["benchmark"], 3, "quick", {}, True],
    "defaults": ["base", [3], ["nowhere"], [{"planet": "mars"}], [{"override hydra/launcher": "x"}], ["self"]],
    "hydra": [{"run": {"dir": "x"}}, None],
}


def examples(all_of_them: int) -> settings:
    return settings(QUIET, max_examples=all_of_them if ALL else all_of_them // 8)


@st.composite
def valid_values(draw) -> dict[str, Any]:
    chosen = draw(st.fixed_dictionaries({}, optional={path: st.sampled_from(pool) for path, pool in VALID.items()}))
    values: dict[str, Any] = {}
    for path, value in chosen.items():
        values = merged(values, nested(path, value))
    return values


def as_text(values: Any) -> str:
    """Write JSON, which is valid YAML, so that text stays text even if a reader takes 1e5 for a number."""
    text = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())
    return text.replace("NaN", ".nan").replace("Infinity", ".inf")


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


# ------------------------------------------------------------------ mutations: a file's content; whether it is valid
def missing(draw, values):
    gone = draw(st.sets(st.sampled_from(sorted(values)))) if values else set()
    return as_text(without(values, *gone)), True


def extra(draw, values):
    name = draw(st.text("abcdefghijklmnopqrstuvwxyz_.ä ", min_size=1, max_size=12).filter(lambda n: n.strip("_. ")))
    section = draw(st.sampled_from(["", "batching", "backend", "io", "dataset"]))
    path = f"{section}.{name}" if section else name
    if path in known_keys() or name in ("defaults", "hydra"):
        return as_text(values), True
    old = values.get(section, {})
    return as_text(values | ({section: {**old, name: 1}} if section else {name: 1})), False


def wrong_value(draw, values):
    path = draw(st.sampled_from(sorted(WRONG)))
    value = draw(st.sampled_from(WRONG[path]))
    group, _, inner = path.partition(".")
    return as_text(values | {group: {**values.get(group, {}), inner: value} if inner else value}), False


def deep(draw, values):
    depth = draw(st.sampled_from([1, 5, 40, 3000]))
    opening, closing = draw(st.sampled_from([("[", "]"), ("{a: ", "}")]))
    return as_text(without(values, "model")) + f"model: {opening * depth}1{closing * depth}\n", False


def encoding(draw, values):
    text = "# Maße\n" + as_text(values | {"model": "ünï"})
    name, valid = draw(st.sampled_from([("utf-8", True), ("utf-8-sig", True), ("latin-1", False), ("utf-16", False),
                                        ("utf-16-le", False), ("utf-32", False)]))  # fmt: skip
    return text.encode(name), valid


BROKEN = [
    "batching: {batch_size: 4\n",
    "a: b: c\n",
    "\tseed: 1\n",
    "- x\n",
    "seed: [1\n",
    "'seed: 1\n",
    "seed: \x00\n",
    "model: \x07\n",
    "%bad\n",
    "seed: *nowhere\n",
    "? [a, b]\n: 1\n",
    "1: x\n",
    "null: x\n",
    "---\nseed: 1\n---\nseed: 2\n",
    "<<: 3\n",
    "seed: !!int x\n",
]
SIZE = 1_000_000
HUGE = [
    f"model: '{'a' * SIZE}'\n",
    f"model: {'a' * SIZE}\n",
    f"model: |\n  {'a' * SIZE}\n",
    f"{'a' * 900}: 1\n",
    f"? {'a' * SIZE}\n: 1\n",
    f"seed: {'9' * SIZE}\n",
    f"seed: 0x{'f' * 5000}\n",
]


def broken(draw, values):
    return as_text(without(values, "batching", "seed", "model")) + draw(st.sampled_from(BROKEN)), False


def huge(draw, values):
    return as_text(without(values, "model", "seed")) + draw(st.sampled_from(HUGE)), False


def anchors(draw, values):
    text = as_text(without(values, "batching", "warmup", "cooldown", "model", "dataset"))
    bomb = "x: &a0 [1]\n" + "".join(f"x{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    merge_bomb = "x: &a0 {k: 1}\n" + "".join(
        f"x{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
    )
    more, valid = draw(st.sampled_from([
        ("batching: &b {batch_size: 3}\n", True),
        ("warmup: &w {max_prompts: &n 200}\nbatching: {batch_size: *n}\n", True),
        ("batching: &b\n  batch_size: 3\nwarmup:\n  <<: {prompts: 4}\n", True),
        ("batching:\n  <<: [{batch_size: 3}, {batch_size: wrong}]\n", True),
        ("batching:\n  <<: {batch_size: wrong}\n  batch_size: 2\n", True),
        ("batching:\n  <<: {batch_size: wrong}\n", False),
        ("batching: &b {batch_size: 3}\nwarmup: *b\n", False),
        ("model: &m [*m]\n", False),
        ("model: &m {<<: *m}\n", False),
        ("dataset: &m\n  a: *m\n", False),
        (bomb, False),
        (merge_bomb, False),
    ]))  # fmt: skip
    return text + more, valid


def duplicate(draw, values):
    text = as_text(without(values, "seed", "batching"))
    return text + draw(st.sampled_from(["seed: 1\nseed: 1\n", "batching: {batch_size: 1, batch_size: 1}\n"])), False


def code(draw, values):
    bad = draw(st.sampled_from([
        f"model: !!python/object/apply:os.mkdir ['{CANARY}']\n",
        f"model: !!python/object/new:os.mkdir ['{CANARY}']\n",
        f"!!python/object/apply:os.mkdir ['{CANARY}']: 1\n",
        "model: !!python/name:os.system\n",
        "model: !local x\n",
        "model: !!binary aGk=\n",
        "batching: !!set {batch_size}\n",
        f"model: {{_target_: os.mkdir, path: {CANARY}}}\n",
        f"batching: {{_target_: os.mkdir, path: {CANARY}}}\n",
        f"_target_: os.mkdir\npath: {CANARY}\n",
        f"hydra: {{launcher: {{_target_: os.mkdir, path: {CANARY}}}}}\n",
        "defaults: [override hydra/launcher: submitit]\n",
    ]))  # fmt: skip
    return as_text(without(values, "model", "batching", "defaults", "hydra")) + bad, False


def interpolation(draw, values):
    more, valid = draw(st.sampled_from([
        ("max_input_tokens: ${max_output_tokens}\n", True),
        ("model: ${oc.env:NOT_SET_ANYWHERE,tiny}\n", True),
        ("model: \\${literal}\n", True),
        ("model: ${oc.env:NOT_SET_ANYWHERE}\n", False),
        ("model: ${nowhere.at.all}\n", False),
        ("model: ${model}\n", False),
        ("model: ${revision}\nrevision: ${model}\n", False),
        ("model: ${\n", False),
        ("model: ${${}}\n", False),
        ("model: ${unknown_resolver:1}\n", False),
        ("model: ???\n", False),
        ("gpus: ['???']\n", False),
        ("max_input_tokens: ${model}\nmodel: text\n", False),
    ]))  # fmt: skip
    return as_text(without(values, "model", "max_input_tokens")) + more, valid


def options(draw, values):
    more, valid = draw(st.sampled_from([
        ("preset: benchmark\n", True),
        ("preset: null\n", True),
        ("backend: simulated\n", True),
        ("backend: {name: simulated, gpus: 2}\n", True),
        ("backend: {name: simulated, device: cpu}\n", False),
        ("decoder: {name: creative, temperature: 0.4}\n", True),
        ("decoder: {name: standard, temperature: 11}\n", False),
        ("dataset: owner/name\n", True),
        ("dataset: {path: p.csv}\n", True),
        ("defaults: [{decoder: factual}, _self_]\n", True),
        ("defaults: [{decoder: null}]\n", False),
        ("batching.batch_size: 4\n", False),
        ("min_output_tokens: 200\nmax_output_tokens: 100\n", False),
        ("quantization: {quantization: true}\n", False),
    ]))  # fmt: skip
    names = [line.partition(":")[0] for line in more.splitlines()]
    return as_text(without(values, *names)) + more, valid


MUTATIONS = [
    missing,
    extra,
    wrong_value,
    deep,
    encoding,
    broken,
    huge,
    anchors,
    duplicate,
    code,
    interpolation,
    options,
]


@pytest.fixture(scope="module")
def folder():
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        Path("self.yaml").write_text("defaults: [self]")
        yield Path(name)
        os.chdir(before)


@examples(2000)
@given(data=st.data())
def test_no_mutation_of_a_valid_config_is_a_traceback_or_a_wrong_verdict(folder, data):
    values = data.draw(valid_values())
    content, valid = data.draw(st.sampled_from(MUTATIONS))(data.draw, values)
    Path("a.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exit_code = validate.validate([Path("a.yaml")], config_dir=None, force=False, any_machine=True, as_json=True)
    (verdict,) = json.loads(out.getvalue())
    assert (exit_code, verdict["valid"]) == ((0, True) if valid else (2, False)), verdict
    assert all(len(problem["message"]) < 1000 for problem in verdict["problems"])
    assert valid or any(problem["file"] for problem in verdict["problems"]), "a problem of a file has a location"
    assert not Path(CANARY).exists()


@examples(60)
@given(data=st.data())
def test_what_is_not_valid_cannot_be_run_and_what_is_valid_can_be_composed(folder, data):
    values = data.draw(valid_values())
    content, _ = data.draw(st.sampled_from(MUTATIONS))(data.draw, values)
    Path("a.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    inputs = compose.read_inputs(Path("a.yaml"), ())
    problems = impossible(inputs.all_problems())
    if not problems:
        compose.prepare(Path("a.yaml"), ()).experiment()
        return
    with pytest.raises(BadInput) as caught:
        compose.prepare(Path("a.yaml"), ()).experiment()
    assert set(map(str, problems)) == set(str(caught.value).splitlines())
    assert not Path(CANARY).exists()


# ------------------------------------------------------------------ layers
CHOICES = {
    "backend": ["pytorch", "simulated", "mine"],
    "dataset": ["sample", "gsm8k", "custom", "mine", "owner/name", "p.txt", "it's.txt"],
    "decoder": ["creative", "deterministic", "mine"],
    "energy": ["none", "auto", "codecarbon"],
    "preset": ["benchmark", "quick-test", "throughput", "mine", None],
}
GROUP_VALUES = {
    "backend": {"name": CHOICES["backend"]},
    "decoder": {"name": CHOICES["decoder"], "temperature": [0.4, 2], "top_k": [5]},
    "dataset": {"name": ["gsm8k", "custom"], "path": ["q.csv", "p.txt"], "column": ["q"], "sample_size": [3]},
    "energy": {"name": ["none"], "idle_s": [1.5], "country_iso_code": ["DEU"]},
}
PLAIN = {path: pool for path, pool in VALID.items() if not path.startswith(("dataset.", "energy."))}
LINKED = {"max_input_tokens": ["${max_output_tokens}"], "revision": ["v${seed}"]}


def a_mapping(pools: dict[str, list[Any]]):
    return st.fixed_dictionaries({}, optional={key: st.sampled_from(pool) for key, pool in pools.items()})


@st.composite
def a_file(draw) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for path, value in draw(a_mapping({**PLAIN, **LINKED})).items():
        values = merged(values, nested(path, value))
    for group, names in CHOICES.items():
        kind = draw(st.sampled_from(["nothing", "name", "values"]))
        if kind == "name":
            values[group] = draw(st.sampled_from([n for n in names if n is not None or group == "preset"]))
        elif kind == "values" and group != "preset":
            values[group] = draw(a_mapping(GROUP_VALUES[group]))
    return values


@pytest.fixture(scope="module")
def users_options(folder):
    conf = folder / "conf"
    for path, text in {
        "preset/mine.yaml": """\
            decoder: {name: mine, top_p: 0.5}
            energy: {idle_s: 2.5}
            io: {results_dir: from-preset}
            seed: 8
            """.replace(" " * 12, ""),
        "preset/quick-test.yaml": "# In place of the built-in one\ndefaults: [mine]\ncycles: 2\n",
        "decoder/mine.yaml": "# Hot\ndo_sample: true\ntemperature: 2.0\n",
        "dataset/mine.yaml": "# Questions\npath: q.csv\ncolumn: question\n",
        "backend/mine.yaml": "# Simulated, slow\nname: simulated\ndecode_s_per_token: 0.5\n",
    }.items():
        (conf / path).parent.mkdir(parents=True, exist_ok=True)
        (conf / path).write_text(text)
    return conf


@st.composite
def command_lines(draw) -> tuple[dict[str, str | None], dict[str, Any]]:
    return draw(a_mapping(CHOICES)), draw(a_mapping(PLAIN))


def as_overrides(choices: dict[str, str | None], values: dict[str, Any]) -> list[str]:
    named = [f"{group}={'null' if name is None else name}" for group, name in choices.items()]
    return named + [f"{p}={overrides.quoted(v) if isinstance(v, str) else json.dumps(v)}" for p, v in values.items()]


@examples(120)
@given(parent=a_file(), child=a_file(), line=command_lines(), variable=st.sampled_from([None, "", "from env", "${x}"]))
def test_the_plain_composition_is_hydras_and_origins_are_true(folder, users_options, parent, child, line, variable):
    Path("parent.yaml").write_text(as_text(parent))
    Path("child.yaml").write_text(as_text({"defaults": ["parent"], **child}))
    choices, values = line
    with pytest.MonkeyPatch.context() as patch:
        if variable is not None:
            patch.setenv("LLM_ENERGY_RESULTS_DIR", variable)
        composed = compose.prepare(Path("child.yaml"), as_overrides(choices, values)).values()
        assert compose.plain_values(userfile.read(Path("child.yaml")), choices, values) == composed
        sources = compose.read_inputs(Path("child.yaml"), as_overrides(choices, values)).sources
        layers, unresolved = sources.layers(), sources.values()
    for path, value in leaf_paths(unresolved):
        layer = origin(layers, path)
        assert layer is not None
        found: Any = layer.values
        for part in path:
            found = found[part]
        assert found == value, path
        location = layer.locations.get(path)
        if layer.kind == "file" and path[0] not in CHOICES:
            assert location is not None
            assert path[-1] in location.file.read_text().splitlines()[location.line - 1]
    assert resolved(unresolved)[0] == composed


@examples(60)
@given(child=a_file(), line=command_lines())
def test_what_show_prints_is_a_config_that_resolves_to_the_same(folder, users_options, child, line):
    Path("child.yaml").write_text(as_text(child))
    overrides = as_overrides(*line)
    inputs = compose.read_inputs(Path("child.yaml"), overrides)
    experiment, _ = examine(resolved(inputs.sources.values())[0])
    if experiment is None:  # options of the simulated backend with another backend, for example
        return
    with contextlib.redirect_stdout(io.StringIO()) as out:
        validate.show(Path("child.yaml"), overrides, config_dir=None, with_origin=True)
    Path("shown").mkdir(exist_ok=True)
    Path("shown/again.yaml").write_text(out.getvalue())  # its conf/ is not found here
    assert yaml.safe_load(out.getvalue())["seed"] == experiment.seed
    assert compose.prepare(Path("shown/again.yaml"), ()).experiment() == experiment
