"""The options of each backend, one dataclass per backend: the source of the `backend` config group."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lem.spec.fields import config


# ------------------------------------------------------------------ engines of lem's own processes
@config
class PytorchBackend:
    """transformers' `generate` on PyTorch, in the worker process."""

    # Whether a single process runs a tensor-parallel model on all of its GPUs.
    spreads_a_model_itself: ClassVar[bool] = False

    name: Annotated[Literal["pytorch"], Field(description="Inference backend.")] = "pytorch"
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Field(description="Device to run on; auto: the first visible CUDA GPU, or the CPU if no GPU is visible."),
    ] = "auto"
    attn_implementation: Annotated[
        Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"],
        Field(description="Attention kernel; auto lets transformers choose for the model."),
    ] = "auto"
    cache_implementation: Annotated[
        Literal["dynamic", "static", "none"],
        Field(
            description="Key/value cache: dynamic (growing), static (preallocated), or none (every step recomputes "
            "the whole sequence)."
        ),
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
    """A simulated engine for tests and for trying out grids: no model runs, and all times are known exactly.

    To imitate a real machine, the times can vary by known amounts. `noise`, `drift` and `carry_over` multiply all times
    of an experiment by the same factor; `request_noise` multiplies the times of each request by a further factor.
    """

    spreads_a_model_itself: ClassVar[bool] = False

    name: Annotated[Literal["simulated"], Field(description="Inference backend.")] = "simulated"
    prefill_s_per_token: Annotated[float, Field(ge=0, le=3600, description="Seconds per input token.")] = 1e-5
    decode_s_per_token: Annotated[float, Field(ge=0, le=3600, description="Seconds per decode step of a batch.")] = 1e-4
    gpus: Annotated[
        int, Field(ge=0, le=1024, description="Number of visible GPUs to meter, although nothing runs on them.")
    ] = 0
    fail_at_request: Annotated[
        int | None, Field(ge=0, description="Fail on reaching the batch that contains this request; null: never.")
    ] = None
    noise: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Noise between experiments. All times of an experiment are multiplied by a random log-normal "
            "factor with median 1 and this relative standard deviation. The factor depends on the seed and, in a "
            "campaign, on the campaign, arm and cycle.",
        ),
    ] = 0.0
    request_noise: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Noise between requests. The times of each request are multiplied by a further random "
            "log-normal factor with median 1 and this relative standard deviation. The factor depends on the position "
            "of the request's prompt, on the seed and, in a campaign, on the campaign, arm and cycle. The time of a "
            "decode step is multiplied by the mean factor of its requests.",
        ),
    ] = 0.0
    drift: Annotated[
        float,
        Field(
            gt=-1,
            le=10,
            description="Relative change of all times from the first to the last planned cell of a campaign; the "
            "factor from each cell to the next is constant. Only in a campaign.",
        ),
    ] = 0.0
    carry_over: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="How strongly a campaign's cell depends on the cell before it: all times are multiplied by "
            "(the previous cell's decode_s_per_token / this cell's decode_s_per_token) ** carry_over. Only in a "
            "campaign; no effect after a cell that is not simulated, or if either decode_s_per_token is 0.",
        ),
    ] = 0.0
    sleep: Annotated[
        bool,
        Field(
            description="Sleep for as long as the work would take; false: do not sleep, but record the simulated times "
            "as if they had passed. false requires one process and energy=simulated, replay or none."
        ),
    ] = True


# ------------------------------------------------------------------ vLLM
@config
class VllmSpeculation:
    """Speculative decoding: a cheap method drafts tokens, and the model checks several of them in one step."""

    method: Annotated[
        str | None,
        Field(
            min_length=1,
            description="How tokens are drafted: ngram, draft_model, eagle, eagle3, medusa, suffix, …; null: off, or "
            "vLLM's choice if a draft model is given.",
        ),
    ] = None
    model: Annotated[
        str | None, Field(min_length=1, description="Draft model or head: a hub id or a local directory.")
    ] = None
    num_speculative_tokens: Annotated[int | None, Field(ge=1, description="Number of tokens drafted per step.")] = None
    prompt_lookup_max: Annotated[
        int | None, Field(ge=1, description="Longest n-gram that the ngram method looks up in the text so far.")
    ] = None
    prompt_lookup_min: Annotated[
        int | None, Field(ge=1, description="Shortest n-gram that the ngram method looks up in the text so far.")
    ] = None
    draft_tensor_parallel_size: Annotated[
        int | None, Field(ge=1, description="Number of GPUs that each layer of the draft model is split over.")
    ] = None


@config
class VllmBackend:
    """vLLM's engine, in the worker process. An option set to null keeps vLLM's own default."""

    spreads_a_model_itself: ClassVar[bool] = True

    name: Annotated[Literal["vllm"], Field(description="Inference backend.")] = "vllm"
    max_model_len: Annotated[
        int | None, Field(ge=1, description="Maximum length of a sequence (prompt and output together), in tokens.")
    ] = None
    max_num_batched_tokens: Annotated[
        int | None, Field(ge=1, description="Maximum number of tokens that the engine processes in one step.")
    ] = None
    gpu_memory_utilization: Annotated[
        float | None,
        Field(gt=0, le=1, description="Fraction of a GPU's memory that vLLM uses (on a CPU: of main memory)."),
    ] = None
    kv_cache_memory_bytes: Annotated[
        int | None,
        Field(ge=1, description="Size of each GPU's key/value cache in bytes; overrides gpu_memory_utilization."),
    ] = None
    kv_cache_dtype: Annotated[
        str | None, Field(min_length=1, description="Dtype of the key/value cache: auto, bfloat16, fp8, …")
    ] = None
    block_size: Annotated[int | None, Field(ge=1, description="Number of tokens per block of the key/value cache.")] = (
        None
    )
    enable_prefix_caching: Annotated[
        bool | None, Field(description="Reuse the cached keys and values of prefixes that prompts have in common.")
    ] = None
    enable_chunked_prefill: Annotated[
        bool | None, Field(description="Process long prompts in chunks, while other requests are decoding.")
    ] = None
    enforce_eager: Annotated[
        bool | None, Field(description="Run the model without compiling it or capturing CUDA graphs.")
    ] = None
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
        Field(description="Other arguments of vLLM's EngineArgs, by name: {max_logprobs: 5}."),
    ] = None


# ------------------------------------------------------------------ TensorRT-LLM
@config
class TensorrtKvCache:
    """Options of the key/value cache, passed to TensorRT-LLM's KvCacheConfig."""

    free_gpu_memory_fraction: Annotated[
        float | None,
        Field(
            gt=0, le=1, description="For the cache: fraction of the GPU memory that is free after the model is loaded."
        ),
    ] = None
    max_tokens: Annotated[int | None, Field(ge=1, description="Maximum number of tokens in the cache.")] = None
    dtype: Annotated[str | None, Field(min_length=1, description="Dtype of keys and values: auto, fp8, nvfp4, …")] = (
        None
    )
    tokens_per_block: Annotated[int | None, Field(ge=1, description="Number of tokens per block of the cache.")] = None
    enable_block_reuse: Annotated[
        bool | None, Field(description="Reuse the cached keys and values of prefixes that prompts have in common.")
    ] = None
    host_cache_size: Annotated[
        int | None, Field(ge=0, description="Bytes of main memory for blocks that do not fit into GPU memory.")
    ] = None


@config
class TensorrtScheduler:
    """Options for choosing which requests run concurrently, passed to TensorRT-LLM's SchedulerConfig."""

    capacity_scheduler_policy: Annotated[
        str | None,
        Field(
            min_length=1, description="How requests are admitted: GUARANTEED_NO_EVICT, MAX_UTILIZATION, STATIC_BATCH."
        ),
    ] = None
    context_chunking_policy: Annotated[
        str | None,
        Field(
            min_length=1, description="Order of the chunks of long prompts: FIRST_COME_FIRST_SERVED, EQUAL_PROGRESS."
        ),
    ] = None


@config
class TensorrtSpeculation:
    """Speculative decoding: a cheap method drafts tokens, and the model checks several of them in one step."""

    decoding_type: Annotated[
        str | None,
        Field(min_length=1, description="How tokens are drafted: NGram, Draft_Target, Eagle3, MTP, …; null: off."),
    ] = None
    speculative_model: Annotated[
        str | None, Field(min_length=1, description="Draft model or head: a hub id or a local directory.")
    ] = None
    max_draft_len: Annotated[int | None, Field(ge=1, description="Maximum number of tokens drafted per step.")] = None
    max_matching_ngram_size: Annotated[
        int | None, Field(ge=1, description="Longest n-gram that the NGram method looks up in the text so far.")
    ] = None


@config
class TensorrtBackend:
    """TensorRT-LLM's LLM API with its PyTorch backend. An option set to null keeps TensorRT-LLM's own default."""

    spreads_a_model_itself: ClassVar[bool] = True

    name: Annotated[Literal["tensorrt"], Field(description="Inference backend.")] = "tensorrt"
    max_seq_len: Annotated[
        int | None, Field(ge=1, description="Maximum length of a sequence (prompt and output together), in tokens.")
    ] = None
    max_num_tokens: Annotated[
        int | None, Field(ge=1, description="Maximum number of tokens that the engine processes in one step.")
    ] = None
    attn_backend: Annotated[
        str | None, Field(min_length=1, description="Attention kernels: TRTLLM, FLASHINFER, VANILLA.")
    ] = None
    chunked_prefill: Annotated[
        bool | None, Field(description="Process long prompts in chunks, while other requests are decoding.")
    ] = None
    overlap_scheduler: Annotated[
        bool | None, Field(description="Prepare each step on the CPU while the GPU computes the previous step.")
    ] = None
    cuda_graphs: Annotated[bool | None, Field(description="Capture decode steps as CUDA graphs while loading.")] = None
    force_dynamic_quantization: Annotated[
        bool | None,
        Field(description="Compute activation scales at every step instead of using the checkpoint's scales."),
    ] = None
    moe_expert_parallel_size: Annotated[
        int | None, Field(ge=1, description="Number of tensor-parallel GPUs over which a layer's experts are split.")
    ] = None
    kv_cache: TensorrtKvCache = field(default_factory=TensorrtKvCache)
    scheduler: TensorrtScheduler = field(default_factory=TensorrtScheduler)
    speculative: TensorrtSpeculation = field(default_factory=TensorrtSpeculation)
    extra_args: Annotated[
        dict[str, Any] | None,
        Field(description="Other arguments of TensorRT-LLM's LLM class, by name: {stream_interval: 4}."),
    ] = None


# ------------------------------------------------------------------ servers
@config
class OpenaiBackend:
    """A server that speaks OpenAI's protocol: one that is already running, or one that lem starts for the run."""

    # One process sends all requests; the server itself spreads the model over its GPUs.
    spreads_a_model_itself: ClassVar[bool] = True

    name: Annotated[Literal["openai"], Field(description="Inference backend.")] = "openai"
    url: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Address of the server (http://127.0.0.1:8000); null: a free local port, on which lem starts "
            "the server with command.",
        ),
    ] = None
    command: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Command that starts the server; it is run without a shell, and the server is stopped after "
            "the run. {model}, {port}, {host}, {revision}, {dtype}, {seed}, {batch_size} and {degree} are replaced by "
            "their values, as in vllm serve {model} --port {port}. null: the server is already running.",
        ),
    ] = None
    model_name: Annotated[
        str | None,
        Field(
            min_length=1,
            description="The model's name on the server; null: the server's model if it has only one, otherwise the "
            "value of model.",
        ),
    ] = None
    dialect: Annotated[
        Literal["vllm", "openai"],
        Field(
            description="Request fields that the server understands: vllm's (top_k, min_p, end tokens, token ids, "
            "…) or only OpenAI's."
        ),
    ] = "vllm"
    prompts: Annotated[
        Literal["ids", "text"],
        Field(
            description="How prompts are sent: as token ids, or as text for a server that refuses ids. With text, the "
            "server must add the same special tokens as the tokenizer."
        ),
    ] = "ids"
    count: Annotated[
        Literal["server", "tokenizer"],
        Field(
            description="Who counts output tokens: the server, or lem with the model's tokenizer (for a server that "
            "reports no counts)."
        ),
    ] = "server"
    device: Annotated[
        Literal["auto", "cpu", "remote"],
        Field(
            description="Where the model runs. auto: if the address is local or lem starts the server, on this "
            "machine (on its GPUs if any are visible, otherwise on its CPU); for any other address, on another machine."
        ),
    ] = "auto"
    extra_body: Annotated[dict[str, Any] | None, Field(description="Other request fields, by name: {priority: 1}.")] = (
        None
    )
    api_key_env: Annotated[
        str, Field(min_length=1, description="Environment variable that holds the server's API key, if it needs one.")
    ] = "OPENAI_API_KEY"
    start_timeout_s: Annotated[
        float, Field(gt=0, le=86_400, description="Seconds that a server started by lem may take to become ready.")
    ] = 900.0
    timeout_s: Annotated[
        float,
        Field(gt=0, le=86_400, description="Seconds that the server may go without sending output during a response."),
    ] = 600.0
    max_errors: Annotated[
        float,
        Field(
            ge=0,
            description="Number of requests that may fail in a window; one more failure ends the run. A value below 1 "
            "is a share of the window's requests.",
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
