"""Helpers for the tests of backends: loading one, running prompts on it, and checks of engines with a queue."""

from __future__ import annotations

import time
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from msgspec import structs

from lem.backends import make_backend
from lem.spec.engines import PytorchBackend
from lem.spec.experiment import Experiment
from lem.workload import builtin
from lem.workload.traffic import Arrivals


@pytest.fixture(scope="session")
def texts():
    return [row["text"] for row in builtin.read("builtin:sample")][:20]


@pytest.fixture
def fresh():
    """Load backends that no other test has used, and close them at the end."""
    begun = []

    def load(wanted):
        backend = make_backend(wanted)
        begun.append(backend)
        backend.start()
        backend.load()
        backend.forget()
        return backend

    yield load
    for backend in begun:
        backend.close()


def on_pytorch(wanted: Experiment) -> Experiment:
    return replace(wanted, backend=PytorchBackend(device="cpu"))


def run(backend, texts):
    return {g.index: g for batch in backend.generate(backend.encode(texts)) for g in batch}


def tokens(generations):
    return {index: g.token_ids for index, g in generations.items()}


def rows(results):
    return sorted(pq.read_table(results / "requests").to_pylist(), key=lambda row: (row["cycle"], row["request"]))


# ------------------------------------------------------------------ checks shared by several engines
def check_same_output(here, there, texts, count):
    """Check that two engines with the same model give the same tokens and finish reasons; return the first's."""
    mine, theirs = run(here, texts[:count]), run(there, texts[:count])
    assert tokens(mine) == tokens(theirs)
    assert {i: g.finish_reason for i, g in mine.items()} == {i: g.finish_reason for i, g in theirs.items()}
    assert here.architecture() == there.architecture()
    assert without_fit(here.model_info()) == without_fit(there.model_info())
    return mine


def without_fit(model):
    """Return the model's description without how its files fit, which only transformers' own loader reports."""
    return structs.replace(model, weights_missing=None, weights_unexpected=None, weights_mismatched=None)


def check_places_are_filled(backend, texts, began_ns):
    """Check that all prompts come out as parts of one batch, and that those beyond the first three wait."""
    before = time.perf_counter_ns()
    # Some requests end early, so that their places are taken while others continue.
    batches = list(backend.generate(backend.encode(texts)))
    after = time.perf_counter_ns()
    done = [g for batch in batches for g in batch]
    assert sorted(g.index for g in done) == list(range(20))
    assert {g.batch for g in done} == {0}
    assert len(batches) > 1
    assert {g.arrived_ns for g in done} == {None}
    assert all(before <= g.start_ns < g.prefill_end_ns <= g.end_ns <= after for g in done)
    waited = [g.start_ns - before for g in sorted(done, key=began_ns)]
    assert min(waited[3:]) > max(waited[:3])
    return done


def check_arrivals_are_taken_in(backend, prompts, times_s):
    """Check that prompts that arrive while others run do not wait for them; the last one arrives after 3 s."""
    opened_ns = time.perf_counter_ns()
    done = [g for some in backend.serve(Arrivals(prompts, times_s, 1, opened_ns), 64) for g in some]
    assert sorted(g.index for g in done) == list(range(len(prompts)))
    assert {g.index: g.arrived_ns for g in done} == {i: opened_ns + round(t * 1e9) for i, t in enumerate(times_s)}
    assert all(g.arrived_ns <= g.start_ns < g.end_ns for g in done)
    first, second, *_, last = sorted(done, key=lambda g: g.index)
    assert second.start_ns < first.end_ns, "the first one is not waited for"
    assert last.start_ns - opened_ns >= 3e9


def check_concurrency(backend, texts):
    """Check that with a concurrency of three, there are never more requests in the system, and sometimes as many."""
    prompts = backend.encode(texts)
    done = [g for some in backend.serve(Arrivals(prompts, None, 3, time.perf_counter_ns()), 64) for g in some]
    assert sorted(g.index for g in done) == list(range(len(texts)))
    assert max(sum(g.arrived_ns <= at.arrived_ns < g.end_ns for g in done) for at in done) == 3


def check_cancelled(backend, texts):
    """Check that output that is no longer awaited does not come out of the next call."""
    generations = backend.generate(backend.encode(texts))
    first = next(generations)
    generations.close()
    assert sorted(run(backend, texts[:5])) == [0, 1, 2, 3, 4]
    assert len(first) < 20


def check_seeds_differ(parameters_of, below):
    """Check that each prompt of each experiment has its own seed; `parameters_of` takes a seed and an index."""
    seeds = [parameters_of(seed, index)["seed"] for seed in (0, 1, 2**32 - 1) for index in (0, 1, 2, 999_999)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < below for seed in seeds)
