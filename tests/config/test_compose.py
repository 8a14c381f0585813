"""From files and overrides to an `Experiment`: precedence, inheritance, choices, and refusals."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence

import pytest

from lem.backends import tensorrt_source, vllm_source
from lem.config.check import check
from lem.config.compose import Composition, compose_quickly, prepare
from lem.config.options import builtin
from lem.config.overrides import quoted
from lem.errors import BadInput, ConfigError
from lem.results.codec import from_json, to_json
from lem.spec.engines import BACKENDS, PytorchBackend, SimulatedBackend
from lem.spec.experiment import Experiment
from lem.spec.schema import leaves


@pytest.fixture
def compose(tmp_path):
    """Compose from files given as text; the last one is the user's."""

    def run(*overrides: str, **files: str) -> Experiment:
        for name, text in files.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        last = tmp_path / f"{list(files)[-1]}.yaml" if files else None
        return prepare(last, overrides).experiment()

    return run


# ------------------------------------------------------------------ defaults
def test_without_anything_the_defaults_are_those_of_the_schema(compose):
    composed = compose()
    for leaf in leaves():
        if leaf.path.startswith(("backend.", "dataset.", "decoder.", "energy.")):
            continue  # chosen by options of groups
        value = composed
        for part in leaf.path.split("."):
            value = getattr(value, part)
        assert value == leaf.default, leaf.path


def test_the_default_dataset_is_that_of_the_ai_energy_score(compose):
    assert (compose().dataset.path, compose().dataset.column) == ("AIEnergyScore/text_generation", "text")


def test_every_option_of_every_group_composes_and_carries_its_own_name(compose):
    for group in ("backend", "dataset", "decoder", "energy"):
        for option in builtin(group):
            assert getattr(compose(f"{group}={option}"), group).name == option
    for preset in builtin("preset"):
        compose(f"preset={preset}")


# ------------------------------------------------------------------ precedence
def test_command_line_over_file(compose):
    assert compose("max_output_tokens=7", a="max_output_tokens: 6").max_output_tokens == 7


def test_file_over_preset(compose):
    assert compose("preset=quick-test", a="max_output_tokens: 6").max_output_tokens == 6


def test_preset_over_default(compose):
    assert compose("preset=quick-test").max_output_tokens == 32


def test_a_preset_named_in_the_file_is_below_the_files_values(compose):
    composed = compose(a="preset: quick-test\nwarmup: {prompts: 9}")
    assert (composed.max_output_tokens, composed.warmup.prompts) == (32, 9)


def test_preset_on_the_command_line_replaces_the_one_in_the_file(compose):
    assert compose("preset=throughput", a="preset: quick-test").batching.strategy == "dynamic"


def test_environment_over_default_and_below_everything_else(compose, monkeypatch):
    monkeypatch.setenv("LLM_ENERGY_RESULTS_DIR", "/data/some where, else")
    assert compose().io.results_dir == "/data/some where, else"
    assert compose(a="io: {results_dir: from-file}").io.results_dir == "from-file"
    assert compose("io.results_dir=from-cli", a="io: {results_dir: from-file}").io.results_dir == "from-cli"


def test_a_preset_is_above_the_environment(compose, monkeypatch, tmp_path):
    # No built-in preset sets the directory, so a user's file takes the preset's place in the order.
    monkeypatch.setenv("LLM_ENERGY_RESULTS_DIR", "from-environment")
    assert compose(base="io: {results_dir: from-parent}", a="defaults: [base]").io.results_dir == "from-parent"


# ------------------------------------------------------------------ choosing options
@pytest.mark.parametrize("text", ["backend: simulated", "backend: {name: simulated}"])
def test_a_file_chooses_an_option_by_name(compose, text):
    assert isinstance(compose(a=text).backend, SimulatedBackend)


def test_a_files_values_adjust_the_option_it_chooses(compose):
    decoder = compose(a="decoder: {name: creative, temperature: 0.4}").decoder
    assert (decoder.name, decoder.temperature, decoder.top_p) == ("creative", 0.4, 0.95)


def test_a_files_dataset_may_be_a_hub_id_or_a_path_without_more(compose, tmp_path):
    hub = compose(a="dataset: owner/name").dataset
    assert (hub.path, hub.column, hub.split) == ("owner/name", None, None)
    assert compose(a="dataset: {path: some/file.jsonl, column: q}").dataset.column == "q"


def test_another_option_on_the_command_line_drops_what_belonged_to_the_files(compose):
    text = "backend: {name: pytorch, torch_compile: true}\ndataset: {path: a/b, column: c, sample_size: 5}\n"
    composed = compose("backend=simulated", "dataset=sample", a=text)
    assert isinstance(composed.backend, SimulatedBackend)
    assert (composed.dataset.path, composed.dataset.column, composed.dataset.sample_size) == (
        "builtin:sample",
        "text",
        5,
    )


def test_values_without_an_option_are_for_whichever_is_chosen(compose):
    text = "backend: {decode_s_per_token: 0.5}\nenergy: {idle_s: 9}"
    composed = compose("backend=simulated", "energy=codecarbon", a=text)
    assert (composed.backend.decode_s_per_token, composed.energy.idle_s) == (0.5, 9)


def test_another_local_file_does_not_inherit_the_first_ones_column(compose):
    dataset = compose("dataset=q2.csv", a="dataset: {path: q1.csv, column: q, sample_size: 4}").dataset
    assert (dataset.path, dataset.column, dataset.sample_size) == ("q2.csv", None, 4)


def test_naming_the_same_option_again_keeps_the_files_values(compose):
    composed = compose("backend=pytorch", a="backend: {name: pytorch, torch_compile: true}")
    assert isinstance(composed.backend, PytorchBackend)
    assert composed.backend.torch_compile


def test_choosing_a_meter_keeps_the_country(compose):
    composed = compose("energy=codecarbon", a="energy: {name: auto, country_iso_code: DEU}")
    assert (composed.energy.name, composed.energy.country_iso_code) == ("codecarbon", "DEU")


def test_a_childs_other_file_does_not_keep_its_parents_column(compose):
    files = {"parent": "dataset: {path: q1.csv, column: q, sample_size: 4}"}
    dataset = compose(**files, child="defaults: [parent]\ndataset: {path: q2.csv}").dataset
    assert (dataset.path, dataset.name, dataset.column, dataset.sample_size) == ("q2.csv", "q2.csv", None, 4)
    assert compose(**files, child="defaults: [parent]\ndataset: q2.csv").dataset.column is None
    assert compose(**files, child="defaults: [parent]\ndataset: {path: q1.csv}").dataset.column == "q"
    assert compose(**files, child="defaults: [parent]\ndataset: {split: x}").dataset.column == "q"
    assert compose("dataset=q1.csv", **files).dataset.column == "q"


def test_null_takes_back_a_preset(compose):
    parent = "preset: benchmark\nseed: 5"
    assert compose(parent=parent, child="defaults: [parent]").fp_precision == "float16"
    composed = compose(parent=parent, child="defaults: [parent]\npreset: null")
    assert (composed.fp_precision, composed.seed) == ("auto", 5)
    assert compose("preset=null", a=parent).fp_precision == "auto"
    assert compose("preset=throughput", "preset=null", a=parent).batching.strategy == "static"


def test_of_several_choices_on_the_command_line_the_last_holds(compose):
    assert compose("preset=benchmark", "preset=quick-test").max_output_tokens == 32


def test_a_decoder_with_all_its_values_needs_no_option(compose):
    import json
    from dataclasses import asdict

    whole = asdict(compose("decoder=creative").decoder) | {"name": "label", "top_k": 3}
    decoder = compose(a=f"decoder: {json.dumps(whole)}\npreset: benchmark").decoder
    assert (decoder.name, decoder.top_k, decoder.top_p) == ("label", 3, 0.95)


@pytest.mark.parametrize(
    "name", ["it's.txt", "a, b.txt", "a=b.txt", "with space.txt", "null", "1e5", "x.yaml", "sub/q.txt"]
)
def test_a_file_may_have_any_name(compose, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / name).write_text("a prompt\n")
    assert compose(f"dataset={name}").dataset.path == name
    assert compose(f"dataset={quoted(name)}").dataset.path == name


# ------------------------------------------------------------------ sweeps
@pytest.fixture
def cells(tmp_path, monkeypatch):
    """Compose each cell of a sweep over a file's configuration."""
    monkeypatch.chdir(tmp_path)

    def run(text: str, *overrides: str) -> dict[str, Experiment]:
        (tmp_path / "a.yaml").write_text(text)
        found = prepare(tmp_path / "a.yaml", overrides).cells()
        return {" ".join(override.shown for override in cell.given): cell.experiment() for cell in found}

    return run


@pytest.fixture
def run_by_hydra(monkeypatch, tmp_path):
    """Let Hydra's own sweeper expand and run overrides; return the overrides of each of its jobs."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    jobs: list[list[str]] = []

    def task(_: object) -> None:
        jobs.append(list(HydraConfig.get().overrides.task))

    def run(overrides: Sequence[str]) -> list[list[str]]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["app", "--multirun", *overrides])
        hydra.main(version_base="1.3", config_path="pkg://lem.conf", config_name="config")(task)()
        return jobs

    return run


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=1,2", "batching.batch_size=4,8"],
        ["batching.batch_size=choice(8,4)", "model=any", "seed=range(3,0,-1)"],
        ["seed=sort(3,1,2,reverse=true)", "cooldown.wait_s=range(0,0.3,0.1)"],
        ["decoder=glob([c*,f*])", "energy=none", "cycles=1,2"],
        ["model='a, b','it\\'s',c", "gpus=[0,1],[2],null"],
        ["seed=1,2", "cycles=1,2", "seed=7,8"],
        ["seed=1,2", "cycles=3", "+seed=5"],
        ["preset=quick-test,null", "backend=simulated", "chat_template=true,false"],
        ["batching={strategy:static,batch_size:1},{batch_size:2}"],
        ["seed=3", "io.results_dir='out dir'"],
    ],
)
def test_cells_are_those_of_hydras_own_sweeper_in_its_order(run_by_hydra, overrides):
    composition = prepare(None, overrides)
    assert [list(cell.overrides) for cell in composition.cells()] == run_by_hydra(composition.overrides)


def test_a_shuffled_sweep_is_expanded_once():
    composition = prepare(None, ["seed=shuffle(range(0,50))"])
    seeds = [cell.given[0].values[0] for cell in composition.cells()]
    assert sorted(seeds) == list(range(50))
    assert seeds == [cell.given[0].values[0] for cell in composition.cells()]


def test_a_sweep_without_values_is_refused():
    with pytest.raises(ConfigError, match=r"'seed=range\(1,1\)' has no values"):
        prepare(None, ["seed=range(1,1)"])


def test_presets_and_no_preset_among_swept_values(cells):
    found = cells("preset: benchmark", "preset=quick-test,null")
    assert {label: e.max_output_tokens for label, e in found.items()} == {"preset=quick-test": 32, "preset=null": 128}
    assert {e.fp_precision for e in found.values()} == {"auto"}


def test_hub_ids_and_files_among_swept_datasets(cells, tmp_path):
    (tmp_path / "it's.txt").write_text("x\n")
    assert len(cells("seed: 1", "dataset=sample,it's.txt")) == 2
    found = cells("seed: 1", 'dataset=sample,p.txt,owner/name,"it\'s.txt"')
    assert {label: e.dataset.path for label, e in found.items()} == {
        "dataset=sample": "builtin:sample",
        "dataset=p.txt": "p.txt",
        "dataset=owner/name": "owner/name",
        "dataset=it's.txt": "it's.txt",
    }


def test_a_files_values_for_its_own_option_apply_to_that_cell_only(cells):
    text = "dataset: {name: alpaca, column: output, sample_size: 3}\nenergy: {name: none, idle_s: 9}\npreset: benchmark"
    found = cells(text, "dataset=alpaca,gsm8k", "energy=none,auto")
    assert {label: (e.dataset.column, e.dataset.sample_size, e.energy.idle_s) for label, e in found.items()} == {
        "dataset=alpaca energy=none": ("output", 3, 9),
        "dataset=alpaca energy=auto": ("output", 3, 10),
        "dataset=gsm8k energy=none": ("question", 3, 9),
        "dataset=gsm8k energy=auto": ("question", 3, 10),
    }


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("decoder=glob(*)", {"creative", "deterministic", "factual", "standard"}),
        ("decoder=glob([c*,f*])", {"creative", "factual"}),
        ("decoder=choice(creative,factual)", {"creative", "factual"}),
        ("decoder.name=creative,factual", {"creative", "factual"}),
    ],
)
def test_options_may_be_swept_by_any_list_of_names(cells, override, names):
    assert {e.decoder.name for e in cells("seed: 1", override).values()} == names


FILE_OF_ALL = """\
preset: benchmark
model: ${oc.env:LEM_TEST_MODEL,any}
dataset: {name: alpaca, column: output, sample_size: 3}
backend: {name: simulated, sleep: false}
energy: {name: none}
"""


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=1,2", "batching.batch_size=4,8"],
        ["batching={strategy:static,batch_size:1},{batch_size:2}"],
        ["model='a, b','it\\'s',\"${oc.env:LEM_TEST_MODEL,other}\"", "gpus=[0,1],[2],null"],
        ["preset=quick-test,null", "chat_template=true,false"],
        ["dataset=alpaca,gsm8k,owner/name", "energy=none,auto"],
        ["backend=simulated,pytorch", "decoder=glob([c*,f*])"],
        ["+seed=5", "cooldown.wait_s=range(0,0.3,0.1)", "io.results_dir='out dir'"],
        ["max_output_tokens=1e1,1_000", "hydra.sweep.dir=elsewhere"],
        ["seed=1,-1", "batching.batch_size=0,1"],
        ["model=???,any", "max_input_tokens=null,7"],
    ],
)
def test_cells_composed_quickly_are_those_that_hydra_composes(overrides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(FILE_OF_ALL)
    for file in (None, tmp_path / "a.yaml"):
        for cell in prepare(file, overrides).cells():
            assert outcome_of(cell.quickly) == outcome_of(cell.experiment)


@pytest.mark.parametrize(
    "text",
    [
        FILE_OF_ALL,
        "defaults: [parent]\nseed: 3\n",
        "model: any\nsede: 3\n",
        "seed: -1\nmodel: [3]\n",
        "model: ${nowhere}\n",
        "decoder: nonesuch\n",
    ],
)
def test_a_file_composed_quickly_is_what_hydra_composes(text, tmp_path):
    (tmp_path / "parent.yaml").write_text(FILE_OF_ALL)
    (tmp_path / "a.yaml").write_text(text)
    given = (tmp_path / "a.yaml", ["cycles=2"])
    assert outcome_of(lambda: compose_quickly(*given)[0]) == outcome_of(lambda: prepare(*given).experiment())


def test_most_cells_are_composed_without_hydra(monkeypatch):
    monkeypatch.setattr(Composition, "experiment", None)
    assert [cell.quickly().seed for cell in prepare(None, ["seed=1,2", "model=any"]).cells()] == [1, 2]


def outcome_of(make: Callable[[], Experiment]) -> Experiment | tuple[str, ...]:
    """Return an experiment, or the problems why there is none."""
    try:
        return make()
    except ConfigError as error:
        return tuple(error.problems)


def test_several_values_need_a_multirun(compose):
    for override in ("decoder=creative,factual", "seed=range(1,3)", "decoder=glob(*)"):
        with pytest.raises(ConfigError, match="several values; add --multirun"):
            compose(override)


# ------------------------------------------------------------------ inheritance
def test_a_file_inherits_from_its_parents_in_order(compose):
    composed = compose(
        grandparent="max_output_tokens: 1\nseed: 1\nmodel: g",
        parent="defaults: [grandparent]\nseed: 2\nbatching: {batch_size: 2, strategy: sorted_static}",
        child="defaults: [parent, _self_]\nbatching: {batch_size: 3}",
    )
    assert (composed.model, composed.max_output_tokens, composed.seed) == ("g", 1, 2)
    assert (composed.batching.batch_size, composed.batching.strategy) == (3, "sorted_static")


def test_a_childs_option_replaces_its_parents_with_what_belonged_to_it(compose):
    composed = compose(parent="dataset: {path: a/b, column: c}", child="defaults: [parent]\ndataset: gsm8k")
    assert (composed.dataset.path, composed.dataset.column) == ("openai/gsm8k", "question")


def test_defaults_may_name_options_as_hydra_does(compose):
    composed = compose(a="defaults:\n  - override /decoder: factual\n  - energy: none\n")
    assert (composed.decoder.name, composed.energy.name) == ("factual", "none")


def test_parents_are_found_from_the_files_own_directory(compose, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "base.yaml").write_text("seed: 9")
    (tmp_path / "sub" / "child.yaml").write_text("defaults: [base]")
    monkeypatch.chdir(tmp_path)
    from pathlib import Path

    assert prepare(Path("sub/child.yaml"), []).experiment().seed == 9


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "defaults: [nowhere]"}, "inherits from 'nowhere'"),
        ({"a": "defaults: [a]"}, "inherits from itself"),
        ({"b": "defaults: [a]", "a": "defaults: [b]"}, r"itself \(a.yaml -> b.yaml -> a.yaml\)"),
        ({"a": "defaults: base"}, "must be a list"),
        ({"a": "defaults:\n  - planet: mars"}, "'planet' is not a group"),
    ],
)
def test_broken_inheritance_is_named(compose, files, message):
    with pytest.raises(ConfigError, match=message):
        compose(**files)


# ------------------------------------------------------------------ refusals
KEYS_OF_ENGINES = [
    ("vllm", "swap_space=4", "vLLM no longer has swap_space; preempted requests are recomputed, unless their blocks"),
    ("vllm", "num_scheduler_steps=8", "no longer has num_scheduler_steps; use async_scheduling"),
    ("vllm", "device=cpu", "no longer has device; the installed build of vLLM determines the device"),
    ("vllm", "max_num_seqs=4", "this argument of vLLM is set by batching.batch_size."),
    ("vllm", "max_logprobs=4", "an argument of vLLM; write backend.engine_args={max_logprobs: …}."),
    ("vllm", "engine_args.max_logprobs=4", "write backend.engine_args={max_logprobs: …}."),
    ("vllm", "attn_backend=x", "no such key. Did you mean 'backend.attention_backend'"),
    ("vllm", "batch_size=3", "Did you mean 'batching.batch_size'?"),
    ("tensorrt", "moe_backend=x", "TensorRT-LLM no longer has moe_backend; use moe_config in backend.extra_args."),
    ("tensorrt", "max_batch_size=3", "this argument of TensorRT-LLM is set by batching.batch_size."),
    ("tensorrt", "stream_interval=3", "an argument of TensorRT-LLM; write backend.extra_args={stream_interval: …}."),
]


@pytest.mark.parametrize(("backend", "key", "message"), KEYS_OF_ENGINES)
def test_a_key_that_only_the_engine_knows_is_explained(compose, backend, key, message, monkeypatch):
    monkeypatch.setattr(vllm_source, "arguments", lambda: frozenset(["max_logprobs"]))
    monkeypatch.setattr(tensorrt_source, "arguments", lambda *_: {"stream_interval": None})
    with pytest.raises(ConfigError, match=re.escape(message)):
        compose(f"backend={backend}", f"backend.{key}")
    with pytest.raises(ConfigError, match=re.escape(message)):
        compose(f"backend.{key}", a=f"backend: {backend}")


def test_an_engines_dropped_names_are_explained_without_the_engine_too(compose):
    with pytest.raises(
        ConfigError, match=r"a\.yaml:1: backend\.swap_space: unknown key: vLLM no longer has swap_space"
    ):
        compose(a="backend: {name: vllm, swap_space: 4}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("key", ["swapspace", "devise", "attn_backen", "block_siz", "kv_cach"])
def test_only_keys_of_the_chosen_backend_are_suggested(compose, backend, key):
    own = {leaf.path for leaf in leaves(BACKENDS[backend], "backend.")}
    own |= {path.rpartition(".")[0] for path in own}
    with pytest.raises(ConfigError, match="unknown key") as error:
        compose(f"backend={backend}", f"backend.{key}=4")
    assert set(re.findall(r"'(backend\.[^']+)'", str(error.value))) <= own


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=4", "unknown key. Did you mean 'batching.batch_size'"),
        ("batching.batchsize=4", "'batching.batch_size'"),
        ("+invented=1", "invented: unknown key"),
        ("backend=pytorc", "Did you mean 'pytorch'"),
        ("preset=quicktest", "Did you mean 'quick-test'"),
        ("dataset=alpacca", "Did you mean 'alpaca'"),
        ("dataset=nowhere.jsonl", "There is no file|nowhere"),
        ("batching.batch_size=0", "greater than or equal to 1, not 0"),
        ("batching.batch_size=1.5", "integer"),
        ("batching.batch_size='4'", 'not "4"'),
        ("batching.batch_size=true", "not true"),
        ("batching.batch_size=1,2", "several values; add --multirun"),
        ("batching.batch_size=[1", "cannot be read"),
        ("model=3", "string"),
        ("decoder.temperature=nan", "finite"),
        ("seed=-1", "greater than or equal to 0"),
        ("energy.country_iso_code=Germany", "pattern"),
        ("batching=4", "batching"),
        ("nonsense", "neither an option, a config file"),
        ("decoder@x=creative", "names a package"),
        ("~backend", "removes a value, but every value is required"),
        ("~seed", "removes a value"),
        ("decoder={name: creative}", "must be the name.*decoder.do_sample="),
        ("decoder=3", "must be the name"),
        ("backend=null", "must be the name"),
        ("preset=[benchmark]", "must be the name"),
        ("decoder=glob(x*)", "matches no option"),
        ("decoder=range(1,3)", "must be the name"),
        ("seed=interval(0,1)", "list them"),
        ("batching=null", "set one of its values"),
        ("model=???", "must be set"),
        ("model=${nowhere}", "cannot be resolved"),
        ("model=${model}", "refers to itself"),
        ("backend.decode_s_per_token=1", "the chosen options have no such key"),
        ("seed=" + "[" * 3000, "cannot be read|too deep"),
        ("=3", "has no key"),
        ("hydra=3", "unknown key"),
    ],
)
def test_a_bad_override_is_one_sentence_with_the_remedy(compose, override, message):
    if override.startswith("dataset=nowhere"):
        assert compose(override).dataset.path == "nowhere.jsonl"  # whether it exists is checked when it is read
        return
    with pytest.raises(BadInput, match=message):
        compose(override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batching: [1]", "batching: must be a mapping of values, not a list"),
        ("batching: null", "a.yaml:1: batching: must be a mapping of values, not null"),
        ("batching: 4", "batching"),
        ("batching.batch_size: 4", r"write this key nested, as in batching: \{batch_size: …\}"),
        ("a: &x {batch_size: 3}\nbatching: *x", "a: unknown key"),
    ],
)
def test_a_value_of_the_wrong_shape_is_named(compose, text, message):
    with pytest.raises(ConfigError, match=message):
        compose(a=text)


def test_all_problems_of_a_file_are_reported_at_once(compose):
    with pytest.raises(ConfigError) as caught:
        compose(a="modl: x\nbatching: {batch_size: four, stratgy: static}\nfp_precision: fp16\n")
    text = str(caught.value)
    for path in ("modl", "batching.batch_size", "batching.stratgy", "fp_precision"):
        assert path in text
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"batching: {batch_size: 4\nx: 1\n", r"a.yaml:3:1|a.yaml:2:\d+: broken YAML"),
        (b"- a\n- b\n", "a mapping of keys to values, not a list"),
        (b"just words\n", "a mapping of keys to values, not a string"),
        (b"\xff\xfe\x00bad", "UTF-16"),
        (b"seed: 1\nseed: 2\n", "a.yaml:2: seed: duplicate key; it was first given on line 1"),
        (b"1: x\n", "is not a string"),
        (b"model: !!python/object/apply:os.system ['touch ran']\n", "a.yaml:1: model: the tag"),
        (b"model: ${nowhere.at.all}\n", "nowhere"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, content, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        prepare(file, []).experiment()
    assert not (tmp_path / "ran").exists()


def test_a_target_in_a_config_runs_nothing_and_is_an_unknown_key(compose, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="unknown key"):
        compose(a="model: {_target_: os.system, command: touch ran}\nbatching: {_target_: os.system}\n")
    assert not (tmp_path / "ran").exists()


def test_quoting_survives_hydras_grammar(compose):
    for text in ("it's", "a\\b", "a,b", "a\\\\", "a\\'b", "x=y", "[1]", " lead", "ünï"):
        assert compose(f"model={quoted(text)}").model == text


def test_a_token_cannot_get_into_a_configuration(compose, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_SomethingSecret123")
    for override in ("model=${oc.env:HF_TOKEN}", "model=hf_SomethingSecret123"):
        with pytest.raises(ConfigError, match="contains your HF_TOKEN") as caught:
            compose(override)
        assert "Secret" not in str(caught.value)


def test_a_configuration_survives_json(compose):
    composed = compose("preset=benchmark", "decoder=creative", "backend=simulated")
    assert from_json(Experiment, to_json(composed)) == composed


def test_a_library_user_gets_the_same_checks():
    with pytest.raises(ConfigError, match="batch_size"):
        check({"batching": {"batch_size": 0}})


@pytest.mark.parametrize("key", ["model", "seed", "fp_precision"])
def test_a_value_that_has_to_be_given_is_asked_for_even_if_there_is_a_default(compose, key):
    with pytest.raises(BadInput, match=rf"a.yaml:1: {key}: \?\?\? marks a value that must be set"):
        compose(a=f"{key}: ???")


def test_a_value_that_has_to_be_given_can_be_given_on_the_command_line(compose):
    assert compose("seed=3", a="seed: ???").seed == 3
