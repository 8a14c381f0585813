"""Small transformers models with a tokenizer, saved in a directory as a hub's checkpoint would be.

Their weights are random but seeded, and large enough that the most likely token leads clearly, so the outputs do not
depend on the last bits of a sum. Their end token is one that greedy decoding really produces. Knows nothing of lem.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

TEXT = (
    "the river carries small stones to the sea and leaves them where water slows every winter snow covers "
    "a narrow road above old mills people count barrels of apples before frost comes back again without warning"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
POSITIONS = 128
NEW_TOKENS = 24
VOCABULARY = 400
# Shared by models that look like a Llama.
SMALL = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def mixed_prompts(count=50, seed=11):
    draw = random.Random(seed)
    return [f"{i}: " + " ".join(draw.choices(TEXT.split(), k=draw.randint(1, 40))) for i in range(count)]


def write_prompts(file, prompts):
    Path(file).write_text("".join(json.dumps({"text": text}) + "\n" for text in prompts), encoding="utf-8")
    return Path(file)


def gpt2(folder):
    """Learned positions, tied output projection, Conv1D; the end token pads, as in GPT-2's own checkpoint."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_embd=64,
        n_layer=2,
        n_head=4,
        initializer_range=0.4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=2,
        eos_token_id=2,
    )
    return _save(folder, GPT2LMHeadModel, config, seed=1, pad=None)


def qwen2(folder):
    """Rotary positions, grouped-query attention, biases, a padding token of its own."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**SMALL, intermediate_size=128, pad_token_id=0)
    return _save(folder, Qwen2ForCausalLM, config, seed=3, pad="<pad>")


def mixtral(folder):
    """Two of four experts for each token, fused into three-dimensional weights; a beginning token on each text."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**SMALL, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2)
    return _save(folder, MixtralForCausalLM, config, seed=1, pad="<pad>", bos=True, chat=CHAT_TEMPLATE)


def mistral(folder):
    """Every layer attends only to the last 16 tokens."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**SMALL, intermediate_size=96, sliding_window=16)
    return _save(folder, MistralForCausalLM, config, seed=1, pad="<pad>")


def mamba(folder):
    """Keeps a state of fixed size instead of attending to earlier positions."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=8, bos_token_id=1, eos_token_id=2
    )
    return _save(folder, MambaForCausalLM, config, seed=1, pad="<pad>")


def _save(folder, model_class, config, *, seed, pad, bos=False, chat=None):
    import torch

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
    tokenizer = _tokenizer(pad=pad, bos=bos, chat=chat)
    end = _met_token(model, tokenizer)
    if pad is None:
        _swap_tokens(model, end, tokenizer.eos_token_id)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    else:
        # Chat models ship like this: with several end tokens, only one of which the tokenizer knows.
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(*, pad, bos, chat):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(mixed_prompts(20, seed=3), trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token=pad, chat_template=chat
    )


def _met_token(model, tokenizer):
    """Return the token, among those in no prompt, that comes closest to ending half of the outputs midway."""
    import torch

    inputs = [tokenizer(prompt)["input_ids"] for prompt in mixed_prompts()]
    outputs = []
    for ids in inputs:
        new = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        outputs.append(new[0, len(ids) :].tolist())
    used = {token for ids in inputs for token in ids}
    candidates = sorted({token for output in outputs for token in output} - used)
    return min(candidates, key=lambda token: abs(sum(token in output[3:-3] for output in outputs) - len(outputs) / 2))


def _swap_tokens(model, one, other):
    """Exchange the meaning of two tokens; with the output projection tied to the embedding, one table is all."""
    table = model.get_input_embeddings().weight.data
    table[[one, other]] = table[[other, one]]


def adapter(folder, model):
    """A LoRA adapter of rank 4 that changes a Llama's output: its matrices are random, not neutral."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    options = peft.LoraConfig(
        r=4,
        lora_alpha=64,
        target_modules=["q_proj", "o_proj", "up_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    peft.get_peft_model(loaded, options).save_pretrained(folder)
    return folder


def bigram(folder, model):
    """The same Llama with attention and MLP adding nothing: the next token depends on the last token alone."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    silenced = {name: w.zero_() for name, w in weights.items() if "o_proj" in name or "down_proj" in name}
    save_file(weights | silenced, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def eagle_head(folder, model):
    """An EAGLE head for a `bigram` model: it, too, uses only the last token, and so drafts the model's output."""
    import torch
    from safetensors.torch import load_file, save_file

    weights, config = (
        load_file(Path(model) / "model.safetensors"),
        json.loads((Path(model) / "config.json").read_text()),
    )
    layer = "model.layers.0."
    head = {
        name.removeprefix("model."): weight.clone()
        for name, weight in weights.items()
        if name.startswith(layer) and "input_layernorm" not in name
    }
    width = config["hidden_size"]
    head["embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    # The head receives the token and the model's hidden state side by side; it uses only the token.
    head["fc.weight"] = torch.cat([torch.eye(width), torch.zeros(width, width)], dim=1)
    Path(folder).mkdir()
    save_file(head, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    changed = {"num_hidden_layers": 1, "architectures": ["EagleLlamaForCausalLM"]}
    (Path(folder) / "config.json").write_text(json.dumps(config | changed))
    return folder
