"""`lem results compare`: its intervals, its objections, its limits, and what it reads."""

from __future__ import annotations

import json
import math
from datetime import datetime

import numpy as np
import pytest
from msgspec import structs
from scipy import stats

from lem.errors import ResultsError
from lem.record import DeviceState, EngineInfo, Environment
from lem.results.aggregate import read
from lem.results.comparison import (
    REASONS,
    Case,
    Measured,
    Side,
    comparable_columns,
    comparisons,
    metric_named,
    objections,
    parse_limit,
    unmatched,
)
from lem.results.store import Store
from lem.warning_codes import WARNINGS
from tests.records import experiment as planned
from tests.records import finished, phases, put, reading, record, requests

METRIC = "energy_per_output_token_j"


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    """Return the row of a completed experiment."""
    return read(finished(Store(tmp_path_factory.mktemp("one")))).row


def case(row, values, key="k", **more):
    """Return a case with an experiment for each value of the energy per token."""
    rows = [structs.replace(row, **{METRIC: value, "warnings": [], **more}) for value in values]
    return Case(key, key, [Measured(each) for each in rows])


def compared(row, before, after, **more):
    sides = [Side("a", [case(row, before)]), Side("b", [case(row, after, **more)])]
    return comparisons(sides)[0]


# ------------------------------------------------------------------ ratios
def test_the_interval_is_welchs(row):
    before, after = [1.0, 1.1, 0.95, 1.02], [1.3, 1.5, 1.35]
    found = compared(row, before, after).ratio(METRIC)
    welch = stats.ttest_ind(np.log(after), np.log(before), equal_var=False).confidence_interval(0.95)
    assert (found.ci_low, found.ci_high) == pytest.approx((math.exp(welch.low), math.exp(welch.high)), rel=1e-12)
    assert found.ratio == pytest.approx(stats.gmean(after) / stats.gmean(before))
    assert (found.baseline_count, found.count, found.basis) == (4, 3, "experiments")


def test_the_interval_covers(row):
    rng, covered = np.random.default_rng(1), 0
    for _ in range(1000):
        before, after = np.exp(rng.normal(0, 0.03, 3)), np.exp(rng.normal(math.log(1.2), 0.06, 4))
        found = compared(row, before.tolist(), after.tolist()).ratio(METRIC)
        covered += found.ci_low <= 1.2 <= found.ci_high
    # Welch's degrees of freedom are approximate; three standard errors of 1,000 campaigns are 2%.
    assert 930 <= covered <= 975


@pytest.mark.parametrize("after", [[1.3], [1.3, None], [1.3, 0.0]])
def test_without_enough_values_there_is_no_interval(row, after):
    found = compared(row, [1.0, 1.1], after).ratio(METRIC)
    assert (found.ci_low, found.ci_high, found.basis) == (None, None, None)
    assert found.reason


def test_a_missing_value_is_never_averaged_over(row):
    found = compared(row, [1.0, 1.1], [1.3, None]).ratio(METRIC)
    assert (found.value, found.ratio) == (None, None)
    assert found.reason == f"1 of the experiments has no positive value for {METRIC}"


def test_two_single_experiments_are_compared_by_their_cycles(tmp_path):
    sides = []
    for name, joules in (("a", (100.0, 104.0)), ("b", (120.0, 126.0))):
        directory = planned(Store(tmp_path / name), cycles=2)
        for cycle, energy_j in enumerate(joules, start=1):
            known = {"cycle": cycle, "config_sha256": directory.plan().config_sha256}
            put(directory, record(energy=(reading(energy_j=energy_j),), **known), requests())
        rows = read(directory)
        sides.append(Side(name, [Case("k", "k", [Measured(rows.row, rows.cycles)])]))
    found = comparisons(sides)[0]
    ratio = found.ratio(METRIC)
    assert (ratio.basis, ratio.baseline_count, ratio.count) == ("cycles", 2, 2)
    assert ratio.ci_low < 123 / 102 < ratio.ci_high
    assert "compare_within_run" in [note.code for note in found.notes]


def test_the_intervals_of_several_cases_hold_jointly(row):
    sides = [
        Side(name, [case(row, values, "k1"), case(row, values, "k2")])
        for name, values in (("a", [1.0, 1.1]), ("b", [1.2, 1.3]))
    ]
    assert [each.ratio(METRIC).confidence for each in comparisons(sides)] == [0.975, 0.975]


def test_only_cases_with_a_counterpart_are_compared(row):
    first = Side("a", [case(row, [1.0], "k1"), case(row, [1.0], "k2")])
    other = Side("b", [case(row, [1.0], "k2"), case(row, [1.0], "k3")])
    assert [each.case for each in comparisons([first, other])] == ["k2"]
    assert list(unmatched([first, other])) == ["Only in a, not in b: k1.", "Only in b, not in a: k3."]
    with pytest.raises(ResultsError, match="no configuration in common"):
        comparisons([first, Side("c", [case(row, [1.0], "k4"), case(row, [1.0], "k5")])])


def test_estimates_are_marked(lem, tmp_path):
    for name, source in (("a", "estimate"), ("b", "counter")):
        finished(Store(tmp_path / name), energy=(reading(source=source),))
        lem("aggregate", "--all", "-o", str(tmp_path / name))
    lines = lem("results", "compare", str(tmp_path / "a"), str(tmp_path / "b")).out.splitlines()
    marks = {line.split()[0]: line.count("≈") for line in lines if " J/" in line or "token/s" in line}
    assert marks == {METRIC: 3, "energy_per_request_j": 3, "output_tokens_per_s": 0}


# ------------------------------------------------------------------ objections
@pytest.mark.parametrize(
    ("reason", "values"),
    [
        ("board", {"device": "another GPU"}),
        ("board", {"hostname": "another machine"}),
        ("engine", {"engine_version": "9.9"}),
        ("engine", {"backend": "vllm"}),
        ("prompts", {"prompts_sha256": "1" * 64}),
        ("lengths", {"output_tokens": 100}),
        ("window", {"arrival_rate_per_s": 2.0}),
        ("window", {"warnings": ["window_cut: the window ends early."]}),
        ("throttled", {"warnings": ["throttled: GPU-0."]}),
        ("shared", {"warnings": ["foreign_process: GPU-0."]}),
        ("meter", {"energy_scope": "package"}),
        ("estimate", {"energy_source": "estimate"}),
    ],
)
def test_each_difference_has_its_own_objection(row, reason, values):
    found = compared(row, [1.0, 1.1], [1.0, 1.1], **values)
    assert f"compare_{reason}" in [each.code for each in found.objections]
    limit = parse_limit(f"{METRIC}>+50%")
    assert limit.judge(found)[0] == "cannot tell"
    allowed = ["meter", "estimate"] if reason == "estimate" else [reason]
    assert limit.judge(found, allowed)[0] == "passed"
    # A meter matters only for metrics that use the energy.
    assert bool(found.against("output_tokens_per_s")) == (reason not in ("meter", "estimate"))


def test_two_boards_of_one_model_are_told_apart(row):
    def on(uuid):
        here = Environment("h", "os", "cpu", 2, 1, ("H100",), {}, devices_before=(DeviceState(uuid),))
        return Case("k", "k", [Measured(structs.replace(row, warnings=[]), (), here)])

    assert list(objections(on("GPU-1"), on("GPU-1"))) == []
    (objection,) = objections(on("GPU-1"), on("GPU-2"))
    assert objection.code == "compare_board"
    assert "GPU-1" in objection.text
    assert "GPU-2" in objection.text


def test_the_same_conditions_have_no_objection(row):
    assert compared(row, [1.0, 1.1], [1.2, 1.3]).objections == []
    throttled = case(row, [1.0, 1.1], warnings=["throttled: GPU-0."])
    assert list(objections(throttled, throttled)) == []


def test_every_reason_has_its_warning():
    assert all(f"compare_{reason}" in WARNINGS for reason in REASONS)


def test_the_configuration_that_differs_is_named(row):
    config = json.loads(row.config_json)
    other = json.dumps(config | {"seed": 7, "io": {"results_dir": "elsewhere"}})
    found = compared(row, [1.0], [1.0], config_json=other, hostname="h2").differences
    assert [(each.where, each.key, each.value) for each in found] == [
        ("config", "seed", "7"),
        ("environment", "hostname", "h2"),
    ]


# ------------------------------------------------------------------ limits
@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        (f"{METRIC}>+3%", "failed"),
        (f"{METRIC}>+30%", "passed"),
        (f"{METRIC}>20%", "cannot tell"),
        (f"{METRIC}<-3%", "passed"),
        (f"{METRIC}<+30%", "failed"),
        (f"{METRIC} < +20 %", "cannot tell"),
    ],
)
def test_a_limit_fails_only_if_the_interval_excludes_it(row, text, outcome):
    found = compared(row, [1.0, 1.01, 0.99], [1.2, 1.21, 1.19])
    assert parse_limit(text).judge(found)[0] == outcome


def test_a_limit_without_an_interval_cannot_be_told(row):
    found = compared(row, [1.0], [9.0])
    outcome, reason = parse_limit(f"{METRIC}>+3%").judge(found)
    assert outcome == "cannot tell"
    assert "at least two experiments" in reason


@pytest.mark.parametrize("text", ["", METRIC, f"{METRIC}>3", f"{METRIC}=3%", "nonsense>3%", f"{METRIC}<-100%"])
def test_a_limit_of_another_form_is_refused(text):
    with pytest.raises(ResultsError, match="--fail-if"):
        parse_limit(text)


def test_a_metrics_name_may_have_its_parts_in_another_order():
    assert metric_named("energy_j_per_output_token", "--metric") == METRIC
    assert metric_named("ttft_s_p95", "--metric") == "ttft_p95_s"
    with pytest.raises(ResultsError, match="Did you mean 'latency_mean_s'"):
        metric_named("latency_mean", "--metric")
    assert not {"mfu", "error_rate", "status", "warnings"} & set(comparable_columns())


# ------------------------------------------------------------------ the command
def results(folder, joules, at=datetime(2026, 1, 2, 3, 4, 5), version="1.0"):
    """Write experiments with these energies into a results directory, with their rows."""
    store, engine = Store(folder), EngineInfo("simulated", version, "none", "none", {})
    for energy_j in joules:
        finished(store, at, energy=(reading(energy_j=energy_j),), engine=engine)


@pytest.fixture
def both(lem, tmp_path):
    results(tmp_path / "before", [100.0, 101.0, 99.0])
    results(tmp_path / "after", [110.0, 111.0, 109.0])
    for name in ("before", "after"):
        assert lem("aggregate", "--all", "-o", str(tmp_path / name)).code == 0
    return str(tmp_path / "before"), str(tmp_path / "after")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ([], 0),
        (["--fail-if", f"{METRIC}>+3%"], 1),
        (["--fail-if", "energy_j_per_output_token>+3%"], 1),
        (["--fail-if", f"{METRIC}>+30%", "--strict"], 0),
        (["--fail-if", f"{METRIC}>+10%"], 0),
        (["--fail-if", f"{METRIC}>+10%", "--strict"], 2),
        (["--strict"], 2),
        (["--allow", "boards"], 2),
        (["--json", "--markdown"], 2),
        (["--metric", "nonsense"], 2),
    ],
)
def test_exit_codes(lem, both, options, code):
    done = lem("results", "compare", *both, *options)
    assert done.code == code, done.err
    assert "Traceback" not in done.err


def test_another_engine_cannot_be_judged_unless_it_is_allowed(lem, tmp_path, both):
    results(tmp_path / "newer", [110.0, 111.0, 109.0], version="2.0")
    lem("aggregate", "--all", "-o", str(tmp_path / "newer"))
    request = ("results", "compare", both[0], str(tmp_path / "newer"), "--fail-if", f"{METRIC}>+3%")
    done = lem(*request)
    assert done.code == 0
    assert "engine: the engine or its version differs" in " ".join(done.out.split())
    assert "cannot tell" in done.out
    assert lem(*request, "--allow", "engine").code == 1


def test_text_json_and_markdown_have_the_same_numbers(lem, both):
    limit = ("--fail-if", f"{METRIC}>+3%")
    found = json.loads(lem("results", "compare", *both, *limit, "--json").out)
    ratio = next(each for each in found["comparisons"][0]["ratios"] if each["metric"] == METRIC)
    assert ratio["ratio"] == pytest.approx(1.1, rel=1e-3)
    assert (ratio["unit"], ratio["is_comparable"], ratio["basis"]) == ("J/token", True, "experiments")
    assert found["limits"][0]["outcome"] == "failed"
    for flags in ((), ("--markdown",)):
        out = lem("results", "compare", *both, *limit, *flags).out
        assert METRIC.replace("_", "\\_" if flags else "_") in out
        assert f"{ratio['ratio']:.4g}" in out


def test_markdown_keeps_names_from_becoming_markup(lem, tmp_path):
    names = [str(tmp_path / name) for name in ("a|b", "<img src=x>")]
    for name in names:
        results(name, [100.0, 101.0])
        lem("aggregate", "--all", "-o", name)
    out = lem("results", "compare", *names, "--markdown").out
    assert "<img" not in out
    assert "a\\|b" in out


def test_experiments_by_their_ids(lem, tmp_path):
    store = Store(tmp_path / "results")
    one = finished(store, energy=(reading(energy_j=100.0),))
    other = finished(store, energy=(reading(energy_j=150.0),), phases=phases(4.0, (reading(energy_j=150.0),)))
    done = lem("results", "compare", one.id, other.id, "-o", str(store.root))
    assert done.code == 0
    assert "1.5 (+50%)" in done.out
    assert "an interval needs at least two experiments" in " ".join(done.out.split())


@pytest.mark.parametrize("names", [["one"], ["one", "nothing"], ["", "x"]])
def test_what_does_not_exist_is_refused(lem, tmp_path, names):
    results(tmp_path / "one", [100.0])
    done = lem("results", "compare", *[str(tmp_path / name) if name == "one" else name for name in names])
    assert done.code == 2
    assert done.err.startswith("Error: ")


def test_an_unfinished_run_is_refused_and_left_out_of_a_directory(lem, tmp_path, both):
    store = Store(both[1])
    directory = planned(store, datetime(2026, 1, 3))
    put(directory, record(requests([0]), status="interrupted"), requests([0]))
    directory.write_state(directory.state().now("interrupted", "stopped by SIGTERM"))
    lem("aggregate", "--all", "--no-strict", "-o", both[1])
    assert "number of incomplete runs left out: 1." in lem("results", "compare", *both).err
    done = lem("results", "compare", directory.id, directory.id, "-o", both[1])
    assert done.code == 2
    assert "only completed experiments can be compared" in done.err
