"""The contract of lem/backends/base.py. A new backend joins by a line in MEMBERS."""

import time
from dataclasses import dataclass, field, replace
from importlib.util import find_spec

import pytest

from lem.backends import make_backend
from lem.errors import RunError
from lem.spec.engines import OpenaiBackend, PytorchBackend, SimulatedBackend, TensorrtBackend, VllmBackend
from lem.spec.experiment import Batching, Decoder, Experiment, Streaming
from lem.workload import builtin
from lem.workload.traffic import Arrivals
from tests import http_server
from tests.backends.confirmations import Engines

pytestmark = pytest.mark.engines

STRATEGIES = ("static", "dynamic", "sorted_static", "sorted_dynamic")
MEMBERS = (
    "simulated",
    "pytorch",
    pytest.param("vllm", marks=pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")),
    "tensorrt",
    "openai",
)
ON_CPU = {
    "pytorch": PytorchBackend(device="cpu"),
    "vllm": VllmBackend(kv_cache_memory_bytes=2**26, enforce_eager=True),
    "tensorrt": TensorrtBackend(),  # on its stand-in
}
SAMPLING = Decoder(name="sampling", do_sample=True)


@dataclass(frozen=True)
class Member:
    """A backend under test: an experiment that uses it, and the tokens that end its outputs."""

    experiment: Experiment
    end_tokens: frozenset[int]
    engines: Engines
    begun: list = field(default_factory=list)

    @property
    def pads(self):
        """Whether the requests of a batch are computed together and share their times."""
        return self.experiment.backend.name not in ("vllm", "tensorrt", "openai")

    @property
    def has_the_queue(self):
        """Whether requests are sent when they arrive, whatever runs, so that when they begin is not known."""
        return self.experiment.backend.name == "openai"

    def most_at_once(self, backend, generations):
        """Return the maximum number of requests that ran at the same time."""
        if self.experiment.backend.name == "tensorrt":
            # The server begins the next request before the client notices the end of the last: only the engine knows.
            return backend._loaded.engine.most_at_once
        return max(sum(g.start_ns <= at.start_ns < g.end_ns for g in generations) for at in generations)

    def skip_where_end_tokens_cannot_be_held_off(self):
        if self.experiment.backend.name == "tensorrt":
            pytest.skip("it can suppress only one end token, but the model has 400")

    def loaded(self, **changes):
        wanted = replace(self.experiment, **changes)
        if wanted.backend.name == "vllm":  # an engine that takes seconds to start
            return self.engines.loaded(wanted)
        backend = make_backend(wanted)
        self.begun.append(backend)
        backend.start()
        backend.load()
        return backend


@pytest.fixture(scope="session")
def server(tiny_that_ends):
    # Like a real server, it takes a while, so that requests sent together are in flight together.
    behaviour = http_server.Behaviour(first_wait_s=0.02)
    with http_server.Running(http_server.ModelTokens(str(tiny_that_ends)), behaviour) as running:
        yield running


@pytest.fixture(params=MEMBERS)
def member(request, tiny_that_ends, engines, tensorrt_standin):
    if request.param == "simulated":
        fast = SimulatedBackend(prefill_s_per_token=0, decode_s_per_token=1e-3)
        made = Member(Experiment(model="any", backend=fast, max_output_tokens=12), frozenset([0]), engines)
    else:
        served = request.param == "openai"
        options = OpenaiBackend(url=request.getfixturevalue("server").url) if served else ON_CPU[request.param]
        experiment = Experiment(
            model=str(tiny_that_ends), backend=options, max_output_tokens=12, fp_precision="float32"
        )
        made = Member(experiment, frozenset(range(2, 402)), engines)
    yield made
    for backend in made.begun:
        backend.close()


@pytest.fixture(scope="session")
def texts():
    return [row["text"] for row in builtin.read("builtin:sample")][:11]


def run(backend, texts):
    return flat(backend.generate(backend.encode(texts)))


def flat(batches):
    return [generation for batch in batches for generation in batch]


def tokens(generations):
    return {g.index: g.token_ids for g in generations}


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_prompt_comes_out_exactly_once(member, texts, strategy, batch_size):
    batching = Batching(strategy=strategy, batch_size=batch_size, max_tokens_per_batch=150)
    generations = run(member.loaded(batching=batching), texts)
    assert sorted(g.index for g in generations) == list(range(len(texts)))


@pytest.mark.parametrize("times_s", [[0.0, 0.0, 0.001, 0.01, 0.3], None], ids=["open loop", "concurrency"])
def test_prompts_that_arrive_come_out_once_with_their_arrival(member, texts, times_s):
    backend = member.loaded(batching=Batching(batch_size=2))
    prompts, opened_ns = backend.encode(texts)[:5], time.perf_counter_ns()
    done = flat(backend.serve(Arrivals(prompts, times_s, 2, opened_ns), 2))
    assert sorted(g.index for g in done) == [p.index for p in prompts]
    assert all(opened_ns <= g.arrived_ns <= g.start_ns <= g.end_ns for g in done)
    if times_s:
        due = {p.index: opened_ns + round(t * 1e9) for p, t in zip(prompts, times_s, strict=True)}
        assert {g.index: g.arrived_ns for g in done} == due
    else:
        assert max(sum(g.arrived_ns <= at.arrived_ns < g.end_ns for g in done) for at in done) <= 2


def test_batches_are_numbered_in_order_and_no_larger_than_asked_for(member, texts):
    numbers = [g.batch for g in run(member.loaded(batching=Batching(batch_size=4)), texts)]
    assert numbers == [0] * 4 + [1] * 4 + [2] * 3


def test_prompts_may_be_a_part_or_repeated_as_in_a_warm_up(member, texts):
    backend = member.loaded(batching=Batching(batch_size=2))
    prompts = backend.encode(texts)
    asked_for = [prompts[7], prompts[2], prompts[7]]
    assert [g.index for g in flat(backend.generate(asked_for))] == [7, 2, 7]


def test_a_batch_comes_as_a_list_of_those_that_finish_together(member, texts):
    backend = member.loaded(batching=Batching(batch_size=4))
    batches = list(backend.generate(backend.encode(texts)))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert [{g.batch for g in batch} for batch in batches] == [{0}, {1}, {2}]


def test_indices_are_those_of_the_prompts_whatever_they_are(member, texts):
    backend = member.loaded(batching=Batching(batch_size=4))
    prompts = [replace(p, index=100 + 2 * p.index) for p in backend.encode(texts)]
    assert [g.index for g in flat(backend.generate(prompts))] == [p.index for p in prompts]


@pytest.mark.parametrize("decoder", [Decoder(), SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_leaving_out_the_first_batches_gives_the_same_tokens_for_the_rest(member, texts, strategy, decoder):
    batching = Batching(
        strategy=strategy, batch_size=3, max_tokens_per_batch=150 if strategy.endswith("dynamic") else None
    )
    backend = member.loaded(decoder=decoder, batching=batching)
    prompts = backend.encode(texts)
    whole = list(backend.generate(prompts))
    finished = {g.index for g in flat(whole[:2])}
    rest = flat(backend.generate([p for p in prompts if p.index not in finished]))
    assert len(finished) > 1
    assert tokens(rest) == tokens(flat(whole[2:]))


@pytest.mark.parametrize("decoder", [Decoder(), SAMPLING], ids=["greedy", "sampling"])
def test_generate_can_be_called_again_with_the_same_result(member, texts, decoder):
    backend = member.loaded(decoder=decoder, batching=Batching(batch_size=4))
    assert tokens(run(backend, texts)) == tokens(run(backend, texts))


def test_same_seed_gives_same_tokens_and_another_seed_gives_others(member, texts):
    first, again, other = (tokens(run(member.loaded(decoder=SAMPLING, seed=seed), texts)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_end_token_is_the_last_or_there_is_none(member, texts):
    generations = run(member.loaded(batching=Batching(batch_size=4)), texts)
    assert {g.finish_reason for g in generations} == {"stop", "length"}
    for g in generations:
        assert not member.end_tokens.intersection(g.token_ids[:-1])
        assert (g.finish_reason == "stop") == (g.token_ids[-1] in member.end_tokens)


def test_only_outputs_without_an_end_token_use_up_the_limit(member, texts):
    lengths = {"stop": set(), "length": set()}
    for g in run(member.loaded(batching=Batching(batch_size=4)), texts):
        lengths[g.finish_reason].add(len(g.token_ids))
    assert lengths["length"] == {12}
    # If padding were counted, every output of a batch would be as long as its longest.
    assert len(lengths["stop"]) > 1
    assert max(lengths["stop"]) <= 12


@pytest.mark.parametrize("limit", [1, 5])
def test_no_output_is_longer_than_max_output_tokens(member, texts, limit):
    generations = run(member.loaded(max_output_tokens=limit), texts)
    assert max(len(g.token_ids) for g in generations) == limit


def test_no_output_is_shorter_than_min_output_tokens(member, texts):
    if member.experiment.backend.name == "tensorrt":
        with pytest.raises(RunError, match="can suppress only one end token, but the model has 400"):
            member.loaded(min_output_tokens=9)
        return
    freely = run(member.loaded(batching=Batching(batch_size=4)), texts)
    held_off = run(member.loaded(batching=Batching(batch_size=4), min_output_tokens=9), texts)
    assert min(len(g.token_ids) for g in freely) < 9
    assert min(len(g.token_ids) for g in held_off) >= 9


def test_encoding_keeps_order_and_numbers_the_prompts(member, texts):
    backend = member.loaded()
    encoded, backwards = backend.encode(texts), backend.encode(texts[::-1])
    assert [p.index for p in encoded] == list(range(len(texts)))
    assert [p.token_ids for p in encoded] == [p.token_ids for p in reversed(backwards)]


def test_inputs_hold_no_padding(member, texts):
    backend = member.loaded()
    encoded = backend.encode(texts)
    assert [p.token_ids for p in encoded] == [backend.encode([text])[0].token_ids for text in texts]
    assert len({len(p.token_ids) for p in encoded}) > 3


def test_long_inputs_are_cut_to_their_beginning_and_marked(member, texts):
    whole = member.loaded().encode(texts)
    limit = sorted(len(p.token_ids) for p in whole)[len(whole) // 2]
    cut = member.loaded(max_input_tokens=limit).encode(texts)
    assert [p.token_ids for p in cut] == [p.token_ids[:limit] for p in whole]
    # A prompt of exactly the limit is not cut.
    assert [p.truncated for p in cut] == [len(p.token_ids) > limit for p in whole]
    assert not any(p.truncated for p in whole)
    assert 0 < sum(p.truncated for p in cut) < len(cut)


def test_times_lie_within_the_call_and_batches_do_not_overlap(member, texts):
    backend = member.loaded(batching=Batching(batch_size=4))
    prompts = backend.encode(texts)
    before = time.perf_counter_ns()
    generations = flat(backend.generate(prompts))
    after = time.perf_counter_ns()
    batches = [[g for g in generations if g.batch == number] for number in range(3)]
    edges = [(min(g.start_ns for g in batch), max(g.end_ns for g in batch)) for batch in batches]
    times = [ns for edge in edges for ns in edge]
    if member.pads:
        assert [{(g.start_ns, g.end_ns) for g in batch} for batch in batches] == [{edge} for edge in edges]
    assert times == sorted(times)
    assert before <= times[0]
    assert times[-1] <= after
    assert all(g.end_ns > g.start_ns for g in generations)


def test_each_batch_is_handed_over_before_the_next_begins(member, texts):
    backend = member.loaded()
    generations = backend.generate(backend.encode(texts[:2]))
    (first,) = next(generations)
    between = time.perf_counter_ns()
    (second,) = next(generations)
    assert first.end_ns <= between <= second.start_ns


def test_an_engine_describes_itself(member, texts):
    backend = member.loaded()
    run(backend, texts[:1])
    engine = backend.engine_info()
    assert engine.backend == member.experiment.backend.name
    assert all([engine.version, engine.device, engine.device_name])
    backend.reset_peak_memory()
    memory = backend.peak_memory()
    assert memory.peak_bytes > 2**20
    assert memory.scope
    backend.forget()
    backend.synchronize()


# ------------------------------------------------------------------ the times of tokens
@pytest.mark.parametrize("least", [0, 6], ids=["", "at least 6"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_each_token_has_a_time_also_where_others_of_its_batch_go_on(member, texts, batch_size, least):
    if least:
        member.skip_where_end_tokens_cannot_be_held_off()
    batching = Batching(batch_size=batch_size)
    backend = member.loaded(batching=batching, streaming=Streaming(enabled=True), min_output_tokens=least)
    generations = run(backend, texts)
    assert len({len(g.token_ids) for g in generations}) > 1
    assert_tokens_are_timed(generations)
    untimed = run(member.loaded(batching=batching, min_output_tokens=least), texts)
    assert tokens(untimed) == tokens(generations)
    assert not any(g.chunks for g in untimed)


def assert_tokens_are_timed(generations):
    for g in generations:
        assert sum(chunk.tokens for chunk in g.chunks) == len(g.token_ids)
        assert_in_order(g.start_ns, g.prefill_end_ns, *(chunk.at_ns for chunk in g.chunks), g.end_ns)


def assert_in_order(*times_ns):
    """Keep only the known times: not every engine reports the end of the prefill, or has a queue."""
    known = [ns for ns in times_ns if ns is not None]
    assert known == sorted(known)


# ------------------------------------------------------------------ continuous batching
@pytest.fixture
def continuous(member):
    """Yield a function that loads the backend with continuous batching for a number of simultaneous requests."""

    def loaded(at_most, **changes):
        return member.loaded(batching=Batching(strategy="continuous", batch_size=at_most), **changes)

    return loaded


def test_continuously_every_prompt_comes_out_once_with_the_tokens_of_a_batch_of_its_own(member, continuous, texts):
    alone = tokens(run(member.loaded(), texts))
    for at_most in (1, 3, 64):
        generations = run(continuous(at_most), texts)
        assert sorted(g.index for g in generations) == list(range(len(texts)))
        assert tokens(generations) == alone


@pytest.mark.parametrize("decoder", [Decoder(), SAMPLING], ids=["greedy", "sampling"])
def test_continuously_leaving_out_some_gives_the_same_tokens_for_the_rest(continuous, texts, decoder):
    backend = continuous(3, decoder=decoder)
    prompts = backend.encode(texts)
    whole = tokens(flat(backend.generate(prompts)))
    rest = tokens(flat(backend.generate(prompts[4:])))
    assert rest == {index: ids for index, ids in whole.items() if index >= 4}


def test_continuously_no_more_run_at_the_same_time_than_asked_for_and_places_are_filled_at_once(
    member, continuous, texts
):
    backend = continuous(3)
    generations = run(backend, texts)
    assert member.most_at_once(backend, generations) == 3
    # Batch by batch, all requests of a batch would begin together with its first.
    assert any(g.start_ns < at.start_ns < g.end_ns for g in generations for at in generations)
    for g in generations:
        assert g.arrived_ns is None, "nothing arrives where all prompts are there from the start"
        assert_in_order(g.start_ns, g.prefill_end_ns, g.end_ns)


def test_continuously_it_knows_what_is_under_way_between_two_batches(continuous, texts):
    backend, began_ns = continuous(3), time.perf_counter_ns()
    prompts = backend.encode(texts)
    left, most = {prompt.index for prompt in prompts}, 0
    for batch in backend.generate(prompts):
        left -= {generation.index for generation in batch}
        under_way = backend.under_way()
        # A server's places are refilled at once, while its responses wait to be handed over.
        assert len(under_way) <= (6 if type(backend).__name__ == "Openai" else 3)
        assert {begun.index for begun in under_way} <= left
        assert all(began_ns <= begun.since_ns <= time.perf_counter_ns() for begun in under_way)
        assert all(begun.output_tokens is None or 0 <= begun.output_tokens <= 12 for begun in under_way)
        most = max(most, len(under_way))
    assert most > 0
    assert list(backend.under_way()) == []


def test_of_batches_that_finish_together_nothing_is_under_way_between_them(member, texts):
    backend = member.loaded(batching=Batching(batch_size=3))
    for batch in backend.generate(backend.encode(texts)):
        assert list(backend.under_way()) == []
        assert {generation.arrived_ns for generation in batch} == {None}


def test_continuously_a_prompt_that_arrives_is_taken_in_while_others_run(continuous, texts):
    backend = continuous(4)
    prompts = backend.encode(texts)[:3]
    # A busy machine may be so slow that the first has finished; a backend that never takes in others always fails.
    for _ in range(20):
        opened_ns = time.perf_counter_ns()
        arrivals = Arrivals(prompts, [0.0, 0.001, 0.002], 1, opened_ns)
        first, *others = sorted(flat(backend.serve(arrivals, 4)), key=lambda g: g.index)
        assert [g.index for g in (first, *others)] == [p.index for p in prompts]
        assert all(g.arrived_ns == opened_ns + g.index * 1_000_000 for g in (first, *others))
        if all(first.start_ns < g.start_ns < first.end_ns for g in others):
            break
        backend.forget()
    else:
        pytest.fail("no prompt was taken in while another one ran")


@pytest.mark.parametrize("times_s", [[0.0, 0.0, 0.001, 0.01, 0.3], None], ids=["open loop", "concurrency"])
def test_continuously_prompts_that_arrive_come_out_once(member, continuous, texts, times_s):
    backend = continuous(2)
    prompts = backend.encode(texts)[:5]
    # An engine that says when it began a request may free a slot before a busy machine hears of the end that freed it.
    for _ in range(20):
        opened_ns = time.perf_counter_ns()
        done = flat(backend.serve(Arrivals(prompts, times_s, 2, opened_ns), 2))
        assert sorted(g.index for g in done) == [p.index for p in prompts]
        assert all(opened_ns <= g.arrived_ns <= g.start_ns <= g.end_ns for g in done)
        most_at_once = max(sum(g.start_ns <= at.start_ns < g.end_ns for g in done) for at in done)
        if most_at_once <= 2 or (times_s is not None and member.has_the_queue):
            break
        backend.forget()
    else:
        pytest.fail(f"{most_at_once} requests ran in two slots")


@pytest.mark.parametrize("least", [0, 6], ids=["", "at least 6"])
def test_continuously_each_token_has_a_time_of_its_own(continuous, member, texts, least):
    if least:
        member.skip_where_end_tokens_cannot_be_held_off()
    backend = continuous(4, streaming=Streaming(enabled=True), min_output_tokens=least)
    generations = run(backend, texts)
    assert_tokens_are_timed(generations)
    assert all(len({chunk.at_ns for chunk in g.chunks}) == len(g.chunks) for g in generations)
    assert all(g.end_ns == g.chunks[-1].at_ns for g in generations)
    assert min(len(g.token_ids) for g in generations) >= least
    for g in generations:
        assert not member.end_tokens.intersection(g.token_ids[:-1])
        assert (g.finish_reason == "stop") == (g.token_ids[-1] in member.end_tokens)


def test_continuously_what_was_broken_off_does_not_come_back(continuous, texts):
    backend = continuous(3)
    prompts = backend.encode(texts)
    whole = tokens(flat(backend.generate(prompts)))
    broken_off = backend.generate(prompts)
    next(broken_off)
    broken_off.close()
    assert tokens(flat(backend.generate(prompts[:2]))) == {index: whole[index] for index in (0, 1)}


def test_simulation_has_no_model_and_says_so():
    backend = make_backend(Experiment(model="any", backend=SimulatedBackend()))
    backend.load()
    assert backend.model_info() is None
    assert backend.architecture() is None
    assert [each.code for each in backend.warnings()] == ["simulated"]


def test_tiny_is_described_as_loaded(tiny_folder, monkeypatch):
    monkeypatch.setenv("LEM_CACHE_DIR", str(tiny_folder.parents[1]))
    backend = make_backend(Experiment(model="tiny", backend=PytorchBackend(device="cpu")))
    backend.start()
    backend.load()
    info = backend.model_info()
    assert (info.name, info.architecture, info.dtype) == ("tiny", "LlamaForCausalLM", "float32")
    assert info.weights_bytes == 4 * info.parameters
    assert info.random_weights
    assert (info.revision, info.adapter, info.quantization) == (None, None, None)
    assert [each.code for each in backend.warnings()] == ["random_weights"]


def test_simulated_time_is_that_of_its_tokens(texts):
    options = SimulatedBackend(prefill_s_per_token=1e-3, decode_s_per_token=2e-3)
    experiment = Experiment(model="any", backend=options, max_output_tokens=10, batching=Batching(batch_size=3))
    backend = make_backend(experiment)
    prompts = backend.encode(texts[:3])
    generations = flat(backend.generate(prompts))
    steps = max(len(g.token_ids) for g in generations)
    expected_s = sum(len(p.token_ids) for p in prompts) * 1e-3 + steps * 2e-3
    took_s = (generations[0].end_ns - generations[0].start_ns) / 1e9
    assert expected_s <= took_s < expected_s + 0.1


def test_simulated_failure_comes_at_its_request(texts):
    backend = make_backend(Experiment(model="any", backend=SimulatedBackend(fail_at_request=2)))
    generations = backend.generate(backend.encode(texts))
    assert [g.index for batch in (next(generations), next(generations)) for g in batch] == [0, 1]
    with pytest.raises(RunError, match="request 2"):
        next(generations)


def test_a_server_gives_the_tokens_that_pytorch_gives(server, tiny_that_ends, texts, engines):
    common = {"model": str(tiny_that_ends), "max_output_tokens": 12, "batching": Batching(batch_size=4)}
    members = [
        Member(Experiment(backend=options, **common), frozenset(), engines).loaded()
        for options in (OpenaiBackend(url=server.url), PytorchBackend(device="cpu"))
    ]
    here, there = (run(backend, texts) for backend in members)
    assert tokens(here) == tokens(there)
    assert [g.finish_reason for g in here] == [g.finish_reason for g in there]
    assert members[0].architecture() == members[1].architecture()
    for backend in members:
        backend.close()
