"""Rules about the pytorch backend: batching, attention, compilation, tensor parallelism."""

from __future__ import annotations

from tests.hosts import A100, H100, ONE, P100, T4, TWO, V100, bare, machine
from tests.spec.examples.example import CONTINUOUS, EIGHT_BIT, ON_CPU, Example, asks, model, spread

FLASH_2 = "backend.attn_implementation=flash_attention_2"
FLASH_3 = "backend.attn_implementation=flash_attention_3"

EXAMPLES = [
    Example(
        "no_continuous_batching",
        "backend.attn_implementation",
        asks("backend.attn_implementation=flex_attention", CONTINUOUS),
        asks("backend.attn_implementation=eager", CONTINUOUS),
    ),
    Example(
        "no_continuous_batching",
        "backend.cache_implementation",
        asks("backend.cache_implementation=static", CONTINUOUS),
        asks("backend.cache_implementation=static"),
    ),
    Example(
        "no_continuous_batching",
        "backend.torch_compile",
        asks("backend.torch_compile=true", CONTINUOUS),
        asks("backend.torch_compile=true"),
    ),
    Example(
        "no_continuous_batching",
        "parallelism.strategy",
        asks(CONTINUOUS, *spread("tensor", 2), host=TWO),
        asks(CONTINUOUS, *spread("data", 2), host=TWO),
    ),
    Example(
        "tensor_parallel_quantized",
        "quantization.quantization",
        asks(*spread("tensor", 2), *EIGHT_BIT, host=TWO),
        asks(*spread("pipeline", 2), *EIGHT_BIT, host=TWO),
    ),
    Example(
        "attention_float32",
        "backend.attn_implementation",
        asks("fp_precision=float32", FLASH_2, host=ONE),
        asks("fp_precision=float16", FLASH_2, host=ONE),
    ),
    Example(
        "attention_float32",
        "backend.attn_implementation",
        asks(FLASH_2, host=ONE, model=model(dtype="float32")),
        asks(FLASH_2, host=ONE, model=model(torch_dtype="bfloat16")),
    ),
    Example(
        "no_effect_compile_mode",
        "backend.torch_compile_mode",
        asks("backend.torch_compile_mode=max-autotune"),
        asks("backend.torch_compile=true", "backend.torch_compile_mode=max-autotune"),
    ),
    Example(
        "no_cache",
        "backend.cache_implementation",
        asks("backend.cache_implementation=none"),
        asks("backend.cache_implementation=static"),
    ),
    Example("no_gpu", "backend.device", asks("backend.device=cuda"), asks()),
    Example(
        "tensor_parallel_beside_gpus",
        "backend.device",
        asks(ON_CPU, *spread("tensor", 2), host=TWO),
        asks(ON_CPU, *spread("tensor", 2)),
    ),
    Example(
        "attention_needs_gpu", "backend.attn_implementation", asks(FLASH_2), asks("backend.attn_implementation=sdpa")
    ),
    Example(
        "attention_unsupported",
        "backend.attn_implementation",
        asks(FLASH_2, host=machine(T4)),
        asks(FLASH_2, host=machine(A100)),
    ),
    Example(
        "attention_unsupported",
        "backend.attn_implementation",
        asks(FLASH_3, host=machine(A100)),
        asks(FLASH_3, host=machine(H100)),
    ),
    Example(
        "attention_unsupported",
        "backend.attn_implementation",
        asks("gpus=[1]", FLASH_2, host=machine(H100, T4)),
        asks("gpus=[0]", FLASH_2, host=machine(H100, T4)),
    ),
    Example(
        "compile_unsupported",
        "backend.torch_compile",
        asks("backend.torch_compile=true", host=machine(P100)),
        asks("backend.torch_compile=true", host=machine(V100)),
    ),
    Example("missing_package", "backend.attn_implementation", asks(FLASH_2, host=bare(H100)), asks(FLASH_2, host=ONE)),
    Example(
        "continuous_unavailable",
        "batching.strategy",
        asks(CONTINUOUS, model=model(model_type="mamba")),
        asks(CONTINUOUS, model=model(model_type="llama")),
    ),
    Example(
        "continuous_unavailable",
        "batching.strategy",
        asks(CONTINUOUS, model=model(layer_types=["linear_attention", "full_attention"])),
        asks(CONTINUOUS, model=model(layer_types=["sliding_attention", "full_attention"])),
    ),
    Example(
        "tensor_parallel_unsplittable",
        "parallelism.strategy",
        asks(*spread("tensor", 3), model=model("templated")),
        asks(*spread("tensor", 2), model=model("templated")),
    ),
]
