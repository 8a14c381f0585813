"""Dimensions of small models of many families, compared with PyTorch's own counter and with their actual caches.

Each model runs with its real code. The counter includes a prefill's attention over the full square of positions, and
the output projection of every position. The parts that model FLOPs leave out are subtracted by hand, using the table in
`tests/families.py`, and so is work in a step that a cache should have saved.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from lem.backends.base import Encoded
from lem.backends.pytorch import Loaded, Static
from lem.backends.pytorch_forward import ForwardWatch
from lem.backends.sizing import architecture_of, cache_bytes
from lem.spec.experiment import Batching, Experiment, PytorchBackend
from lem.workload.flops import Attention, UnknownArchitecture, forward_flops
from lem.workload.weights import Fit
from tests.conftest import command
from tests.families import BYTES, FAMILIES, WINDOW
from tests.models_for_tests import mamba

pytestmark = pytest.mark.engines

PROMPT, OUTPUT = 40, 4
KNOWN = [name for name, family in FAMILIES.items() if family.unknown is None]
UNKNOWN = [name for name, family in FAMILIES.items() if family.unknown]
CACHING = [name for name, family in FAMILIES.items() if family.layers]


@cache
def model(name):
    return FAMILIES[name].build()


@cache
def sizes(name):
    return architecture_of(model(name))


def counted(name, prompt, output):
    """Return the counter's FLOPs of each forward pass of a request: its prefill, then its decode steps."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    ids, known, steps = torch.arange(3, 3 + prompt)[None], {}, []
    with torch.inference_mode():
        for _ in range(output):
            with FlopCounterMode(display=False) as counter:
                out = model(name)(ids, use_cache=True, **known)
            steps.append(counter.get_total_flops())
            known, ids = {"past_key_values": out.past_key_values}, out.logits[:, -1:].argmax(-1)
    return steps


def attended(layer, tokens):
    """Return, by counting, how many positions the tokens of a sequence attend to in a layer."""
    reach = layer.reach or tokens
    return sum(at % reach + 1 if layer.in_chunks else min(at + 1, reach) for at in range(tokens))


def prefill(name, prompt):
    """Return the counter's FLOPs of a prefill, without those that model FLOPs leave out."""
    family, (steps,) = FAMILIES[name], counted(name, prompt, 1)
    unseen = sum(4 * layer.width * (prompt**2 - attended(layer, prompt)) for layer in family.layers)
    return steps - unseen - 2 * sizes(name).head_weights * (prompt - 1) - 2 * family.wasted * prompt


def test_there_are_families_enough():
    assert len(KNOWN) == 39  # as docs/concepts/methodology.md says
    assert PROMPT > 2 * WINDOW


@pytest.mark.parametrize("name", KNOWN)
def test_prefill_costs_what_the_counter_says(name):
    assert forward_flops(sizes(name), PROMPT, 1) == pytest.approx(prefill(name, PROMPT), rel=0.01)


@pytest.mark.parametrize("name", KNOWN)
def test_request_costs_what_the_counter_says(name):
    family = FAMILIES[name]
    if family.steps_do_more:  # their true cost: as much as in a longer prefill
        later = prefill(name, PROMPT + OUTPUT - 1) - prefill(name, PROMPT)
        later += 2 * sizes(name).head_weights * (OUTPUT - 1)
    else:
        later = sum(counted(name, PROMPT, OUTPUT)[1:]) - 2 * family.wasted * (OUTPUT - 1)
    steps = forward_flops(sizes(name), PROMPT, OUTPUT) - forward_flops(sizes(name), PROMPT, 1)
    assert steps == pytest.approx(later, rel=0.01)


@pytest.mark.parametrize("name", KNOWN)
def test_attention_is_that_of_the_config(name):
    widths: dict[tuple, int] = {}
    for layer in FAMILIES[name].layers:
        reach = (layer.reach, layer.in_chunks)
        widths[reach] = widths.get(reach, 0) + layer.width
    assert sizes(name).attention == tuple(Attention(width, *reach) for reach, width in widths.items())


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_told_is_unknown_and_says_why(name):
    with pytest.raises(UnknownArchitecture, match=FAMILIES[name].unknown):
        architecture_of(model(name))


def test_a_window_under_a_name_that_nobody_knows_makes_sizes_unknown():
    """As in the config of a model with code of its own."""
    loaded = FAMILIES["llama"].build()
    loaded.config.attention_window_size = WINDOW
    with pytest.raises(UnknownArchitecture, match=r"the model's layers attend is unknown \(attention_window_size\)"):
        architecture_of(loaded)
    loaded.config.attention_window_size = None
    assert architecture_of(loaded) == sizes("llama")


@pytest.mark.parametrize("name", CACHING)
def test_cache_is_as_large_as_what_was_allocated(name):
    runner = static(name)
    prompts = [Encoded(i, tuple(range(3, 3 + length))) for i, length in enumerate([PROMPT, PROMPT - 7, 5])]
    assert runner.kv_cache_bytes() is None
    list(runner.generate(prompts))
    # Two prompts padded to the longer one; the last token is never fed back.
    tokens = PROMPT + OUTPUT - 1
    by_hand = sum(layer.cached * layer.kept(tokens) for layer in FAMILIES[name].layers)
    assert runner.kv_cache_bytes() == 2 * BYTES * by_hand
    runner.forget_cache()
    assert runner.kv_cache_bytes() is None


def static(name):
    import torch
    import transformers

    loaded = model(name)
    # No end token: the output length must not depend on random weights.
    greedy = transformers.GenerationConfig(
        max_new_tokens=OUTPUT, do_sample=False, pad_token_id=0, eos_token_id=None, disable_compile=True
    )
    loaded.generation_config = transformers.GenerationConfig(pad_token_id=0)
    wanted = Experiment(
        model=name, max_output_tokens=OUTPUT, backend=PytorchBackend(device="cpu"), batching=Batching(batch_size=2)
    )
    tokenizer = SimpleNamespace(pad_token_id=0)
    cpu = [torch.device("cpu")]
    found = SimpleNamespace(text_config={})
    return Static(
        wanted, Loaded(found, cpu, tokenizer, loaded, loaded, frozenset(), greedy, 0, Fit()), ForwardWatch(loaded)
    )


def test_run_of_a_model_whose_sizes_are_unknown_has_no_flops_and_says_why(tmp_path):
    finished = command(
        "experiment", "--backend", "pytorch", "-m", str(mamba(tmp_path / "mamba")), "-d", "sample", "-n", "2", "-y",
        "energy=none", "backend.device=cpu", "max_output_tokens=4", cwd=tmp_path,
    )  # fmt: skip
    assert finished.code == 0, finished.err
    (row,) = pq.read_table(tmp_path / "results" / "experiments").to_pylist()
    assert row["output_tokens"] > 0
    assert row["flops"] is row["flops_per_s"] is row["flops_per_token"] is row["mfu"] is row["flops_method"] is None
    (told,) = [text for text in row["warnings"] if text.startswith("flops_unknown: ")]
    assert "layers" in told
    assert told.split(": ", 1)[1] in finished.out + finished.err
    assert row["kv_cache_bytes"] > 0  # the model's states


def test_a_storage_counts_once_and_as_a_whole():
    import torch

    whole = torch.zeros(2, 10)
    held = SimpleNamespace(layers=[SimpleNamespace(keys=whole[:, 8:], values=whole), {"more": torch.zeros(3, 1)}])
    held.itself = held
    assert cache_bytes(held) == 2 * 10 * 4 + 3 * 4
    assert cache_bytes(SimpleNamespace(seen=torch.tensor(3))) is None


# The defaults of these configs are the models as released. Published are the parameters that a token meets, in thousand
# millions, in some with an embedding that is a table of its own, which is taken off here.
PUBLISHED = {
    "DeepseekV3": (37.0 - 0.93, 61 * 128 * (128 + 64 + 128) // 2),  # arXiv 2412.19437: 37 B of 671 B
    "GptOss": (5.13, 36 * 64 * 64),  # arXiv 2508.10925: 5.13 B of 116.83 B, without the embedding
    "Mixtral": (12.9 - 0.13, 32 * 32 * 128),  # arXiv 2401.04088: 12.9 B of 46.7 B
    "Falcon": (6.9, 32 * 71 * 64),  # Falcon-7B, tied
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_released_model_has_the_published_number_of_active_parameters(name):
    import torch
    import transformers

    with torch.device("meta"):
        kind = getattr(transformers, f"{name}ForCausalLM")
        found = architecture_of(kind(kind.config_class()))
    billions, width = PUBLISHED[name]
    assert (found.body_weights + found.head_weights) / 1e9 == pytest.approx(billions, rel=0.02)
    assert sum(part.width for part in found.attention) == width
