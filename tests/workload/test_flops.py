"""The FLOPs formula, compared with PyTorch's own counter of the operations in real forward passes.

Like the formula, the counter counts a multiply-add as two operations, and it counts only matrix products. It differs in
two ways. First, it counts a prefill's attention over the full square of positions, although causal attention needs only
the lower half and the diagonal; the difference is subtracted by hand. Second, it counts the outer product that computes
the rotary angles (head_dim per position), which belongs neither to a weight nor to attention; it is within the 1%.
Other families of models are in tests/backends/test_families.py.
"""

import pytest

from lem.backends.sizing import architecture_of
from lem.workload import tiny
from lem.workload.flops import Architecture, Attention, forward_flops, total_flops
from tests.models_for_tests import gpt2, mixtral, qwen2

pytestmark = pytest.mark.engines

PROMPT, OUTPUT = 80, 12
NAMES = ("gpt2", "qwen2", "mixtral", "tiny")
# Computed by hand from the configurations: layers · heads · head_dim.
ATTENTION_WIDTH = {"gpt2": 2 * 64, "qwen2": 2 * 64, "mixtral": 2 * 64, "tiny": 6 * 8 * 32}


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    builders = {"gpt2": gpt2, "qwen2": qwen2, "mixtral": mixtral}
    folders = {name: build(folder / name) for name, build in builders.items()}
    folders["tiny"] = folder / "tiny"
    folders["tiny"].mkdir()
    tiny.write_files(folders["tiny"])
    return folders


def load(folder):
    from transformers import AutoModelForCausalLM

    # The counter does not know the default fused kernel for experts; the plain kernels do the same work.
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def counted_steps(model, prompt, output):
    """Return the counter's FLOPs of each forward pass of a request: its prefill, then its decode steps."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.arange(3, 3 + prompt)[None]
    cache, steps = None, []
    with torch.inference_mode():
        for _ in range(output):
            with FlopCounterMode(display=False) as counter:
                # Like `generate`, this computes the output projection of the last position only.
                out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            steps.append(counter.get_total_flops())
            cache, ids = out.past_key_values, out.logits.argmax(-1)
    return steps


def beyond_causal(name, prompt):
    """Return the prefill's FLOPs for positions that come later than the token that would attend to them."""
    return 4 * ATTENTION_WIDTH[name] * prompt * (prompt - 1) / 2


@pytest.mark.parametrize("name", NAMES)
def test_decode_steps_cost_what_the_counter_says(built, name):
    model = load(built[name])
    # With one input token, each pass is a decode step, in which nothing comes later, and everything is causal.
    assert forward_flops(architecture_of(model), 1, OUTPUT) == pytest.approx(
        sum(counted_steps(model, 1, OUTPUT)), rel=0.01
    )


@pytest.mark.parametrize("name", NAMES)
def test_prefill_costs_what_the_counter_says_without_its_acausal_part(built, name):
    model = load(built[name])
    counted = counted_steps(model, PROMPT, 1)[0] - beyond_causal(name, PROMPT)
    assert forward_flops(architecture_of(model), PROMPT, 1) == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_request_costs_its_prefill_and_its_steps(built, name):
    model = load(built[name])
    steps = counted_steps(model, PROMPT, OUTPUT)
    assert len(steps) == OUTPUT
    expected = sum(steps) - beyond_causal(name, PROMPT)
    assert forward_flops(architecture_of(model), PROMPT, OUTPUT) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_attention_width_is_that_of_the_query_heads(built, name):
    assert architecture_of(load(built[name])).attention == (Attention(ATTENTION_WIDTH[name]),)


def test_attention_is_enough_of_the_work_for_the_comparison_to_see_it(built):
    arch = architecture_of(load(built["gpt2"]))
    without = Architecture(arch.body_weights, arch.head_weights)
    assert forward_flops(without, PROMPT, 1) < 0.95 * forward_flops(arch, PROMPT, 1)


def test_weights_of_tiny_are_those_of_its_matrices(built):
    arch = architecture_of(load(built["tiny"]))
    attention = 256 * (256 + 128 + 128) + 256 * 256
    assert arch.body_weights == 6 * (attention + 3 * 256 * 704)
    assert arch.head_weights == 4096 * 256


def test_tied_output_projection_counts_as_one_and_the_embedding_does_not(built):
    arch = architecture_of(load(built["gpt2"]))
    assert arch.body_weights == 2 * 12 * 64 * 64
    assert arch.head_weights == 400 * 64


def test_token_meets_two_of_four_experts_and_the_whole_router(built):
    arch = architecture_of(load(built["mixtral"]))
    attention = 64 * (64 + 32 + 32) + 64 * 64
    router, expert = 4 * 64, 3 * 64 * 96
    assert arch.body_weights == 2 * (attention + router + 2 * expert)


@pytest.mark.parametrize("kernel", ["grouped_mm", "batched_mm"])
def test_kernel_of_the_experts_does_not_change_the_count(built, kernel):
    model = load(built["mixtral"])
    expected = architecture_of(model)
    model.set_experts_implementation(kernel)
    assert architecture_of(model) == expected


@pytest.mark.parametrize(
    ("name", "targets", "weights"),
    [
        # Rank 4: from 64 to 3·64 in each of two layers.
        ("gpt2", ["c_attn"], 2 * 4 * (64 + 3 * 64)),
        ("qwen2", ["q_proj", "down_proj"], 2 * 4 * ((64 + 64) + (128 + 64))),
    ],
)
def test_adapter_that_is_not_merged_costs_its_own_products(built, name, targets, weights):
    import peft

    plain = load(built[name])
    before = architecture_of(plain)
    lora = peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(plain, lora).eval()
    after = architecture_of(adapted)
    assert after.body_weights - before.body_weights == weights
    assert (after.head_weights, after.attention) == (before.head_weights, before.attention)
    assert forward_flops(after, 1, OUTPUT) == pytest.approx(sum(counted_steps(adapted, 1, OUTPUT)), rel=0.01)


def test_adapter_of_the_output_projection_is_paid_where_a_token_is_chosen(built):
    import peft

    plain = load(built["qwen2"])
    before = architecture_of(plain)
    adapted = peft.get_peft_model(plain, peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")).eval()
    after = architecture_of(adapted)
    assert after.body_weights == before.body_weights
    assert after.head_weights - before.head_weights == 4 * (64 + 400)


def test_packed_weights_count_by_the_layers_shape(built):
    import torch

    class Packed(torch.nn.Module):
        """Return two 4-bit weights per byte, as quantizing libraries store them."""

        def __init__(self, linear):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.weight = torch.nn.Parameter(torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8), False)

    model = load(built["qwen2"])
    expected = architecture_of(model)
    for layer in model.model.layers:
        layer.mlp.up_proj = Packed(layer.mlp.up_proj)
    assert architecture_of(model) == expected


def test_precision_of_the_weights_does_not_change_the_count(built):
    import torch

    model = load(built["gpt2"])
    expected = architecture_of(model)
    assert architecture_of(model.to(torch.bfloat16)) == expected


# ------------------------------------------------------------------ the formula by hand
SMALL = Architecture(body_weights=10, head_weights=3, attention=(Attention(2),))


def test_last_token_is_never_fed_back():
    # 3 + 2 - 1 = 4 tokens pass through, attending to 1 + 2 + 3 + 4 positions; two tokens are chosen.
    assert forward_flops(SMALL, 3, 2) == 2 * 10 * 4 + 2 * 3 * 2 + 4 * 2 * 10


@pytest.mark.parametrize(
    ("attention", "positions"),
    [
        (Attention(1), [1, 2, 3, 4, 5, 6, 7, 8]),
        (Attention(1, reach=3), [1, 2, 3, 3, 3, 3, 3, 3]),
        (Attention(1, reach=3, in_chunks=True), [1, 2, 3, 1, 2, 3, 1, 2]),
        (Attention(1, reach=8), [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_token_attends_as_far_as_its_layers_reach(attention, positions):
    assert [attention.positions(n) for n in range(1, 9)] == [sum(positions[:n]) for n in range(1, 9)]


def test_layers_of_several_reaches_add_up():
    mixed = Architecture(10, 3, (Attention(2), Attention(5, reach=2)))
    assert forward_flops(mixed, 3, 2) - forward_flops(Architecture(10, 3), 3, 2) == 4 * 2 * 10 + 4 * 5 * (1 + 2 + 2 + 2)


def test_request_without_output_did_no_counted_work():
    assert forward_flops(SMALL, 3, 0) == 0


def test_total_is_the_sum_of_the_requests_whatever_their_batch():
    assert total_flops(SMALL, [(3, 2), (1, 1), (3, 2)]) == 2 * forward_flops(SMALL, 3, 2) + forward_flops(SMALL, 1, 1)
    assert total_flops(SMALL, []) == 0
