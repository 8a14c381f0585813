"""Rules about the tensorrt backend; `tests/spec/conftest.py` provides the installed TensorRT-LLM."""

from __future__ import annotations

from tests.hosts import CPU, H100, TWO, bare
from tests.spec.examples.example import EIGHT_BIT, SAMPLED, Example, model, spread, tensorrt

NGRAM = ("backend.speculative.decoding_type=NGram", "backend.speculative.max_draft_len=2")

EXAMPLES = [
    Example("quantized_by_tensorrt", "quantization.quantization", tensorrt(*EIGHT_BIT), tensorrt()),
    Example(
        "speculation_ngram_ban",
        "decoder.no_repeat_ngram_size",
        tensorrt(*NGRAM, "decoder.no_repeat_ngram_size=3"),
        tensorrt("decoder.no_repeat_ngram_size=3"),
    ),
    Example(
        "speculation_ngram_ban",
        "decoder.no_repeat_ngram_size",
        tensorrt(
            "backend.extra_args={speculative_config: {decoding_type: MTP, max_draft_len: 1}}",
            "decoder.no_repeat_ngram_size=3",
        ),
        tensorrt("backend.extra_args={stream_interval: 2}", "decoder.no_repeat_ngram_size=3"),
    ),
    Example(
        "engine_arg_of_lem",
        "backend.extra_args.dtype",
        tensorrt("backend.extra_args={dtype: bfloat16}"),
        tensorrt("backend.extra_args={stream_interval: 2}"),
    ),
    Example(
        "engine_arg_of_lem",
        "backend.extra_args.enable_chunked_prefill",
        tensorrt("backend.extra_args={enable_chunked_prefill: true}"),
        tensorrt("backend.chunked_prefill=true"),
    ),
    Example(
        "engine_arg_of_lem",
        "backend.extra_args.kv_cache_config.dtype",
        tensorrt("backend.extra_args={kv_cache_config: {dtype: fp8}}"),
        tensorrt("backend.extra_args={kv_cache_config: {use_uvm: true}}"),
    ),
    Example(
        "engine_arg_code",
        "backend.extra_args.kv_connector_config",
        tensorrt("backend.extra_args={kv_connector_config: {connector_module: mine}}"),
        tensorrt("trust_remote_code=true", "backend.extra_args={kv_connector_config: {connector_module: mine}}"),
    ),
    Example(
        "engine_arg_code",
        "backend.extra_args.ray_worker_extension_cls",
        tensorrt("backend.extra_args={ray_worker_extension_cls: my.Extension}"),
        tensorrt("backend.extra_args={orchestrator_type: ray}"),
    ),
    Example(
        "dropped_engine_arg",
        "backend.extra_args.use_cuda_graph",
        tensorrt("backend.extra_args={use_cuda_graph: true}"),
        tensorrt("backend.cuda_graphs=true"),
    ),
    Example(
        "no_effect_speculation",
        "backend.speculative.max_draft_len",
        tensorrt("backend.speculative.max_draft_len=2"),
        tensorrt(*NGRAM),
    ),
    Example("seeds_of_batches", "seed", tensorrt(SAMPLED, "batching.batch_size=2"), tensorrt(SAMPLED)),
    Example("no_gpu", "backend", tensorrt(host=CPU), tensorrt()),
    Example(
        "too_few_gpus", "parallelism.degree", tensorrt(*spread("tensor", 2)), tensorrt(*spread("tensor", 2), host=TWO)
    ),
    Example("missing_package", "backend", tensorrt(host=bare(H100)), tensorrt()),
    Example(
        "unknown_engine_arg",
        "backend.speculative.max_matching_ngram_size",
        tensorrt(
            "backend.speculative.decoding_type=MTP",
            "backend.speculative.max_draft_len=1",
            "backend.speculative.max_matching_ngram_size=2",
        ),
        tensorrt(
            "backend.speculative.decoding_type=NGram",
            "backend.speculative.max_draft_len=1",
            "backend.speculative.max_matching_ngram_size=2",
        ),
    ),
    Example(
        "unknown_engine_arg",
        "backend.extra_args.stream_intervall",
        tensorrt("backend.extra_args={stream_intervall: 2}"),
        tensorrt("backend.extra_args={stream_interval: 2}"),
    ),
    Example(
        "unknown_engine_arg",
        "backend.extra_args.moe_config.backends",
        tensorrt("backend.extra_args={moe_config: {backends: TRTLLM}}"),
        tensorrt("backend.extra_args={moe_config: {backend: TRTLLM}}"),
    ),
    Example(
        "unknown_engine_arg",
        "backend.force_dynamic_quantization",
        tensorrt("backend.force_dynamic_quantization=true"),
        tensorrt("backend.overlap_scheduler=false"),
    ),
    Example(
        "unknown_engine_arg",
        "backend.kv_cache.host_cache_size",
        tensorrt("backend.kv_cache.host_cache_size=1"),
        tensorrt("backend.kv_cache.max_tokens=1"),
    ),
    Example(
        "sampler_ignores",
        "decoder.repetition_penalty",
        tensorrt("decoder.repetition_penalty=1.2"),
        tensorrt("decoder.no_repeat_ngram_size=3"),
    ),
    Example("sampler_ignores", "min_output_tokens", tensorrt("min_output_tokens=1"), tensorrt()),
    Example(
        "unknown_engine_value",
        "backend.speculative.decoding_type",
        tensorrt("backend.speculative.decoding_type=Ngramm"),
        tensorrt(*NGRAM),
    ),
    Example(
        "unknown_engine_value",
        "backend.scheduler.capacity_scheduler_policy",
        tensorrt("backend.scheduler.capacity_scheduler_policy=NO_EVICT"),
        tensorrt("backend.scheduler.capacity_scheduler_policy=STATIC_BATCH"),
    ),
    Example(
        "unknown_engine_value",
        "backend.extra_args.allreduce_strategy",
        tensorrt("backend.extra_args={allreduce_strategy: NCLC}"),
        tensorrt("backend.extra_args={allreduce_strategy: NCCL}"),
    ),
    Example(
        "prefixes_not_forgotten",
        "backend.kv_cache.enable_block_reuse",
        tensorrt(),
        tensorrt("backend.kv_cache.enable_block_reuse=false"),
    ),
    Example(
        "too_few_positions",
        "backend.max_seq_len",
        tensorrt("backend.max_seq_len=1025", model=model(max_position_embeddings=1024)),
        tensorrt("backend.max_seq_len=1024", model=model(max_position_embeddings=1024)),
    ),
    Example("float32_on_tensorrt", "fp_precision", tensorrt("fp_precision=float32"), tensorrt("fp_precision=bfloat16")),
    Example(
        "float32_on_tensorrt",
        "fp_precision",
        tensorrt(model=model(dtype="float32")),
        tensorrt("fp_precision=float16", model=model(dtype="float32")),
    ),
    Example(
        "one_end_token_held_off",
        "min_output_tokens",
        tensorrt("min_output_tokens=1", model=model("several-ends")),
        tensorrt(model=model("several-ends")),
    ),
]
