"""Each backend has the features that it claims and refuses the rest; the support matrix claims no more than that.

tests/backends/confirmations.py has the checks of each feature; `pytest -k vllm` runs them on vLLM (nox -s vllm).
"""

from __future__ import annotations

import ast
from functools import reduce
from importlib.util import find_spec
from operator import getitem
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lem.config.compose import read_inputs, values_of
from lem.machine.host import look
from lem.runner.preflight import objections
from lem.spec.conflicts import conflicts
from lem.spec.engines import BACKENDS
from lem.spec.experiment import Experiment
from lem.spec.rules import EXPERIMENT_RULES
from lem.workload import builtin
from tests.backends.confirmations import (
    ARRIVES,
    CHECKS,
    ELSEWHERE,
    ENGINES,
    ON_A_STAND_IN,
    REPORTS,
    Bench,
    confirmation,
    is_checked,
)
from tests.backends.features import feature as named
from tests.backends.features import features, support
from tests.conftest import SIMULATED, command
from tests.hosts import IDEAL, PROCESSOR

pytestmark = pytest.mark.engines

# The package behind an engine, if it is not one of lem's own dependencies.
PACKAGES = {"vllm": "vllm"}
EVERY = [(backend, feature) for backend in BACKENDS for feature in features()]


def cases(chosen):
    return [
        pytest.param(backend, feature, id=f"{backend}-{feature.name}")
        for backend, feature in EVERY
        if chosen(backend, feature)
    ]


@pytest.fixture(scope="module")
def texts():
    """Short prompts of different lengths."""
    some = [row["text"] for row in builtin.read("builtin:sample")][:80]
    shortest = sorted(some, key=len)[:9]
    return [text for text in some if text in shortest]


@pytest.fixture(scope="module")
def benches(tiny_that_ends, texts, tmp_path_factory, engines):
    return {name: Bench(name, str(tiny_that_ends), texts, tmp_path_factory.mktemp(name), engines) for name in ENGINES}


def bench_of(benches, backend):
    if backend in PACKAGES and find_spec(PACKAGES[backend]) is None:
        pytest.skip(f"{PACKAGES[backend]} is not installed")
    return benches[backend]


# ------------------------------------------------------------------ declarations are true
@pytest.mark.parametrize(("backend", "feature"), cases(lambda b, f: is_checked(f, b) and f.name in CHECKS))
def test_a_feature_that_is_declared_works(benches, backend, feature):
    bench = bench_of(benches, backend)
    here = support(feature, backend, look())
    if here.answer != "yes":
        pytest.skip(f"this machine lacks something: {here.codes}")
    CHECKS[feature.name](bench, bench.asks(feature))


@pytest.mark.parametrize(("backend", "feature"), cases(lambda b, f: b in ENGINES and f.name in REPORTS))
def test_a_backend_reports_what_it_declares_and_nothing_else(benches, backend, feature):
    bench = bench_of(benches, backend)
    assert REPORTS[feature.name](bench, bench.plain) == (support(feature, backend, IDEAL).answer == "yes")


REFUSED = [
    (backend, feature, support(feature, backend, IDEAL))
    for backend, feature in EVERY
    if feature.tells is None and support(feature, backend, IDEAL).answer in ("no", "no effect")
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_refused_for_any_machine_is_refused_here(backend):
    plain, host = Experiment(model="any", backend=BACKENDS[backend]()), look()
    for feature, answer in [(feature, answer) for b, feature, answer in REFUSED if b == backend]:
        found = {each.code: each.severity for each in objections(feature.asked(plain), host)}
        assert set(answer.codes) <= found.keys()
        assert all((found[code] == "warning") == (answer.answer == "no effect") for code in answer.codes)


# Only one feature for each rule, because each costs a second.
@pytest.mark.parametrize(
    ("backend", "feature", "answer"),
    [
        pytest.param(*case, id=f"{b}-{'-'.join(codes)}")
        for (b, codes), case in {(b, a.codes): (b, f, a) for b, f, a in REFUSED}.items()
    ],
)
def test_the_command_refuses_before_anything_runs(lem, backend, feature, answer):
    model = "any" if backend == "simulated" else "tiny"
    asked = ["experiment", "--dry-run", "-m", model, "-d", "sample", "-n", "4", "energy=none", f"backend={backend}"]
    done = lem(*asked, *feature.overrides(backend))
    assert done.code == {"no": 2, "no effect": 0}[answer.answer]
    assert all(f"[{code}]" in done.out + done.err for code in answer.codes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_page_shows_is_what_is_asked_for(backend, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for feature in features():
        asked = read_inputs(None, [f"backend={backend}", *feature.overrides(backend)])
        assert asked.all_problems() == []
        values, _ = values_of(asked.sources)
        for path, value in (feature.asked_of(backend) or {}).items():
            assert reduce(getitem, path.split("."), values) == value


@pytest.mark.processes
@pytest.mark.parametrize("name", ["several processes", "data parallel"])
def test_simulated_processes_share_the_prompts(tmp_path, name):
    done = command("experiment", *SIMULATED, "-n", "7", *named(name).overrides("simulated"), cwd=tmp_path)
    assert done.code == 0, done.err
    rows = pq.read_table(tmp_path / "results" / "requests").to_pylist()
    assert sorted(row["request"] for row in rows) == list(range(7))
    assert {row["rank"] for row in rows} == {0, 1}


# ------------------------------------------------------------------ the page claims no more than was tested
# vLLM's build for the processor has no such method; one share of the memory is that of all other tests; and PyTorch
# compiles flex attention for minutes.
UNTRIED = [
    ("pytorch", "flex attention"),
    ("vllm", "the engine's own quantization"),
    ("vllm", "share of a GPU's memory"),
]


def test_whatever_the_processor_can_do_is_tried_there():
    left = [
        (backend, feature.name)
        for backend, feature in EVERY
        if backend in ENGINES
        and support(feature, backend, PROCESSOR).answer == "yes"
        and confirmation(feature, backend) != "tested"
    ]
    assert left == UNTRIED


@pytest.mark.parametrize("table", [ELSEWHERE, ARRIVES, ON_A_STAND_IN], ids=["elsewhere", "arrives", "stand-in"])
def test_what_another_test_shows_is_shown_by_a_test_that_there_is(table):
    for (backend, name), where in table.items():
        file, _, test = where.partition("::")
        tree = ast.parse((Path(__file__).parent / file).read_text())
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, where
        assert support(named(name), backend, IDEAL).answer == "yes"
        assert not is_checked(named(name), backend), "it is tried here already"
    assert not set(ELSEWHERE) & set(ARRIVES)


def test_every_check_is_of_a_feature():
    names = [feature.name for feature in features()]
    assert len(set(names)) == len(names)
    assert CHECKS.keys() | REPORTS.keys() <= set(names)
    assert all(feature.meaning.endswith(".") for feature in features())


def test_every_backend_has_an_answer_and_every_code_a_rule():
    for backend, feature in EVERY:
        answer = support(feature, backend, IDEAL)
        assert set(answer.codes) <= set(EXPERIMENT_RULES)
        assert (answer.answer in ("no", "no effect")) >= bool(answer.codes)
        assert feature.tells or answer.answer in ("yes", "no option") or answer.codes


def test_a_backends_own_features_are_for_it_alone():
    for feature in features():
        for backend in feature.own:
            assert backend in BACKENDS
        assert not (feature.own and feature.changes)
        if feature.own:
            assert {b for b in BACKENDS if support(feature, b, IDEAL).answer != "no option"} == set(feature.own)


@pytest.mark.parametrize("backend", BACKENDS)
def test_features_ask_for_nothing_that_contradicts_itself(backend):
    plain = Experiment(model="any", backend=BACKENDS[backend]())
    for feature in features():
        if feature.asked_of(backend) and support(feature, backend, IDEAL).answer == "yes":
            assert list(conflicts(feature.asked(plain))) == []
