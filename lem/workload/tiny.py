"""The built-in model `tiny`: a small Llama with random weights, created on first use in the user's cache.

The model's files are always the same, byte for byte. The weights are uniform random numbers from MT19937; numpy
guarantees that this stream never changes. The tokenizer is trained on the prompts that come with lem. The model's text
is meaningless, but the model does as much work as a real model of its size. Creating the model requires neither torch
nor transformers.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lem.errors import ModelError

if TYPE_CHECKING:
    import numpy as np

NAME = "tiny"
# Part of the directory's name; increment it when the files change.
VERSION = 1
SEED = 20_240_601
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

VOCAB, HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 4096, 256, 704, 6, 8, 4, 32
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}


def path() -> Path:
    """Return the model's directory, creating it first if it does not exist.

    Raises:
        ModelError: the directory cannot be created.
    """
    target = cache_dir() / "models" / f"{NAME}-v{VERSION}"
    if not os.path.isdir(target):
        try:
            _make(target)
        except OSError as error:
            raise ModelError(
                f"The model that comes with lem cannot be written to {target} ({error.strerror or error}); "
                "set LEM_CACHE_DIR to a writable directory."
            ) from None
    return target


def cache_dir() -> Path:
    """Return lem's directory in the user's cache, or the directory set by `LEM_CACHE_DIR`.

    Raises:
        ModelError: the user's home directory is unknown.
    """
    import platformdirs

    try:
        return Path(os.environ.get("LEM_CACHE_DIR") or platformdirs.user_cache_dir("lem"))
    except RuntimeError:
        raise ModelError(
            "The model that comes with lem cannot be written, because your home directory is unknown. Set HOME, or set "
            "LEM_CACHE_DIR to a writable directory."
        ) from None


def _make(target: Path) -> None:
    """Write all files to a temporary directory, then rename it, so that two processes can do this at the same time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write_files(scratch)
        scratch.chmod(0o755)
        scratch.rename(target)
    except OSError:
        if not target.is_dir():  # if the target exists now, another process was faster and wrote the same files
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_files(folder: Path) -> None:
    """Write the model's files into a folder."""
    from safetensors.numpy import save_file

    _write_json(folder / "config.json", CONFIG)
    _write_json(folder / "generation_config.json", {k: v for k, v in CONFIG.items() if k.endswith("_token_id")})
    _write_tokenizer(folder)
    save_file(dict(_weights()), folder / "model.safetensors", metadata={"format": "pt"})


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _weights() -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    import numpy as np

    stream = np.random.RandomState(SEED)

    def matrix(rows: int, columns: int) -> np.ndarray[Any, Any]:
        # Uniform with a standard deviation of about 1/16. Subtraction, multiplication and rounding are fixed by
        # IEEE 754, so the bits are the same on every machine; a normal distribution would need log and sqrt.
        return ((stream.random_sample((rows, columns)) - 0.5) * 0.21875).astype(np.float32)

    yield "model.embed_tokens.weight", matrix(VOCAB, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        yield prefix + "self_attn.q_proj.weight", matrix(HEADS * HEAD_DIM, HIDDEN)
        yield prefix + "self_attn.k_proj.weight", matrix(KV_HEADS * HEAD_DIM, HIDDEN)
        yield prefix + "self_attn.v_proj.weight", matrix(KV_HEADS * HEAD_DIM, HIDDEN)
        yield prefix + "self_attn.o_proj.weight", matrix(HIDDEN, HEADS * HEAD_DIM)
        yield prefix + "mlp.gate_proj.weight", matrix(INTERMEDIATE, HIDDEN)
        yield prefix + "mlp.up_proj.weight", matrix(INTERMEDIATE, HIDDEN)
        yield prefix + "mlp.down_proj.weight", matrix(HIDDEN, INTERMEDIATE)
        yield prefix + "input_layernorm.weight", np.ones(HIDDEN, np.float32)
        yield prefix + "post_attention_layernorm.weight", np.ones(HIDDEN, np.float32)
    yield "model.norm.weight", np.ones(HIDDEN, np.float32)
    yield "lm_head.weight", matrix(VOCAB, HIDDEN)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from lem.workload import builtin

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["text"] for row in builtin.read("builtin:sample")), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "<pad>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "model_max_length": CONFIG["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
