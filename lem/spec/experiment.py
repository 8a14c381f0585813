"""`Experiment` and its parts: the single source of the configuration.

Each field carries its constraints and its description. The help of the command-line flags, the reference page, the
JSON Schema and the checks are all derived from here and from `lem.spec.engines`. Values of these types are plain data:
creating a value contacts no hub, sets no environment variable and probes no device. This module knows nothing about
Hydra, files or the origin of a value; `lem.config.compose` does.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from lem.spec.engines import Backend, PytorchBackend
from lem.spec.fields import config


# ------------------------------------------------------------------ inputs
@config
class Dataset:
    """The source of the prompts, and the choice of prompts from this source."""

    name: Annotated[str, Field(description="Name of the chosen dataset; only a label.")] = "custom"
    path: Annotated[
        str | None,
        Field(
            description="A hub id (owner/name), a local file (json, jsonl, csv, tsv, parquet, txt) or directory, or "
            "builtin:sample."
        ),
    ] = None
    config: Annotated[str | None, Field(description="Configuration (subset) of a hub dataset.")] = None
    files: Annotated[
        str | None,
        Field(
            description="File to read, or a pattern such as *.csv, in a directory or in a hub dataset without "
            "configurations."
        ),
    ] = None
    split: Annotated[
        str | None,
        Field(
            description="Split to read, for datasets with splits; if not set, the split that the chosen dataset names, "
            "or else train."
        ),
    ] = None
    column: Annotated[
        str | None, Field(description="Column that holds the prompts; if not set, detected by its name.")
    ] = None
    sample_size: Annotated[
        int | None,
        Field(ge=1, description="Number of prompts to draw at random; if not set, all. Empty prompts are left out."),
    ] = None


@config
class Decoder:
    """How the next token is chosen."""

    name: Annotated[str, Field(description="Name of the chosen decoder; only a label.")] = "deterministic"
    do_sample: Annotated[
        bool, Field(description="Sample the next token; false: take the most likely token (greedy).")
    ] = False
    temperature: Annotated[float, Field(gt=0, le=10, description="Sampling temperature.")] = 1.0
    top_k: Annotated[int, Field(ge=0, description="Sample from the k most likely tokens; 0: from all tokens.")] = 0
    top_p: Annotated[
        float,
        Field(
            gt=0, le=1, description="Sample from the most likely tokens with this total probability (nucleus sampling)."
        ),
    ] = 1.0
    min_p: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Drop tokens less likely than this fraction of the most likely token's probability; 0: off.",
        ),
    ] = 0.0
    repetition_penalty: Annotated[
        float, Field(gt=0, le=10, description="Penalty on tokens that are already present; 1: off.")
    ] = 1.0
    no_repeat_ngram_size: Annotated[int, Field(ge=0, description="Ban repeated n-grams of this size; 0: off.")] = 0


# ------------------------------------------------------------------ how it runs
@config
class Batching:
    """How requests are grouped."""

    strategy: Annotated[
        Literal["static", "dynamic", "sorted_static", "sorted_dynamic", "continuous"],
        Field(
            description="static: batch_size requests per batch, in order; dynamic: as many requests as "
            "max_tokens_per_batch and batch_size allow; sorted_static, sorted_dynamic: the same, with the longest "
            "inputs first; continuous: batch_size requests at a time, each replaced by the next one when it finishes."
        ),
    ] = "static"
    batch_size: Annotated[
        int,
        Field(
            ge=1, le=65536, description="Maximum number of requests in a batch, or of requests running concurrently."
        ),
    ] = 1
    max_tokens_per_batch: Annotated[
        int | None,
        Field(
            ge=1,
            description="Maximum number of input tokens in a batch, including padding (dynamic strategies). A longer "
            "prompt runs alone.",
        ),
    ] = None


@config
class Parallelism:
    """How the model is spread over devices or replicated on them."""

    strategy: Annotated[
        Literal["none", "data_parallel", "tensor_parallel", "pipeline_parallel"],
        Field(
            description="data_parallel: each process has a whole model and takes a share of the prompts; "
            "tensor_parallel: each layer is split over the processes or, if the engine spreads the model itself "
            "(vllm, tensorrt, openai), over GPUs; pipeline_parallel: the layers are spread over the GPUs of one "
            "process."
        ),
    ] = "none"
    degree: Annotated[
        int,
        Field(
            ge=1,
            le=1024,
            description="Number of processes that the strategy uses, or of GPUs if one process spreads the model.",
        ),
    ] = 1


@config
class Quantization:
    """Quantization of the weights with bitsandbytes."""

    quantization: Annotated[bool, Field(description="Quantize the weights while loading.")] = False
    load_in_8bit: Annotated[bool, Field(description="Load the weights in 8 bits (LLM.int8).")] = False
    load_in_4bit: Annotated[bool, Field(description="Load the weights in 4 bits (bitsandbytes).")] = False
    bnb_4bit_quant_type: Annotated[Literal["nf4", "fp4"], Field(description="Number format of 4-bit weights.")] = "nf4"
    bnb_4bit_use_double_quant: Annotated[bool, Field(description="Quantize the scales of 4-bit weights as well.")] = (
        False
    )
    bnb_4bit_compute_dtype: Annotated[
        Literal["float16", "bfloat16", "float32"], Field(description="Dtype of the arithmetic with 4-bit weights.")
    ] = "bfloat16"


@config
class Warmup:
    """Work done before the measured window opens."""

    prompts: Annotated[
        int,
        Field(
            ge=0,
            le=10_000,
            description="Minimum number of prompts to run before the window, in batches like those of the window; 0: "
            "none.",
        ),
    ] = 2
    until_cv: Annotated[
        float | None,
        Field(
            gt=0,
            lt=1,
            description="Instead of running a fixed number of prompts, repeat the first batch until the coefficient of "
            "variation of the last cv_batches latencies is below this value.",
        ),
    ] = None
    cv_batches: Annotated[
        int,
        Field(ge=2, le=100, description="With until_cv: how many of the most recent latencies to use."),
    ] = 5
    max_prompts: Annotated[
        int,
        Field(
            ge=1, le=100_000, description="With until_cv: number of prompts after which the warm-up ends in any case."
        ),
    ] = 200
    max_s: Annotated[
        float, Field(gt=0, description="Time limit for the warm-up in seconds; a batch that has begun is finished.")
    ] = 120.0


@config
class Streaming:
    """Timing of each token as it is generated."""

    enabled: Annotated[
        bool, Field(description="Time each token, to measure TTFT, inter-token latency and time per output token.")
    ] = False
    warmup_requests: Annotated[
        int,
        Field(
            ge=0,
            le=10_000,
            description="Number of warm-up requests if tokens are timed; used instead of warmup.prompts.",
        ),
    ] = 5


@config
class Traffic:
    """How requests arrive in the measured window."""

    pattern: Annotated[
        Literal["closed", "constant", "poisson", "concurrency", "trace"],
        Field(
            description="When requests arrive. closed: all at the start; constant, poisson: at target_qps, whether or "
            "not the engine keeps up; concurrency: whenever another request ends; trace: as recorded in a file."
        ),
    ] = "closed"
    target_qps: Annotated[
        float | None, Field(gt=0, description="Number of requests that arrive per second (constant, poisson).")
    ] = None
    concurrency: Annotated[
        int | None, Field(ge=1, description="Number of requests in the system at any time (concurrency).")
    ] = None
    trace: Annotated[
        str | None,
        Field(description="CSV file with the recorded arrivals, in seconds, in a column t_s."),
    ] = None
    ttft_limit_s: Annotated[
        float | None, Field(gt=0, description="For goodput: maximum time to first token of a good request, in seconds.")
    ] = None
    itl_limit_s: Annotated[
        float | None,
        Field(gt=0, description="For goodput: maximum mean inter-token latency of a good request, in seconds."),
    ] = None


@config
class Cooldown:
    """Waiting before any measurement, so that runs start from the same state."""

    wait_s: Annotated[float, Field(ge=0, le=86_400, description="Seconds to wait before the run.")] = 0.0
    to_c: Annotated[
        float | None,
        Field(gt=0, lt=120, description="Wait until the GPUs in use are at or below this temperature in °C."),
    ] = None
    max_s: Annotated[
        float,
        Field(
            gt=0,
            description="Maximum number of seconds to wait for to_c; after that, the run starts anyway.",
        ),
    ] = 600.0


@config
class Energy:
    """The meter to read, and the conversion of joules to grams of CO2e."""

    name: Annotated[
        Literal["auto", "nvml", "rapl", "codecarbon", "zeus", "replay", "simulated", "none"],
        Field(description="Meter; auto: the best available meter for each component."),
    ] = "auto"
    idle_s: Annotated[
        float,
        Field(
            ge=0,
            le=3600,
            description="Length in seconds of each of the two idle measurements (before loading, and with the model "
            "loaded); 0 skips them.",
        ),
    ] = 3.0
    power_hz: Annotated[
        float, Field(gt=0, le=100, description="Samples per second of the GPU power trace taken alongside the counter.")
    ] = 20.0
    powercap_dir: Annotated[
        str, Field(min_length=1, description="Directory of the kernel's powercap tree, which the rapl meter reads.")
    ] = "/sys/class/powercap"
    trace: Annotated[
        str | None,
        Field(description="CSV file for the replay meter, with the columns t_s, power_w and optionally component."),
    ] = None
    power_w: Annotated[
        float,
        Field(gt=0, le=1e6, description="Power of the simulated meter in watts, the same in every phase."),
    ] = 100.0
    country_iso_code: Annotated[
        str | None,
        Field(
            pattern="^[A-Z]{3}$",
            description="Country for the mean carbon intensity of the grid (ISO 3166 alpha-3 code, such as DEU).",
        ),
    ] = None
    carbon_intensity_g_per_kwh: Annotated[
        float | None, Field(ge=0, description="Carbon intensity in gCO2e/kWh, used instead of the country's.")
    ] = None
    carbon_trace: Annotated[
        str | None,
        Field(
            min_length=1,
            description="CSV file with the carbon intensity over time, in the columns time (ISO 8601 with UTC offset) "
            "and g/kWh; used instead of a constant intensity.",
        ),
    ] = None


@config
class Io:
    """Where results are written."""

    results_dir: Annotated[
        str, Field(min_length=1, description="Results directory.", json_schema_extra={"env": "LLM_ENERGY_RESULTS_DIR"})
    ] = "results"


# ------------------------------------------------------------------ the whole
@config
class Experiment:
    """The full configuration of a single run: one model, one set of prompts, and how the model runs them."""

    model: Annotated[
        str | None,
        Field(min_length=1, description="Model: a hub id, a local directory, or tiny (built in, random weights)."),
    ] = None
    revision: Annotated[str | None, Field(description="Branch, tag or commit of a hub model.")] = None
    adapter: Annotated[str | None, Field(description="LoRA adapter: a hub id or a local directory.")] = None
    trust_remote_code: Annotated[
        bool, Field(description="Run Python code that comes with the model; set this only if you trust the authors.")
    ] = False
    fp_precision: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        Field(
            description="Dtype of the weights and arithmetic; auto: the checkpoint's own dtype on a GPU, float32 on "
            "a CPU."
        ),
    ] = "auto"
    max_input_tokens: Annotated[
        int | None, Field(ge=1, description="Truncate prompts to this many tokens, keeping the beginning.")
    ] = None
    max_output_tokens: Annotated[
        int, Field(ge=1, le=1_000_000, description="Maximum number of tokens to generate per request.")
    ] = 128
    min_output_tokens: Annotated[
        int,
        Field(
            ge=0,
            description="Minimum number of tokens to generate per request; the end token is suppressed until then.",
        ),
    ] = 0
    chat_template: Annotated[
        bool, Field(description="Wrap each prompt in the model's chat template, as a user turn.")
    ] = False
    seed: Annotated[
        int,
        Field(
            ge=0, le=2**32 - 1, description="Seed for drawing prompts, for Poisson arrivals and for sampling tokens."
        ),
    ] = 42
    cycles: Annotated[
        int, Field(ge=1, le=10, description="How many times to measure the same prompts while the model stays loaded.")
    ] = 1
    num_processes: Annotated[
        int,
        Field(
            ge=1,
            le=1024,
            description="Number of processes on this node that share the prompts; on GPUs, each process uses one.",
        ),
    ] = 1
    gpus: Annotated[
        list[int | str] | None,
        Field(
            min_length=1,
            description="GPUs to use, by index among the visible GPUs or by UUID (GPU-…, MIG-…); if not set, all.",
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
