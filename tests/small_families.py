"""Small models of many families, made from their own config classes and saved as a hub's checkpoint would be.

Their weights are random but seeded, and their embedding of the padding token is not zero. Knows nothing of lem.
"""

from __future__ import annotations

from pathlib import Path

from tests.models_for_tests import VOCABULARY, _tokenizer

POSITIONS = 128
# Removes an option of `NARROW` for families that do not have it.
UNSET = "unset"
NARROW = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": POSITIONS,
    "init_std": 0.3,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "pad_token_id": 0,
}
GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": POSITIONS,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Options that each family's config needs in addition to, or instead of, those of `NARROW`.
OPTIONS = {
    "bart": BART,
    "bert": {"num_key_value_heads": UNSET},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "gemma3_text": {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma4_text": {"head_dim": 16, "hidden_size_per_layer_input": 16},
    "gpt2": GPT,
    "gpt_bigcode": GPT | {"multi_query": True},
    "gpt_neox": {"num_key_value_heads": UNSET},
    "gpt_oss": EXPERTS | {"head_dim": 16},
    "hrm_text": {"num_key_value_heads": UNSET},
    "jetmoe": EXPERTS | {"num_key_value_heads": 4, "kv_channels": 16},
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16},
    "minicpm3": {name: size for name, size in LATENT.items() if "lora" in name or "head" in name},
    "minimax": EXPERTS | {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16, "block_size": 4},
    "mixtral": EXPERTS,
    "opt": {"ffn_dim": 96, "num_key_value_heads": UNSET, "intermediate_size": UNSET, "init_std": 0.3},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "moe_intermediate_size": 32},
    "plbart": BART,
    "rwkv": {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "attention_hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
    },
    "xlnet": {
        "vocab_size": VOCABULARY,
        "d_model": 64,
        "n_layer": 2,
        "n_head": 4,
        "d_inner": 96,
        "initializer_range": 0.3,
    },
}
WHOLE = frozenset(["bart", "bloom", "gpt2", "gpt_bigcode", "mamba", "plbart", "rwkv", "xlnet"])


def config_of(kind, **changes):
    """Return the configuration of a small model of a family."""
    from transformers import AutoConfig

    options = OPTIONS.get(kind, {})
    options = options if kind in WHOLE else NARROW | options
    return AutoConfig.for_model(kind, **{name: value for name, value in (options | changes).items() if value != UNSET})


def model_of(kind, **changes):
    """Return a small model of a family, with seeded random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return AutoModelForCausalLM.from_config(config_of(kind, **changes)).eval()


def saved(folder, model, *, chat=None, pad="<pad>"):
    """Save a model with a tokenizer, and return the folder."""
    model.save_pretrained(folder)
    _tokenizer(pad=pad, bos=False, chat=chat).save_pretrained(folder)
    return Path(folder)
