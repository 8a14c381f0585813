"""The options of each backend: one dataclass each, the source of the backend group."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lem.spec.fields import config


# ------------------------------------------------------------------ engines of lem's own processes
@config
class PytorchBackend:
    """transformers' `generate` on PyTorch, in the worker process."""

    # Whether one process runs a tensor-parallel model on all of its GPUs.
    spreads_a_model_itself: ClassVar[bool] = False

    name: Annotated[Literal["pytorch"], Field(description="Inference backend.")] = "pytorch"
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Field(description="Device to run on; auto is the first visible CUDA GPU, else the CPU."),
    ] = "auto"
    attn_implementation: Annotated[
        Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"],
        Field(description="Attention kernel; auto lets transformers choose for the model."),
    ] = "auto"
    cache_implementation: Annotated[
        Literal["dynamic", "static", "none"],
        Field(description="Key/value cache: growing, preallocated, or none (every step recomputes everything)."),
    ] = "dynamic"
    torch_compile: Annotated[
        bool, Field(description="Compile the model's forward pass with torch.compile, at the cost of a longer warm-up.")
    ] = False
    torch_compile_mode: Annotated[
        Literal["default", "reduce-overhead", "max-autotune"],
        Field(description="Mode of torch.compile; used only when torch_compile is true."),
    ] = "default"


@config
class SimulatedBackend:
    """A stand-in engine with exactly known times, for trying out grids and for tests. No model runs."""

    spreads_a_model_itself: ClassVar[bool] = False

    name: Annotated[Literal["simulated"], Field(description="Inference backend.")] = "simulated"
    prefill_s_per_token: Annotated[float, Field(ge=0, le=3600, description="Seconds per input token.")] = 1e-5
    decode_s_per_token: Annotated[float, Field(ge=0, le=3600, description="Seconds per decode step of a batch.")] = 1e-4
    gpus: Annotated[
        int, Field(ge=0, le=1024, description="Number of visible GPUs to meter, although nothing runs on them.")
    ] = 0
    fail_at_request: Annotated[
        int | None, Field(ge=0, description="Fail on reaching the batch that holds this request; null: never.")
    ] = None


# ------------------------------------------------------------------ vLLM
@config
class VllmSpeculation:
    """Speculative decoding: a cheap method drafts tokens, and the model checks several of them in one step."""

    method: Annotated[
        str | None,
        Field(
            min_length=1,
            description="How tokens are drafted: ngram, draft_model, eagle, eagle3, medusa, suffix, …; null is off, or "
            "vLLM's choice when a model is given.",
        ),
    ] = None
    model: Annotated[
        str | None, Field(min_length=1, description="Draft model or head: a hub id or a local directory.")
    ] = None
    num_speculative_tokens: Annotated[int | None, Field(ge=1, description="Tokens drafted for each step.")] = None
    prompt_lookup_max: Annotated[
        int | None, Field(ge=1, description="Longest n-gram that ngram looks for in the text so far.")
    ] = None
    prompt_lookup_min: Annotated[
        int | None, Field(ge=1, description="Shortest n-gram that ngram looks for in the text so far.")
    ] = None
    draft_tensor_parallel_size: Annotated[
        int | None, Field(ge=1, description="Number of GPUs that each layer of the draft model is split over.")
    ] = None


@config
class VllmBackend:
    """vLLM's engine, in the worker process. Null leaves an option at vLLM's own default."""

    spreads_a_model_itself: ClassVar[bool] = True

    name: Annotated[Literal["vllm"], Field(description="Inference backend.")] = "vllm"
    max_model_len: Annotated[
        int | None, Field(ge=1, description="Maximum number of tokens of a prompt and its output together.")
    ] = None
    max_num_batched_tokens: Annotated[
        int | None, Field(ge=1, description="Maximum number of tokens that the engine processes in one step.")
    ] = None
    gpu_memory_utilization: Annotated[
        float | None,
        Field(gt=0, le=1, description="Fraction of a GPU's memory that vLLM uses (on a CPU: of main memory)."),
    ] = None
    kv_cache_memory_bytes: Annotated[
        int | None, Field(ge=1, description="Size of each GPU's key/value cache, overriding gpu_memory_utilization.")
    ] = None
    kv_cache_dtype: Annotated[
        str | None, Field(min_length=1, description="Dtype of the key/value cache: auto, bfloat16, fp8, …")
    ] = None
    block_size: Annotated[int | None, Field(ge=1, description="Tokens in a block of the key/value cache.")] = None
    enable_prefix_caching: Annotated[
        bool | None, Field(description="Reuse keys and values of prompts with a common beginning.")
    ] = None
    enable_chunked_prefill: Annotated[
        bool | None, Field(description="Process long prompts in pieces, alongside the decoding of others.")
    ] = None
    enforce_eager: Annotated[bool | None, Field(description="Neither compile the model nor capture CUDA graphs.")] = (
        None
    )
    attention_backend: Annotated[
        str | None, Field(min_length=1, description="Attention kernels: FLASH_ATTN, FLASHINFER, TRITON_ATTN, …")
    ] = None
    quantization: Annotated[
        str | None, Field(min_length=1, description="Quantization method of the weights: awq, gptq, fp8, …")
    ] = None
    load_format: Annotated[
        str | None, Field(min_length=1, description="Format of the weights: auto, safetensors, dummy (random), …")
    ] = None
    cpu_offload_gb: Annotated[
        float | None, Field(ge=0, description="Amount of each GPU's weights to keep in main memory, in GiB.")
    ] = None
    speculative: VllmSpeculation = field(default_factory=VllmSpeculation)
    engine_args: Annotated[
        dict[str, Any] | None,
        Field(description="Other arguments of vLLM's EngineArgs by name: {max_logprobs: 5}."),
    ] = None


# ------------------------------------------------------------------ TensorRT-LLM
@config
class TensorrtKvCache:
    """The key/value cache: options of TensorRT-LLM's KvCacheConfig."""

    free_gpu_memory_fraction: Annotated[
        float | None,
        Field(gt=0, le=1, description="Fraction of the GPU memory left after loading that the cache takes."),
    ] = None
    max_tokens: Annotated[int | None, Field(ge=1, description="Maximum number of tokens in the cache.")] = None
    dtype: Annotated[str | None, Field(min_length=1, description="Dtype of keys and values: auto, fp8, nvfp4, …")] = (
        None
    )
    tokens_per_block: Annotated[int | None, Field(ge=1, description="Tokens in a block of the cache.")] = None
    enable_block_reuse: Annotated[
        bool | None, Field(description="Reuse keys and values of prompts with a common beginning.")
    ] = None
    host_cache_size: Annotated[
        int | None, Field(ge=0, description="Main memory for blocks that do not fit on a GPU, in bytes.")
    ] = None


@config
class TensorrtScheduler:
    """Which requests run concurrently: options of TensorRT-LLM's SchedulerConfig."""

    capacity_scheduler_policy: Annotated[
        str | None,
        Field(
            min_length=1, description="How requests are admitted: GUARANTEED_NO_EVICT, MAX_UTILIZATION, STATIC_BATCH."
        ),
    ] = None
    context_chunking_policy: Annotated[
        str | None,
        Field(
            min_length=1, description="Order of the pieces of long prompts: FIRST_COME_FIRST_SERVED, EQUAL_PROGRESS."
        ),
    ] = None


@config
class TensorrtSpeculation:
    """Speculative decoding: a cheap method drafts tokens, and the model checks several of them in one step."""

    decoding_type: Annotated[
        str | None,
        Field(min_length=1, description="How tokens are drafted: NGram, Draft_Target, Eagle3, MTP, …; null is off."),
    ] = None
    speculative_model: Annotated[
        str | None, Field(min_length=1, description="Draft model or head: a hub id or a local directory.")
    ] = None
    max_draft_len: Annotated[int | None, Field(ge=1, description="Maximum number of tokens drafted for each step.")] = (
        None
    )
    max_matching_ngram_size: Annotated[
        int | None, Field(ge=1, description="Longest n-gram that NGram looks for in the text so far.")
    ] = None


@config
class TensorrtBackend:
    """TensorRT-LLM's LLM API with the PyTorch flow. Null leaves an option at TensorRT-LLM's own default."""

    spreads_a_model_itself: ClassVar[bool] = True

    name: Annotated[Literal["tensorrt"], Field(description="Inference backend.")] = "tensorrt"
    max_seq_len: Annotated[
        int | None, Field(ge=1, description="Maximum number of tokens of a prompt and its output together.")
    ] = None
    max_num_tokens: Annotated[
        int | None, Field(ge=1, description="Maximum number of tokens that the engine processes in one step.")
    ] = None
    attn_backend: Annotated[
        str | None, Field(min_length=1, description="Attention kernels: TRTLLM, FLASHINFER, VANILLA.")
    ] = None
    chunked_prefill: Annotated[
        bool | None, Field(description="Process long prompts in pieces, alongside the decoding of others.")
    ] = None
    overlap_scheduler: Annotated[
        bool | None, Field(description="Prepare a step on the CPU while the GPU computes the previous one.")
    ] = None
    cuda_graphs: Annotated[bool | None, Field(description="Capture decode steps as CUDA graphs while loading.")] = None
    force_dynamic_quantization: Annotated[
        bool | None, Field(description="Compute activation scales at each step instead of using the checkpoint's.")
    ] = None
    moe_expert_parallel_size: Annotated[
        int | None, Field(ge=1, description="Number of tensor_parallel GPUs that a layer's experts are split over.")
    ] = None
    kv_cache: TensorrtKvCache = field(default_factory=TensorrtKvCache)
    scheduler: TensorrtScheduler = field(default_factory=TensorrtScheduler)
    speculative: TensorrtSpeculation = field(default_factory=TensorrtSpeculation)
    extra_args: Annotated[
        dict[str, Any] | None,
        Field(description="Other arguments of TensorRT-LLM's LLM by name: {stream_interval: 4}."),
    ] = None


# ------------------------------------------------------------------ servers
@config
class OpenaiBackend:
    """A server that speaks OpenAI's protocol: one that is already running, or one that lem starts for the run."""

    # One process sends all requests; the server spreads the model.
    spreads_a_model_itself: ClassVar[bool] = True

    name: Annotated[Literal["openai"], Field(description="Inference backend.")] = "openai"
    url: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Address of the server (http://127.0.0.1:8000); null: a free local port, for command to use.",
        ),
    ] = None
    command: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Starts the server, without a shell; it ends with the run. {model}, {port}, {host}, "
            "{revision}, {dtype}, {seed}, {batch_size} and {degree} are filled in: vllm serve {model} --port {port}. "
            "null: it is already running.",
        ),
    ] = None
    model_name: Annotated[
        str | None,
        Field(min_length=1, description="The model's name on the server; null: the server's only model, else model."),
    ] = None
    dialect: Annotated[
        Literal["vllm", "openai"],
        Field(
            description="Fields of a request that the server knows: vllm's (top_k, min_p, end tokens, token ids, …) or "
            "only OpenAI's."
        ),
    ] = "vllm"
    prompts: Annotated[
        Literal["ids", "text"],
        Field(
            description="How prompts are sent: as token ids, or as text, for a server that refuses ids and adds the "
            "same special tokens."
        ),
    ] = "ids"
    count: Annotated[
        Literal["server", "tokenizer"],
        Field(
            description="Who counts output tokens: the server, or lem, by the model's tokenizer from the text, for a "
            "server that reports no counts."
        ),
    ] = "server"
    device: Annotated[
        Literal["auto", "cpu", "remote"],
        Field(
            description="Where the model runs; auto: on this machine's GPUs, else its CPU, if the address is local or "
            "lem starts the server, and otherwise on another machine."
        ),
    ] = "auto"
    extra_body: Annotated[
        dict[str, Any] | None, Field(description="Other fields of a request by name: {priority: 1}.")
    ] = None
    api_key_env: Annotated[
        str, Field(min_length=1, description="Environment variable that holds the server's API key, if it needs one.")
    ] = "OPENAI_API_KEY"
    start_timeout_s: Annotated[
        float, Field(gt=0, le=86_400, description="Seconds within which a server started by lem must become ready.")
    ] = 900.0
    timeout_s: Annotated[
        float, Field(gt=0, le=86_400, description="Seconds that the server may be silent within a response.")
    ] = 600.0
    max_errors: Annotated[
        float,
        Field(
            ge=0,
            description="Requests of a cycle that may fail; one more ends the run. A number, or below 1 a share of the "
            "cycle's requests.",
        ),
    ] = 0.0


Backend = Annotated[
    PytorchBackend | SimulatedBackend | VllmBackend | TensorrtBackend | OpenaiBackend, Field(discriminator="name")
]
BACKENDS: dict[str, type[Any]] = {
    "pytorch": PytorchBackend,
    "simulated": SimulatedBackend,
    "vllm": VllmBackend,
    "tensorrt": TensorrtBackend,
    "openai": OpenaiBackend,
}
