"""Small models of many families, with the peculiarities of their configs, and their dimensions worked out by hand.

Each has random weights and no tokenizer, so it is built in milliseconds. Knows nothing of lem.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCABULARY, HIDDEN, HEADS, HEAD = 96, 48, 4, 12
WINDOW = 16
BYTES = 4  # float32
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_positions": 256, "n_embd": HIDDEN, "n_layer": 2, "n_head": HEADS}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}
MIXED = ["sliding_attention", "full_attention"]
NO_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
MLA: dict[str, Any] = {
    "num_key_value_heads": HEADS,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    **EXPERTS,
}


@dataclass(frozen=True)
class Layer:
    """A layer's dimensions: heads·head_dim, how far back it attends, and the values that it caches per token.

    `caches_all` layers keep what they no longer attend to.
    """

    width: int
    cached: int
    reach: int | None = None
    in_chunks: bool = False
    caches_all: bool = False

    def kept(self, tokens: int) -> int:
        """Return how many of a sequence's tokens the layer caches."""
        return tokens if self.reach is None or self.caches_all else min(self.reach, tokens)


@dataclass(frozen=True)
class Family:
    """A small model of a family.

    `config` names the config class if it is not the model's own. `steps_do_more`: decode steps expand the whole cache
    again, or attend beyond their chunk, which does not count as model FLOPs. `wasted` is the number of weights of
    experts that run although the token is not routed to them. `unknown` is a word from the reason why FLOPs are null.
    """

    model: str
    options: dict[str, Any]
    layers: tuple[Layer, ...] = ()
    config: str | None = None
    steps_do_more: bool = False
    wasted: int = 0
    unknown: str | None = field(default=None)

    def build(self) -> Any:
        """Return the model with random weights."""
        import torch
        import transformers

        kind = getattr(transformers, self.model)
        config = (getattr(transformers, self.config) if self.config else kind.config_class)(**self.options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = kind._from_config(config, attn_implementation="eager").eval()
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
        return model


def plain(kv_heads: int = 2, head: int = HEAD, reach: int | None = None) -> tuple[Layer, ...]:
    """Return two equal layers, with keys and values of a size."""
    return (Layer(HEADS * head, 2 * kv_heads * head, reach),) * 2


def mixed(kv_heads: int = 2, head: int = HEAD) -> tuple[Layer, ...]:
    """Return a layer with a sliding window and one without."""
    cached = 2 * kv_heads * head
    return Layer(HEADS * head, cached, WINDOW), Layer(HEADS * head, cached)


def grouped(**options: Any) -> dict[str, Any]:
    """Return the options of a model that looks like a Llama, with two heads of keys and values."""
    return BASE | {"num_key_value_heads": 2, "intermediate_size": 80} | options


FAMILIES: dict[str, Family] = {
    # heads as they come
    "gpt2": Family("GPT2LMHeadModel", GPT, plain(4)),
    "gptj": Family("GPTJForCausalLM", GPT | {"rotary_dim": 8}, plain(4)),
    "gpt_neox": Family("GPTNeoXForCausalLM", BASE | {"intermediate_size": 80}, plain(4)),
    "bloom": Family(
        "BloomForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": 2, "n_head": HEADS}, plain(4)
    ),
    "mpt": Family(
        "MptForCausalLM",
        {"vocab_size": VOCABULARY, "d_model": HIDDEN, "n_layers": 2, "n_heads": HEADS, "max_seq_len": 256},
        plain(4),
    ),
    "phi": Family("PhiForCausalLM", BASE | {"intermediate_size": 80}, plain(4)),
    # embeddings narrower than the layers, with projections around them
    "opt": Family("OPTForCausalLM", BASE | {"ffn_dim": 80, "word_embed_proj_dim": 24}, plain(4)),
    # one head of keys and values, which the config says in its own way
    "falcon_7b": Family(
        "FalconForCausalLM",
        {**BASE, "multi_query": True, "new_decoder_architecture": False, "parallel_attn": True},
        plain(1),
    ),
    # two heads of keys and values, of which transformers caches a copy for each head of the queries
    "falcon_40b": Family(
        "FalconForCausalLM", {**BASE, "num_kv_heads": 2, "new_decoder_architecture": True}, plain(4)
    ),
    "gpt_bigcode": Family("GPTBigCodeForCausalLM", GPT | {"multi_query": True}, plain(1)),
    "gemma": Family("GemmaForCausalLM", grouped(num_key_value_heads=1, head_dim=24), plain(1, 24)),
    # heads wider than the hidden size divided by them
    "llama": Family("LlamaForCausalLM", grouped(head_dim=20), plain(2, 20)),
    "qwen3": Family("Qwen3ForCausalLM", grouped(head_dim=24), plain(2, 24)),
    "qwen2": Family("Qwen2ForCausalLM", grouped(), plain()),
    "stablelm": Family("StableLmForCausalLM", grouped(partial_rotary_factor=0.5), plain()),
    "cohere": Family("CohereForCausalLM", grouped(), plain()),
    "olmo2": Family("Olmo2ForCausalLM", grouped(), plain()),
    "granite": Family("GraniteForCausalLM", grouped(), plain()),
    "nemotron": Family("NemotronForCausalLM", grouped(head_dim=HEAD), plain()),
    # sliding windows, in all layers or in some
    "mistral": Family("MistralForCausalLM", grouped(sliding_window=WINDOW), plain(reach=WINDOW)),
    "starcoder2": Family("Starcoder2ForCausalLM", grouped(sliding_window=WINDOW), plain(reach=WINDOW)),
    "phi3": Family("Phi3ForCausalLM", grouped(sliding_window=WINDOW), plain(reach=WINDOW)),
    "gemma2": Family("Gemma2ForCausalLM", grouped(head_dim=24, sliding_window=WINDOW), mixed(2, 24)),
    "cohere2": Family("Cohere2ForCausalLM", grouped(sliding_window=WINDOW, layer_types=MIXED), mixed()),
    # its own names for windows and for the layers that have them
    "gpt_neo": Family(
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "num_layers": 2,
            "num_heads": HEADS,
            "max_position_embeddings": 256,
            "window_size": WINDOW,
            "attention_types": [[["global", "local"], 1]],
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        (Layer(48, 96), Layer(48, 96, WINDOW, caches_all=True)),
        steps_do_more=True,
    ),
    # a tower for images, which no text token passes
    "gemma3": Family(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": grouped(num_key_value_heads=1, head_dim=24, sliding_window=WINDOW, layer_types=MIXED),
            "vision_config": NO_VISION | {"image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
        },
        mixed(1, 24),
    ),
    # heads of another size in the layers without a window, an embedding for each layer, a tower
    "gemma4": Family(
        "Gemma4ForConditionalGeneration",
        {
            "text_config": grouped(
                num_key_value_heads=1,
                head_dim=24,
                global_head_dim=32,
                sliding_window=WINDOW,
                layer_types=MIXED,
                hidden_size_per_layer_input=8,
                vocab_size_per_layer_input=VOCABULARY,
            ),
            "vision_config": NO_VISION,
            "audio_config": None,
        },
        (Layer(HEADS * 24, 2 * 24, WINDOW), Layer(HEADS * 32, 2 * 32)),
    ),
    # the last two layers use the keys and values of the first two
    "gemma3n": Family(
        "Gemma3nForCausalLM",
        grouped(
            num_hidden_layers=4,
            num_key_value_heads=1,
            head_dim=24,
            sliding_window=WINDOW,
            layer_types=MIXED * 2,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCABULARY,
            laurel_rank=4,
            activation_sparsity_pattern=[0.0] * 4,
        ),
        (Layer(96, 48, WINDOW), Layer(96, 48), Layer(96, 0, WINDOW), Layer(96, 0)),
        config="Gemma3nTextConfig",
    ),
    # experts, under all the names that configs have for them
    "mixtral": Family("MixtralForCausalLM", grouped(num_local_experts=4, **EXPERTS), plain()),
    "phimoe": Family("PhimoeForCausalLM", grouped(num_local_experts=4, **EXPERTS), plain()),
    "granitemoe": Family("GraniteMoeForCausalLM", grouped(num_local_experts=4, **EXPERTS), plain()),
    "olmoe": Family("OlmoeForCausalLM", grouped(num_experts=4, **EXPERTS), plain()),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        grouped(
            num_experts=4,
            moe_intermediate_size=40,
            shared_expert_intermediate_size=56,
            decoder_sparse_step=2,
            **EXPERTS,
        ),
        plain(),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", grouped(num_experts=4, moe_intermediate_size=40, head_dim=24, **EXPERTS), plain(2, 24)
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        grouped(
            head_dim=HEAD,
            moe_intermediate_size=24,
            n_routed_experts=4,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            **EXPERTS,
        ),
        plain(),
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        grouped(head_dim=24, num_local_experts=4, sliding_window=WINDOW, **EXPERTS),
        mixed(2, 24),
    ),
    # runs all experts on every token and weighs the results; attends in chunks
    "llama4": Family(
        "Llama4ForCausalLM",
        grouped(
            intermediate_size=40,
            intermediate_size_mlp=80,
            head_dim=HEAD,
            num_local_experts=4,
            num_experts_per_tok=1,
            attention_chunk_size=WINDOW,
            interleave_moe_layer_step=1,
        ),
        (Layer(48, 48, WINDOW, in_chunks=True),) * 2,
        config="Llama4TextConfig",
        steps_do_more=True,
        wasted=2 * 3 * (3 * HIDDEN * 40),
    ),
    # keys and values of low rank, with heads of different sizes
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        BASE | MLA | {"n_group": 1, "topk_group": 1, "head_dim": 8},
        (Layer(HEADS * (16 + 8 + 12) // 2, 16 + 8),) * 2,
        steps_do_more=True,
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        BASE | MLA | {"n_group": 2, "topk_group": 1},
        (Layer(HEADS * (16 + 8 + 12) // 2, 16 + 8),) * 2,
        steps_do_more=True,
    ),
    # unknown
    "jetmoe": Family(
        "JetMoeForCausalLM",
        grouped(kv_channels=HEAD, intermediate_size=40, num_local_experts=4, **EXPERTS),
        plain(2),
        unknown="values",
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        grouped(
            head_dim=24,
            num_experts=4,
            moe_intermediate_size=40,
            shared_expert_intermediate_size=24,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
            **EXPERTS,
        ),
        unknown="layers",
    ),
    "minimax": Family(
        "MiniMaxForCausalLM",
        grouped(num_local_experts=4, layer_types=["linear_attention", "full_attention"], block_size=16, **EXPERTS),
        unknown="layers",
    ),
    "mamba": Family(
        "MambaForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "state_size": 8},
        unknown="layers",
    ),
    "rwkv": Family(
        "RwkvForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "attention_hidden_size": HIDDEN,
            "num_hidden_layers": 2,
            "context_length": 256,
        },
        unknown="layers",
    ),
}  # fmt: skip
