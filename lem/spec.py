"""What is measured: `Experiment` and its parts, the single source of the configuration.

Each field carries its constraints and its description; the help of the command-line flags, the reference
page, the JSON Schema and the checks all come from here. A value of these types is plain data: creating one
asks no hub, sets no variable and probes no device. This module knows nothing of Hydra, of files or of how a
value came about; `lem.apps.compose` does.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    cast,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import ConfigDict, Field
from pydantic.fields import FieldInfo

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, field_specifiers=(field,))
def config(cls: type[T]) -> type[T]:
    """Make a dataclass of configuration: keyword-only, no unknown keys, no silent conversion of types."""
    checks = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    cls.__pydantic_config__ = checks  # type: ignore[attr-defined]
    return dataclass(kw_only=True)(cls)


def Env(variable: str) -> dict[str, str]:  # noqa: N802 - reads as part of a field's declaration
    """Name the environment variable that gives a field's default (below every other source)."""
    return {"env": variable}


# ------------------------------------------------------------------ backends
@config
class PytorchBackend:
    """transformers' `generate` on PyTorch, in the worker process."""

    spreads_a_model_itself: ClassVar[bool] = False
    runs_continuously: ClassVar[bool] = True

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
        Field(description="Key/value cache: growing, preallocated, or none (every step recomputes all)."),
    ] = "dynamic"
    torch_compile: Annotated[
        bool, Field(description="Compile the model's forward pass with torch.compile; pays in warm-up.")
    ] = False
    torch_compile_mode: Annotated[
        Literal["default", "reduce-overhead", "max-autotune"],
        Field(description="Mode of torch.compile; read only when torch_compile is true."),
    ] = "default"


@config
class SimulatedBackend:
    """A stand-in engine with exactly known times: for trying grids and for tests. No model runs."""

    spreads_a_model_itself: ClassVar[bool] = False
    runs_continuously: ClassVar[bool] = False

    name: Annotated[Literal["simulated"], Field(description="Inference backend.")] = "simulated"
    prefill_s_per_token: Annotated[float, Field(ge=0, description="Time that one input token takes, in seconds.")] = (
        1e-5
    )
    decode_s_per_token: Annotated[
        float, Field(ge=0, description="Time that one output token takes, per batch step, in seconds.")
    ] = 1e-4
    gpus: Annotated[
        int,
        Field(ge=0, le=1024, description="Visible GPUs that it claims: they are metered, though nothing runs on them."),
    ] = 0
    fail_at_request: Annotated[
        int | None, Field(ge=0, description="Fail when this request's batch is reached (null: never).")
    ] = None


@config
class VllmSpeculation:
    """Speculative decoding: a cheap method drafts tokens, the model checks several of them in one step."""

    method: Annotated[
        str | None,
        Field(
            min_length=1,
            description="How tokens are drafted: ngram, draft_model, eagle, eagle3, medusa, suffix, … null is off, or "
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
        int | None, Field(ge=1, description="GPUs that each layer of the draft model is split over.")
    ] = None


@config
class VllmBackend:
    """vLLM's engine, in the worker process. Null leaves an option to vLLM's own default."""

    # One process of lem's runs the model on all of its GPUs.
    spreads_a_model_itself: ClassVar[bool] = True
    # The next request may take the place of one that is finished (batching.strategy=continuous).
    runs_continuously: ClassVar[bool] = True

    name: Annotated[Literal["vllm"], Field(description="Inference backend.")] = "vllm"
    max_model_len: Annotated[
        int | None, Field(ge=1, description="Tokens of a prompt and its output together, at most.")
    ] = None
    max_num_batched_tokens: Annotated[
        int | None, Field(ge=1, description="Tokens that one step of the engine computes, at most.")
    ] = None
    gpu_memory_utilization: Annotated[
        float | None,
        Field(gt=0, le=1, description="Share of a GPU's memory that vLLM takes (on a CPU: of the machine's)."),
    ] = None
    kv_cache_memory_bytes: Annotated[
        int | None, Field(ge=1, description="Size of the key/value cache of a GPU, instead of what the share leaves.")
    ] = None
    kv_cache_dtype: Annotated[
        str | None, Field(min_length=1, description="Dtype of the key/value cache: auto, bfloat16, fp8, …")
    ] = None
    block_size: Annotated[int | None, Field(ge=1, description="Tokens in a block of the key/value cache.")] = None
    enable_prefix_caching: Annotated[
        bool | None, Field(description="Reuse keys and values of prompts that begin alike.")
    ] = None
    enable_chunked_prefill: Annotated[
        bool | None, Field(description="Take in long prompts in pieces, beside the decoding of others.")
    ] = None
    enforce_eager: Annotated[bool | None, Field(description="Neither compile the model nor capture CUDA graphs.")] = (
        None
    )
    attention_backend: Annotated[
        str | None, Field(min_length=1, description="Attention kernels: FLASH_ATTN, FLASHINFER, TRITON_ATTN, …")
    ] = None
    quantization: Annotated[
        str | None, Field(min_length=1, description="Method of quantized weights: awq, gptq, fp8, …")
    ] = None
    load_format: Annotated[
        str | None, Field(min_length=1, description="Format of the weights: auto, safetensors, dummy (random), …")
    ] = None
    cpu_offload_gb: Annotated[
        float | None, Field(ge=0, description="Weights of a GPU that stay in main memory, in GiB.")
    ] = None
    speculative: VllmSpeculation = field(default_factory=VllmSpeculation)
    engine_args: Annotated[
        dict[str, Any] | None,
        Field(description="Any other argument of vLLM's EngineArgs by its name: {max_logprobs: 5}."),
    ] = None


@config
class TensorrtKvCache:
    """The key/value cache: options of TensorRT-LLM's KvCacheConfig."""

    free_gpu_memory_fraction: Annotated[
        float | None,
        Field(gt=0, le=1, description="Share of a GPU's memory, of what loading leaves free, that the cache takes."),
    ] = None
    max_tokens: Annotated[int | None, Field(ge=1, description="Tokens that the cache holds, at most.")] = None
    dtype: Annotated[str | None, Field(min_length=1, description="Dtype of keys and values: auto, fp8, nvfp4, …")] = (
        None
    )
    tokens_per_block: Annotated[int | None, Field(ge=1, description="Tokens in a block of the cache.")] = None
    enable_block_reuse: Annotated[
        bool | None, Field(description="Reuse keys and values of prompts that begin alike.")
    ] = None
    host_cache_size: Annotated[
        int | None, Field(ge=0, description="Main memory for blocks that a GPU has no room for, in bytes.")
    ] = None


@config
class TensorrtScheduler:
    """Which requests run at the same time: options of TensorRT-LLM's SchedulerConfig."""

    capacity_scheduler_policy: Annotated[
        str | None,
        Field(min_length=1, description="How requests are let in: GUARANTEED_NO_EVICT, MAX_UTILIZATION, STATIC_BATCH."),
    ] = None
    context_chunking_policy: Annotated[
        str | None,
        Field(
            min_length=1, description="Order of the pieces of long prompts: FIRST_COME_FIRST_SERVED, EQUAL_PROGRESS."
        ),
    ] = None


@config
class TensorrtSpeculation:
    """Speculative decoding: a cheap method drafts tokens, the model checks several of them in one step."""

    decoding_type: Annotated[
        str | None,
        Field(min_length=1, description="How tokens are drafted: NGram, Draft_Target, Eagle3, MTP, …; null is off."),
    ] = None
    speculative_model: Annotated[
        str | None, Field(min_length=1, description="Draft model or head: a hub id or a local directory.")
    ] = None
    max_draft_len: Annotated[int | None, Field(ge=1, description="Tokens drafted for each step, at most.")] = None
    max_matching_ngram_size: Annotated[
        int | None, Field(ge=1, description="Longest n-gram that NGram looks for in the text so far.")
    ] = None


@config
class TensorrtBackend:
    """TensorRT-LLM's LLM API, its PyTorch flow. Null leaves an option to TensorRT-LLM's own default."""

    spreads_a_model_itself: ClassVar[bool] = True
    runs_continuously: ClassVar[bool] = True

    name: Annotated[Literal["tensorrt"], Field(description="Inference backend.")] = "tensorrt"
    max_seq_len: Annotated[
        int | None, Field(ge=1, description="Tokens of a prompt and its output together, at most.")
    ] = None
    max_num_tokens: Annotated[
        int | None, Field(ge=1, description="Tokens that one step of the engine computes, at most.")
    ] = None
    attn_backend: Annotated[
        str | None, Field(min_length=1, description="Attention kernels: TRTLLM, FLASHINFER, VANILLA.")
    ] = None
    chunked_prefill: Annotated[
        bool | None, Field(description="Take in long prompts in pieces, beside the decoding of others.")
    ] = None
    overlap_scheduler: Annotated[
        bool | None, Field(description="Prepare a step on the processor while the GPU computes the one before.")
    ] = None
    cuda_graphs: Annotated[bool | None, Field(description="Capture decoding steps as CUDA graphs at load.")] = None
    force_dynamic_quantization: Annotated[
        bool | None, Field(description="Take the scales of quantized activations from each step, not the checkpoint.")
    ] = None
    moe_expert_parallel_size: Annotated[
        int | None, Field(ge=1, description="GPUs, of those of tensor_parallel, that share out a layer's experts.")
    ] = None
    kv_cache: TensorrtKvCache = field(default_factory=TensorrtKvCache)
    scheduler: TensorrtScheduler = field(default_factory=TensorrtScheduler)
    speculative: TensorrtSpeculation = field(default_factory=TensorrtSpeculation)
    extra_args: Annotated[
        dict[str, Any] | None,
        Field(description="Any other argument of TensorRT-LLM's LLM by its name: {stream_interval: 4}."),
    ] = None


@config
class OpenaiBackend:
    """A server that speaks OpenAI's protocol: one that runs already, or one that is started for the run."""

    # It spreads a model by itself; lem's one process asks it.
    spreads_a_model_itself: ClassVar[bool] = True
    runs_continuously: ClassVar[bool] = True

    name: Annotated[Literal["openai"], Field(description="Inference backend.")] = "openai"
    url: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Address of the server, http://127.0.0.1:8000; null: a free port of this machine, for command.",
        ),
    ] = None
    command: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Starts the server, without a shell; it ends with the run. {model}, {port}, {host}, "
            "{revision}, {dtype}, {seed}, {batch_size} and {degree} are filled in: vllm serve {model} --port {port}. "
            "null: it runs already.",
        ),
    ] = None
    model_name: Annotated[
        str | None,
        Field(min_length=1, description="What the server calls the model; null: the only one it has, or model."),
    ] = None
    dialect: Annotated[
        Literal["vllm", "openai"],
        Field(
            description="Fields of a request that the server knows: vllm (top_k, min_p, end tokens, token ids, …) or "
            "OpenAI's alone."
        ),
    ] = "vllm"
    device: Annotated[
        Literal["auto", "cpu", "remote"],
        Field(
            description="Where the model runs: auto is this machine's GPUs, else its CPU, if the address is its own or "
            "the command was started here, else another machine."
        ),
    ] = "auto"
    extra_body: Annotated[
        dict[str, Any] | None, Field(description="Any other field of a request by its name: {priority: 1}.")
    ] = None
    api_key_env: Annotated[
        str, Field(min_length=1, description="Environment variable that holds the server's API key, if it wants one.")
    ] = "OPENAI_API_KEY"
    start_timeout_s: Annotated[
        float, Field(gt=0, le=86_400, description="Seconds that a server that is started has until it answers.")
    ] = 900.0
    timeout_s: Annotated[
        float, Field(gt=0, le=86_400, description="Seconds that the server may be silent in the midst of an answer.")
    ] = 600.0


Backend = Annotated[
    PytorchBackend | SimulatedBackend | VllmBackend | TensorrtBackend | OpenaiBackend, Field(discriminator="name")
]


# ------------------------------------------------------------------ what goes in
@config
class Dataset:
    """Where the prompts come from and which of them are used."""

    name: Annotated[str, Field(description="Name of the dataset choice; a label.")] = "custom"
    path: Annotated[
        str | None,
        Field(description="A hub id (owner/name), a local file (json, jsonl, csv, parquet, txt), or builtin:sample."),
    ] = None
    config: Annotated[str | None, Field(description="Configuration (subset) of a hub dataset.")] = None
    files: Annotated[str | None, Field(description="One file of a hub dataset that has no loading configuration.")] = (
        None
    )
    split: Annotated[str | None, Field(description="Split to read; null is the dataset's own default, else train.")] = (
        None
    )
    column: Annotated[str | None, Field(description="Column that holds the prompts; null detects it by name.")] = None
    sample_size: Annotated[
        int | None,
        Field(ge=1, description="Number of prompts, drawn with the seed after empty ones are dropped."),
    ] = None


@config
class Decoder:
    """How the next token is chosen."""

    name: Annotated[str, Field(description="Name of the decoder choice; a label.")] = "deterministic"
    do_sample: Annotated[bool, Field(description="Sample; false takes the most likely token (greedy).")] = False
    temperature: Annotated[float, Field(gt=0, le=10, description="Sampling temperature.")] = 1.0
    top_k: Annotated[int, Field(ge=0, description="Sample from the k most likely tokens; 0 is all.")] = 0
    top_p: Annotated[float, Field(gt=0, le=1, description="Nucleus sampling: smallest set of this mass.")] = 1.0
    min_p: Annotated[
        float, Field(ge=0, le=1, description="Drop tokens below this share of the most likely one; 0 is off.")
    ] = 0.0
    repetition_penalty: Annotated[
        float, Field(gt=0, le=10, description="Penalty on tokens already present; 1 is off.")
    ] = 1.0
    no_repeat_ngram_size: Annotated[
        int, Field(ge=0, description="Forbid repeating n-grams of this size; 0 is off.")
    ] = 0


# ------------------------------------------------------------------ how it runs
@config
class Batching:
    """How requests are put together."""

    strategy: Annotated[
        Literal["static", "dynamic", "sorted_static", "sorted_dynamic", "continuous"],
        Field(
            description="static: batch_size requests in order; dynamic: as many as max_tokens_per_batch "
            "and batch_size allow; sorted_*: the same, longest inputs first; continuous: the next request takes the "
            "place of one that is finished, batch_size at a time."
        ),
    ] = "static"
    batch_size: Annotated[
        int, Field(ge=1, le=65536, description="Requests in a batch, or that run at the same time, at most.")
    ] = 1
    max_tokens_per_batch: Annotated[
        int | None,
        Field(
            ge=1,
            description="Input tokens in a batch, padding included, at most (dynamic strategies); "
            "a longer single prompt is a batch of its own.",
        ),
    ] = None


@config
class Parallelism:
    """How one model is spread over devices, or repeated on them."""

    strategy: Annotated[
        Literal["none", "data_parallel", "tensor_parallel", "pipeline_parallel"],
        Field(
            description="data_parallel: a whole model in each process, prompts shared out; tensor_parallel: each "
            "layer split over the processes; pipeline_parallel: the layers spread over the GPUs of one process."
        ),
    ] = "none"
    degree: Annotated[int, Field(ge=1, le=1024, description="Processes (pipeline_parallel: GPUs) of the strategy.")] = 1


@config
class Quantization:
    """Weights in fewer bits, through bitsandbytes."""

    quantization: Annotated[bool, Field(description="Quantize the weights at load.")] = False
    load_in_8bit: Annotated[bool, Field(description="8-bit weights (LLM.int8).")] = False
    load_in_4bit: Annotated[bool, Field(description="4-bit weights.")] = False
    bnb_4bit_quant_type: Annotated[Literal["nf4", "fp4"], Field(description="4-bit number format.")] = "nf4"
    bnb_4bit_use_double_quant: Annotated[bool, Field(description="Quantize the 4-bit scales as well.")] = False
    bnb_4bit_compute_dtype: Annotated[
        Literal["float16", "bfloat16", "float32"], Field(description="Dtype of the 4-bit arithmetic.")
    ] = "bfloat16"


@config
class Warmup:
    """Work done before the measured window opens."""

    prompts: Annotated[
        int, Field(ge=0, le=10_000, description="Prompts run before the window, batched like the real ones.")
    ] = 2
    until_cv: Annotated[
        float | None,
        Field(
            gt=0,
            lt=1,
            description="Instead of a fixed number: repeat the first batch until the coefficient of variation of the "
            "last cv_batches latencies is below this.",
        ),
    ] = None
    cv_batches: Annotated[
        int, Field(ge=2, le=100, description="Latencies that until_cv looks at; read only with until_cv.")
    ] = 5
    max_prompts: Annotated[
        int, Field(ge=1, le=100_000, description="Prompts after which until_cv gives up; read only with until_cv.")
    ] = 200
    max_s: Annotated[
        float, Field(gt=0, description="Seconds after which until_cv gives up; read only with until_cv.")
    ] = 120.0


@config
class Streaming:
    """Timing each token as it comes."""

    enabled: Annotated[
        bool, Field(description="Time each token: TTFT, inter-token latency, time per output token.")
    ] = False
    warmup_requests: Annotated[
        int, Field(ge=0, le=10_000, description="Requests before the window when tokens are timed, for warmup.prompts.")
    ] = 5


@config
class Traffic:
    """How requests arrive in the measured window."""

    pattern: Annotated[
        Literal["closed", "constant", "poisson", "concurrency", "trace"],
        Field(
            description="closed: all are there at once; constant, poisson: at target_qps, whether or not the engine "
            "keeps up; concurrency: so many at any time; trace: as recorded."
        ),
    ] = "closed"
    target_qps: Annotated[
        float | None, Field(gt=0, description="Requests a second that arrive (constant, poisson).")
    ] = None
    concurrency: Annotated[int | None, Field(ge=1, description="Requests in the system at any time (concurrency).")] = (
        None
    )
    trace: Annotated[str | None, Field(description="CSV of the trace: a column t_s, when each request arrives.")] = None
    ttft_limit_s: Annotated[
        float | None, Field(gt=0, description="Time to first token that a good request keeps; for goodput.")
    ] = None
    itl_limit_s: Annotated[
        float | None, Field(gt=0, description="Mean inter-token latency that a good request keeps; for goodput.")
    ] = None


@config
class Cooldown:
    """Waiting before anything is measured, so that runs begin alike."""

    wait_s: Annotated[float, Field(ge=0, le=86_400, description="Seconds to wait.")] = 0.0
    to_c: Annotated[
        float | None,
        Field(gt=0, lt=120, description="Wait until the GPUs in use are at or below this temperature, °C."),
    ] = None
    max_s: Annotated[float, Field(gt=0, description="Seconds after which waiting for to_c ends all the same.")] = 600.0


@config
class Energy:
    """Which meter is read, and how joules become grams of CO2e."""

    name: Annotated[
        Literal["auto", "nvml", "rapl", "codecarbon", "zeus", "replay", "none"],
        Field(description="Meter: auto takes the best available for each component."),
    ] = "auto"
    idle_s: Annotated[
        float,
        Field(
            ge=0,
            le=3600,
            description="Length of each of the two idle measurements, before loading and with the model resident; "
            "0 leaves them out.",
        ),
    ] = 3.0
    power_hz: Annotated[
        float, Field(gt=0, le=100, description="Samples a second of the GPU power trace beside the counter.")
    ] = 20.0
    powercap_dir: Annotated[
        str, Field(min_length=1, description="The kernel's powercap tree, which the rapl meter reads.")
    ] = "/sys/class/powercap"
    trace: Annotated[
        str | None, Field(description="CSV of the replay meter: columns t_s, power_w and optional component.")
    ] = None
    country_iso_code: Annotated[
        str | None,
        Field(
            pattern="^[A-Z]{3}$",
            description="Country whose grid's mean carbon intensity applies (ISO 3166 alpha-3, DEU).",
        ),
    ] = None
    carbon_intensity_g_per_kwh: Annotated[
        float | None, Field(ge=0, description="Carbon intensity to use instead of a country's, gCO2e/kWh.")
    ] = None


@config
class Io:
    """Where results go."""

    results_dir: Annotated[
        str,
        Field(
            min_length=1,
            description="Results directory.",
            json_schema_extra=dict(Env("LLM_ENERGY_RESULTS_DIR")),
        ),
    ] = "results"


# ------------------------------------------------------------------ the whole
@config
class Experiment:
    """One configuration of one model over one set of prompts: what a single run measures."""

    model: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Model: a hub id, a local directory, or tiny (built in, random weights).",
        ),
    ] = None
    revision: Annotated[str | None, Field(description="Branch, tag or commit of a hub model.")] = None
    adapter: Annotated[str | None, Field(description="LoRA adapter: a hub id or a local directory.")] = None
    trust_remote_code: Annotated[
        bool, Field(description="Run Python code that comes with the model. Only for authors you trust.")
    ] = False
    fp_precision: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        Field(description="Dtype of weights and arithmetic; auto: the checkpoint's on a GPU, float32 on a CPU."),
    ] = "auto"
    max_input_tokens: Annotated[
        int | None, Field(ge=1, description="Cut prompts to this many tokens, keeping their beginning.")
    ] = None
    max_output_tokens: Annotated[
        int, Field(ge=1, le=1_000_000, description="Tokens to generate for a request, at most.")
    ] = 128
    min_output_tokens: Annotated[
        int, Field(ge=0, description="Tokens to generate for a request, at least (holds off the end token).")
    ] = 0
    chat_template: Annotated[
        bool, Field(description="Wrap each prompt as a user turn of the model's chat template.")
    ] = False
    seed: Annotated[int, Field(ge=0, le=2**32 - 1, description="Seed of the sampling of prompts and of tokens.")] = 42
    cycles: Annotated[
        int, Field(ge=1, le=10, description="Times to measure the same prompts, the model staying loaded.")
    ] = 1
    num_processes: Annotated[
        int,
        Field(ge=1, le=1024, description="Worker processes on this node that share the prompts, each on its own GPU."),
    ] = 1
    gpus: Annotated[
        list[int | str] | None,
        Field(
            min_length=1,
            description="GPUs to use, by index among the visible ones or by UUID (GPU-…, MIG-…); null is all visible.",
        ),
    ] = None
    backend: Backend = field(default_factory=PytorchBackend)
    dataset: Dataset = field(default_factory=Dataset)
    decoder: Decoder = field(default_factory=Decoder)
    batching: Batching = field(default_factory=Batching)
    parallelism: Parallelism = field(default_factory=Parallelism)
    quantization: Quantization = field(default_factory=Quantization)
    warmup: Warmup = field(default_factory=Warmup)
    streaming: Streaming = field(default_factory=Streaming)
    traffic: Traffic = field(default_factory=Traffic)
    cooldown: Cooldown = field(default_factory=Cooldown)
    energy: Energy = field(default_factory=Energy)
    io: Io = field(default_factory=Io)


BACKENDS: dict[str, type[Any]] = {
    "pytorch": PytorchBackend,
    "simulated": SimulatedBackend,
    "vllm": VllmBackend,
    "tensorrt": TensorrtBackend,
    "openai": OpenaiBackend,
}

# Parts that are chosen by name among the files of a folder of conf/.
GROUPS = ("backend", "dataset", "decoder", "energy", "preset")


# ------------------------------------------------------------------ reading the schema
@dataclass(frozen=True)
class Leaf:
    """One configurable value: its dotted path, type, constraints, description and default."""

    path: str
    annotation: Any
    info: FieldInfo
    default: Any

    @property
    def description(self) -> str:
        """The sentence that says what the value is for."""
        return self.info.description or ""

    @property
    def env(self) -> str | None:
        """The environment variable below the value's other sources, if it has one."""
        extra = self.info.json_schema_extra
        return str(extra["env"]) if isinstance(extra, dict) and "env" in extra else None


def leaves(cls: type[Any] = Experiment, prefix: str = "") -> tuple[Leaf, ...]:
    """Return all values of a configuration type, depth first; `backend` has those of every backend."""
    return _leaves(cast(Hashable, cls), prefix)


@cache
def _leaves(cls: Any, prefix: str) -> tuple[Leaf, ...]:
    hints = get_type_hints(cls, include_extras=True)
    found: list[Leaf] = []
    for f in fields(cls):
        annotation, path = hints[f.name], prefix + f.name
        parts = [t for t in _flatten(annotation) if is_dataclass(t)]
        for part in parts:
            found += leaves(part, f"{path}.")  # type: ignore[arg-type]
        if not parts:
            found.append(Leaf(path, annotation, _field_info(annotation), f.default))
    return tuple(found)


def leaf(path: str) -> Leaf:
    """Return the leaf at a dotted path; KeyError when there is none."""
    return _first_leaves()[path]


@cache
def _first_leaves() -> dict[str, Leaf]:
    """Return the leaves by path, of those that several backends have the first."""
    return {each.path: each for each in reversed(leaves())}


def _flatten(annotation: Any) -> list[Any]:
    """Return an annotation's member types: of an Annotated its first, of a union all."""
    if get_origin(annotation) is Annotated:
        return _flatten(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return []
    members = get_args(annotation)
    return [t for member in members for t in _flatten(member)] if members else [annotation]


def _field_info(annotation: Any) -> FieldInfo:
    found = [meta for meta in getattr(annotation, "__metadata__", ()) if isinstance(meta, FieldInfo)]
    return found[0] if found else FieldInfo(annotation=annotation)
