"""Rules about families of models, each checked against what transformers does with a small model of the family."""

from __future__ import annotations

import pytest

from lem.backends.base import Encoded
from lem.backends.pytorch_continuous import Continuous
from lem.backends.pytorch_forward import ForwardWatch
from lem.backends.pytorch_objections import PADDING_UNMASKED, objections
from lem.errors import LemError
from lem.spec.engines import PytorchBackend
from lem.spec.experiment import Batching, Experiment
from lem.workload.models import find
from tests.hosts import CPU
from tests.small_families import model_of, saved

pytestmark = pytest.mark.engines

SHORT, LONG = tuple(range(10, 17)), tuple(range(30, 50))
NEW_TOKENS = 8
PADDING = 5
PAGED = (
    "gemma3_text", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "granite", "llama", "mixtral", "olmo2", "opt", "phi3",
    "qwen2", "qwen3_moe", "starcoder2",
)  # fmt: skip
NOT_PAGED = (
    "bloom", "deepseek_v2", "deepseek_v3", "diffllama", "doge", "gemma4_text", "hrm_text", "jetmoe", "mamba",
    "mimo_v2_flash", "minicpm3", "minimax", "nemotron", "rwkv",
)  # fmt: skip
MASKED = ("bloom", "gpt2", "llama", "mamba", "mixtral", "opt")
NOT_MASKED = ("bart", "minimax", "plbart", "rwkv", "xlnet")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder_of(kind):
        if kind not in made:
            made[kind] = saved(tmp_path_factory.mktemp("families") / kind, model_of(kind))
        return made[kind]

    return folder_of


def asked(folder, **batching):
    return Experiment(
        model=str(folder), backend=PytorchBackend(device="cpu"), max_output_tokens=8, batching=Batching(**batching)
    )


def codes(experiment):
    return {each.code for each in objections(experiment, find(experiment.model), CPU)}


def loaded(folder):
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(pad_token_id=PADDING)
    return model


def generated(model, *prompts):
    """Return the new tokens of prompts in one batch, padded on the left."""
    import torch

    longest = max(map(len, prompts))
    rows = model.generate(
        input_ids=torch.tensor([[PADDING] * (longest - len(p)) + list(p) for p in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    return [tuple(row) for row in rows[:, longest:].tolist()]


# ------------------------------------------------------------------ continuous batching
def continuously(experiment, model):
    """Return the new tokens of the two prompts, or None if generation fails."""
    prompts = [Encoded(0, SHORT), Encoded(1, LONG)]
    try:
        batches = list(Continuous(experiment, model, ForwardWatch(model), frozenset()).generate(prompts))
    except (LemError, RuntimeError, AttributeError):
        return None
    return [each.token_ids for each in sorted((g for batch in batches for g in batch), key=lambda g: g.index)]


@pytest.mark.parametrize("kind", [*PAGED, *NOT_PAGED])
def test_continuous_batching_is_refused_for_the_models_that_fail_or_write_something_else(folders, kind):
    folder = folders(kind)
    experiment = asked(folder, strategy="continuous", batch_size=2)
    alone = [*generated(loaded(folder), SHORT), *generated(loaded(folder), LONG)]
    works = continuously(experiment, loaded(folder)) == alone
    assert works == (kind in PAGED)
    assert ("continuous_unavailable" in codes(experiment)) is not works


# ------------------------------------------------------------------ padding
@pytest.mark.parametrize("kind", [*MASKED, *NOT_MASKED])
def test_batches_are_objected_to_for_the_models_whose_tokens_padding_changes(folders, kind):
    folder = folders(kind)
    model = loaded(folder)
    masks = generated(model, SHORT, LONG) == [*generated(model, SHORT), *generated(model, LONG)]
    assert masks == (kind in MASKED)
    assert (kind in PADDING_UNMASKED) is not masks
    assert ("padding_changes_tokens" in codes(asked(folder, batch_size=2))) is not masks
    assert "padding_changes_tokens" not in codes(asked(folder, batch_size=1))
