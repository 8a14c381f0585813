"""Rules about the vllm backend; `tests/spec/conftest.py` provides the installed vLLM, a build for CPUs."""

from __future__ import annotations

from tests.hosts import bare
from tests.spec.examples.example import EIGHT_BIT, SAMPLED, Example, asks, model, spread, vllm

NGRAM = ("backend.speculative.method=ngram", "backend.speculative.num_speculative_tokens=2")


def lookup(at_least: int, at_most: int) -> str:
    lengths = f"prompt_lookup_min: {at_least}, prompt_lookup_max: {at_most}"
    return f"backend.engine_args={{speculative_config: {{method: ngram, num_speculative_tokens: 2, {lengths}}}}}"


EXAMPLES = [
    Example(
        "pipeline_processes",
        "num_processes",
        vllm("num_processes=2", *spread("tensor", 2)),
        asks("num_processes=2", *spread("tensor", 2)),
    ),
    Example("quantized_by_vllm", "quantization.quantization", vllm(*EIGHT_BIT), vllm("backend.quantization=awq")),
    Example(
        "no_ngram_ban",
        "decoder.no_repeat_ngram_size",
        vllm("decoder.no_repeat_ngram_size=3"),
        asks("decoder.no_repeat_ngram_size=3"),
    ),
    Example(
        "temperature_raised",
        "decoder.temperature",
        vllm(SAMPLED, "decoder.temperature=0.009"),
        vllm(SAMPLED, "decoder.temperature=0.01"),
    ),
    Example("speculation_min_p", "decoder.min_p", vllm(*NGRAM, SAMPLED, "decoder.min_p=0.1"), vllm(*NGRAM, SAMPLED)),
    Example(
        "speculation_incomplete",
        "backend.speculative.model",
        vllm("backend.speculative.method=eagle", "backend.speculative.num_speculative_tokens=2"),
        vllm(*NGRAM),
    ),
    Example(
        "speculation_incomplete",
        "backend.speculative.num_speculative_tokens",
        vllm("backend.speculative.method=ngram"),
        vllm("backend.speculative.method=suffix"),
    ),
    Example(
        "speculation_incomplete",
        "backend.engine_args.speculative_config.prompt_lookup_min",
        vllm(lookup(at_least=5, at_most=4)),
        vllm(lookup(at_least=4, at_most=4)),
    ),
    Example(
        "engine_arg_of_lem",
        "backend.engine_args.max_num_seqs",
        vllm("backend.engine_args={max_num_seqs: 4}"),
        vllm("backend.engine_args={max_logprobs: 4}"),
    ),
    Example(
        "engine_arg_of_lem",
        "backend.engine_args.block_size",
        vllm("backend.engine_args={block_size: 64}"),
        vllm("backend.block_size=64"),
    ),
    Example(
        "engine_arg_of_lem",
        "backend.engine_args.speculative_config",
        vllm(*NGRAM, "backend.engine_args={speculative_config: {method: ngram}}"),
        vllm("backend.engine_args={speculative_config: {method: ngram}}"),
    ),
    Example(
        "engine_arg_of_lem",
        "backend.engine_args.prefill_context_parallel_size",
        vllm("backend.engine_args={prefill_context_parallel_size: 2}"),
        vllm("backend.engine_args={max_logprobs: 4}"),
    ),
    Example(
        "engine_arg_code",
        "backend.engine_args.scheduler_cls",
        vllm("backend.engine_args={scheduler_cls: my.Scheduler}"),
        vllm("trust_remote_code=true", "backend.engine_args={scheduler_cls: my.Scheduler}"),
    ),
    Example(
        "engine_arg_code",
        "backend.engine_args.kv_transfer_config",
        vllm("backend.engine_args={kv_transfer_config: {kv_connector_module_path: mine}}"),
        vllm("backend.engine_args={kv_transfer_config: {kv_connector: OffloadingConnector}}"),
    ),
    Example(
        "engine_arg_code",
        "backend.engine_args.distributed_executor_backend",
        vllm("backend.engine_args={distributed_executor_backend: my.Executor}"),
        vllm("backend.engine_args={distributed_executor_backend: mp}"),
    ),
    Example(
        "engine_arg_code",
        "backend.engine_args.compilation_config",
        vllm("backend.engine_args={compilation_config: {backend: my.compile}}"),
        vllm("backend.engine_args={compilation_config: {backend: inductor}}"),
    ),
    Example(
        "engine_arg_code",
        "backend.engine_args.compilation_config",
        vllm("backend.engine_args={compilation_config: {inductor_passes: {post: my.change}}}"),
        vllm("backend.engine_args={compilation_config: {mode: 3}}"),
    ),
    Example(
        "engine_arg_code",
        "backend.speculative.method",
        vllm("backend.speculative.method=custom_class", "backend.speculative.model=my.Drafter"),
        vllm(*NGRAM),
    ),
    Example(
        "dropped_engine_arg",
        "backend.engine_args.swap_space",
        vllm("backend.engine_args={swap_space: 4}"),
        vllm("backend.engine_args={max_logprobs: 4}"),
    ),
    Example(
        "no_effect_speculation",
        "backend.speculative.prompt_lookup_max",
        vllm("backend.speculative.prompt_lookup_max=3"),
        vllm("backend.speculative.method=ngram", "backend.speculative.prompt_lookup_max=3"),
    ),
    Example("pipeline_needs_gpus", "parallelism.strategy", vllm(*spread("pipeline", 2)), vllm(*spread("tensor", 2))),
    Example(
        "attention_needs_gpu",
        "backend.attention_backend",
        vllm("backend.attention_backend=FLASH_ATTN"),
        vllm("backend.attention_backend=CPU_ATTN"),
    ),
    Example("missing_package", "backend", vllm(host=bare()), vllm()),
    Example(
        "unknown_engine_arg",
        "backend.engine_args.max_logprob",
        vllm("backend.engine_args={max_logprob: 4}"),
        vllm("backend.engine_args={max_logprobs: 4}"),
    ),
    Example(
        "unknown_engine_arg",
        "backend.cpu_offload_gb",
        vllm("backend.cpu_offload_gb=1.0"),
        vllm("backend.block_size=64"),
    ),
    Example(
        "engine_arg_type",
        "backend.engine_args.max_logprobs",
        vllm("backend.engine_args={max_logprobs: five}"),
        vllm('backend.engine_args={max_logprobs: "5"}'),
    ),
    Example(
        "kv_cache_on_cpu",
        "backend.kv_cache_dtype",
        vllm("backend.kv_cache_dtype=fp8"),
        vllm("backend.kv_cache_dtype=bfloat16"),
    ),
    Example(
        "unknown_engine_value",
        "backend.attention_backend",
        vllm("backend.attention_backend=FLASHATTN"),
        vllm("backend.attention_backend=FLASH_ATTN"),
    ),
    Example(
        "unknown_engine_value", "backend.speculative.method", vllm("backend.speculative.method=n-gram"), vllm(*NGRAM)
    ),
    Example(
        "no_room_for_prompts",
        "max_output_tokens",
        vllm("backend.max_model_len=128", model=model(max_position_embeddings=1024)),
        vllm("backend.max_model_len=129", model=model(max_position_embeddings=1024)),
    ),
    Example(
        "too_few_positions",
        "backend.max_model_len",
        vllm("backend.max_model_len=1025", model=model(max_position_embeddings=1024)),
        vllm("backend.max_model_len=1024", model=model(max_position_embeddings=1024)),
    ),
    Example(
        "head_size_on_cpu",
        "model",
        vllm(model=model(hidden_size=64, num_attention_heads=4)),
        vllm(model=model(hidden_size=64, num_attention_heads=2)),
    ),
]
