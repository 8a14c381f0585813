"""The rules: everything that lem can object to before a run, each with a code, a severity, a meaning and a remedy.

This catalog is the single source of the codes and their severities: an objection with any other code cannot be
created, and `docs/reference/rules.md` is generated from it. The module knows nothing about experiments or machines.
Whether a rule is broken is decided where the facts are known: in `lem.spec.conflicts`, `lem.runner.preflight`, the
backends, the meters and, for config files, in `lem.config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# impossible: the experiment cannot run. inadvisable: the experiment runs only with --force. warning: the experiment
# runs, and a message is printed.
Severity = Literal["impossible", "inadvisable", "warning"]
# What a rule checks: the options alone, the machine and its installed software, or files.
Scope = Literal["options", "machine", "files"]


@dataclass(frozen=True)
class Rule:
    """A kind of objection. In `remedy`, "this option" means the option that the objection concerns."""

    severity: Severity
    scope: Scope
    meaning: str
    remedy: str


def _rules(severity: Severity, scope: Scope, texts: Mapping[str, tuple[str, str]]) -> dict[str, Rule]:
    """Return the rules of one severity and scope, given the meaning and remedy for each code."""
    return {code: Rule(severity, scope, meaning, remedy) for code, (meaning, remedy) in texts.items()}


OPTIONS_IMPOSSIBLE = _rules(
    "impossible",
    "options",
    {
        "min_above_max": (
            "min_output_tokens is greater than max_output_tokens.",
            "Lower min_output_tokens, or raise max_output_tokens.",
        ),
        "no_token_budget": (
            "Dynamic batching fills a batch up to a budget of tokens, but batching.max_tokens_per_batch is not set.",
            "Set batching.max_tokens_per_batch, for example to 8192, or use static batching.",
        ),
        "no_continuous_batching": (
            "With the pytorch backend, the value of this option rules out continuous batching.",
            "Leave this option out, or use static batching.",
        ),
        "traffic_incomplete": (
            "The traffic pattern needs a value that is not set.",
            "Set the value, or choose another traffic.pattern.",
        ),
        "traffic_not_divisible": (
            "The number of concurrent requests cannot be divided evenly among the processes.",
            "Set traffic.concurrency to a multiple of the number of processes.",
        ),
        "simulated_energy": (
            "The simulated meter reads no sensor, so the energy values of a real engine would be fictitious.",
            "Use another meter, or backend=simulated.",
        ),
        "simulated_time": (
            "With backend.sleep=false, the simulated backend does not actually wait, but something in the "
            "configuration needs real time: a sensor, another process, or a GPU.",
            "Use one process, backend.gpus=0 and a meter without a sensor (energy=simulated, replay or none), or set "
            "backend.sleep=true.",
        ),
        "bits_conflict": ("Both 4-bit and 8-bit weights are requested.", "Turn one of the two off."),
        "no_bits": (
            "Quantization is on, but no bit width is set.",
            "Set quantization.load_in_8bit or quantization.load_in_4bit to true.",
        ),
        "unknown_country": (
            "No carbon intensity is known for the country.",
            "Correct the country code, or set energy.carbon_intensity_g_per_kwh instead.",
        ),
        "processes_unlike_degree": (
            "The strategy starts parallelism.degree processes, but num_processes is set to a different number.",
            "Leave this option out, or change parallelism.degree, which sets the number of processes.",
        ),
        "pipeline_processes": (
            "Several processes are requested, but the strategy runs the model on several GPUs in one process.",
            "Leave this option out: parallelism.degree sets the number of GPUs.",
        ),
        "tensor_parallel_quantized": (
            "Weights quantized by bitsandbytes cannot be split across processes.",
            "Use pipeline_parallel or data_parallel, or turn quantization off.",
        ),
        "attention_float32": (
            "Flash attention has no float32 kernels, but the model would run in float32.",
            "Set fp_precision to float16 or bfloat16, or choose another attention kernel.",
        ),
        # ------------------------------------------------------ engines
        "quantized_by_vllm": (
            "The options `quantization.…` are for the pytorch backend; vLLM has an option of its own.",
            "Set backend.quantization instead, for example to fp8; a checkpoint that is already quantized needs "
            "neither option.",
        ),
        "quantized_by_tensorrt": (
            "The options `quantization.…` are for the pytorch backend; TensorRT-LLM runs checkpoints that are "
            "already quantized.",
            "Leave this option out, and choose a quantized checkpoint (FP8, NVFP4, AWQ) as the model.",
        ),
        "no_ngram_ban": (
            "decoder.no_repeat_ngram_size is set, but vLLM cannot ban repeated n-grams.",
            "Set this option to 0.",
        ),
        "temperature_raised": (
            "vLLM raises any temperature below 0.01 to 0.01, and mentions this only in its log.",
            "Set a temperature of 0.01 or more, or decode greedily (decoder.do_sample=false).",
        ),
        "speculation_min_p": (
            "decoder.min_p is set, but vLLM's speculative decoding does not support min_p.",
            "Set this option to 0, or turn speculative decoding off.",
        ),
        "speculation_incomplete": (
            "vLLM's method of speculative decoding needs an option that is not set, or prompt_lookup_min is larger "
            "than prompt_lookup_max.",
            "Set a suitable value, or choose another method.",
        ),
        "speculation_ngram_ban": (
            "decoder.no_repeat_ngram_size is set, but with speculative decoding, TensorRT-LLM either refuses to ban "
            "n-grams or bans them one step too late.",
            "Set this option to 0, or turn speculative decoding off.",
        ),
        "engine_arg_of_lem": (
            "lem itself sets this engine argument (or this field of a request); the message names the option from "
            "which lem sets it, or says why lem sets it.",
            "Leave this argument out.",
        ),
        "engine_arg_code": (
            "This option names Python code that the engine would load and run with your permissions.",
            "Leave this option out, or set trust_remote_code=true if you trust the authors of that code.",
        ),
        "dropped_engine_arg": ("The engine no longer has this argument.", "Remove the argument."),
        # ------------------------------------------------------ campaigns
        "primary_without_energy": (
            "A campaign compares its arms by energy or power, but an arm measures no energy.",
            "Choose a meter (energy=auto), or compare by another metric, for example with --primary "
            "output_tokens_per_s.",
        ),
        "primary_without_ttft": (
            "A campaign compares its arms by the time to the first token, but an arm does not time tokens.",
            "Set streaming.enabled=true for all arms, or compare by another metric, for example with --primary "
            "latency_mean_s.",
        ),
        # ------------------------------------------------------ servers
        "no_server": (
            "Neither the address of a server nor a command that starts a server is set.",
            "Set backend.url or backend.command.",
        ),
        "bad_server_url": (
            "The server's address is not a URL, or contains more than a scheme, host, port and path.",
            "Write the address as http://host:port.",
        ),
        "bad_server_command": (
            "The command that starts the server cannot be parsed, has an unknown placeholder, or lacks {port} although "
            "backend.url is not set.",
            "Correct the command.",
        ),
        "server_not_told": (
            "This option is meant for the server, but neither a request (in the dialect that backend.dialect sets) "
            "nor backend.command would pass it on.",
            "Leave this option out, and configure the server itself if it has an equivalent option.",
        ),
        "server_processes": (
            "Several processes are requested, but a single process sends all requests to the server.",
            "Leave this option out, and use the server's own options for replicas.",
        ),
        "no_meter_elsewhere": (
            "The chosen meter reads this machine, but the server runs on another machine.",
            "Use energy=auto (the energy is then null), or run lem on the server's machine.",
        ),
        "api_key_in_config": (
            "The server's API key is in the configuration, which is written to files that people publish.",
            "Put the key into the environment variable named by backend.api_key_env.",
        ),
    },
)

OPTIONS_INADVISABLE = _rules(
    "inadvisable",
    "options",
    {
        "no_effect_sampling": (
            "A sampling option is set, but the decoder does not sample.",
            "Set decoder.do_sample=true, or leave this option out.",
        ),
        "no_effect_bits": (
            "A bit width is set, but quantization is off.",
            "Set quantization.quantization=true, or leave this option out.",
        ),
        "no_effect_4bit_option": (
            "An option for 4-bit weights is set, but the weights are not loaded in 4 bits.",
            "Set quantization.load_in_4bit=true, or leave this option out.",
        ),
        "no_effect_compile_mode": (
            "A torch.compile mode is set, but torch.compile is off.",
            "Set backend.torch_compile=true, or leave this option out.",
        ),
        "no_effect_degree": (
            "A degree of parallelism is set without a strategy.",
            "Set parallelism.strategy. To split the prompts among several processes, set num_processes instead.",
        ),
        "no_effect_warmup_limit": (
            "This option applies only to a warm-up that runs until latencies are steady, but the warm-up has a fixed "
            "number of prompts.",
            "Set warmup.until_cv, for example to 0.05, or leave this option out.",
        ),
        "no_effect_streaming_warmup": (
            "streaming.warmup_requests is set, but tokens are not timed, or warmup.until_cv decides the length of the "
            "warm-up.",
            "Turn on streaming (--streaming) and leave warmup.until_cv unset, or leave this option out.",
        ),
        "no_effect_goodput_limit": (
            "A limit for goodput is set, but tokens are not timed.",
            "Turn on streaming (--streaming), or leave this option out.",
        ),
        "no_effect_traffic": (
            "A value is set, but the chosen traffic pattern does not use it.",
            "Choose a traffic.pattern that uses the value, or leave this option out.",
        ),
        "no_effect_cooldown_limit": (
            "A time limit for cooling down is set, but cooldown.to_c is not.",
            "Set cooldown.to_c, or leave this option out.",
        ),
        "no_effect_trace": (
            "A power trace is named, but the chosen meter does not read power traces.",
            "Use energy=replay, or leave this option out.",
        ),
        "no_effect_country": (
            "A country is set, but a carbon intensity or a trace of intensities is set as well and takes precedence.",
            "Leave one of the two options out.",
        ),
        "no_effect_carbon_intensity": (
            "Both a constant carbon intensity and a trace of intensities are set; the trace is used.",
            "Leave one of the two options out.",
        ),
        "no_effect_speculation": (
            "An option for speculative decoding is set, but speculative decoding is off.",
            "Choose a drafting method, or leave this option out.",
        ),
        "no_effect_start_limit": (
            "A time limit for starting a server is set, but lem does not start the server.",
            "Set backend.command, or leave this option out.",
        ),
        "no_weights_to_change": (
            "An adapter, a revision or quantized weights are requested, but the simulated backend loads no weights. "
            "The result rows would still name these options.",
            "Leave this option out, or choose another backend.",
        ),
        "no_effect_outside_campaign": (
            "backend.drift or backend.carry_over is set, but the simulated backend applies these only to the cells of "
            "a campaign.",
            "Use lem campaign, or leave this option out.",
        ),
        "seeds_of_batches": (
            "TensorRT-LLM draws the samples of concurrent requests from one random stream, so the same seed does not "
            "reproduce the same tokens.",
            "Decode greedily, or use batching.batch_size=1 with a recent version.",
        ),
    },
)

OPTIONS_WARNING = _rules(
    "warning",
    "options",
    {
        "no_effect_token_budget": (
            "A token budget is set, but only dynamic batching uses one. The value may come from a preset.",
            "Use batching.strategy=dynamic, or set this option to null.",
        ),
        "no_effect_warmup_prompts": (
            "A number of warm-up prompts is set, but warmup.until_cv or streaming.warmup_requests decides the length "
            "of the warm-up. The value may come from a preset.",
            "Leave this option out, or turn off the option that overrides it.",
        ),
        "no_effect_batching": (
            "Batching options are set, but with traffic, the openai backend sends each request when it arrives and "
            "forms no batches. The result rows would still name the batching strategy. The options may come from a "
            "preset.",
            "Leave out the batching options, or leave out traffic.pattern.",
        ),
        "no_effect_strategy": (
            "A parallelism strategy with degree 1 splits nothing.",
            "Raise parallelism.degree, unless this is the first point of a sweep over degrees.",
        ),
        "no_effect_carbon": (
            "A country, a carbon intensity or a trace of intensities is set, but no energy is measured.",
            "Choose a meter, or leave this option out.",
        ),
        "no_effect_meter_option": (
            "An option is set, but the chosen meter does not use it. The value may come from a preset.",
            "Choose a meter that uses this option, or leave this option out.",
        ),
        "no_effect_on_simulation": (
            "An option that affects how a model runs is set, but the simulated backend runs no model.",
            "Choose another backend, unless you are only trying out a grid.",
        ),
        "no_cache": (
            "Without a key/value cache, every step recomputes the whole sequence, but the reported FLOPs count each "
            "token only once.",
            "Set this option to dynamic, unless running without a cache is part of your study.",
        ),
        "remote_code": (
            "trust_remote_code is on: Python code that comes with the model runs with your permissions.",
            "Leave trust_remote_code off unless you trust the model's authors.",
        ),
    },
)

MACHINE_IMPOSSIBLE = _rules(
    "impossible",
    "machine",
    {
        # ------------------------------------------------------ GPUs
        "no_gpu": (
            "An option needs a GPU, but none is visible.",
            "Run on a machine with a visible GPU (see lem gpus), or leave this option out.",
        ),
        "no_gpu_in_use": (
            "The meter reads the GPUs in use, but the run uses no GPU.",
            "Use energy=auto, or run on a GPU.",
        ),
        "unknown_gpu": (
            "An entry of gpus matches no visible GPU, or more than one.",
            "Name a GPU as lem gpus does: by its index, from 0, or by its UUID, which begins with GPU- or MIG-.",
        ),
        "repeated_gpu": ("An entry of gpus names the same GPU as an earlier entry.", "Name each GPU once."),
        "too_few_gpus": (
            "More GPUs are needed than are visible, or than are named in gpus.",
            "Lower this value, make more GPUs visible, or name more of them in gpus.",
        ),
        "pipeline_needs_gpus": (
            "Pipeline parallelism spreads the model's layers over GPUs, but the run uses the CPU.",
            "Run on GPUs, or choose another strategy.",
        ),
        "tensor_parallel_beside_gpus": (
            "The model is to be split over processes on the CPU, but transformers uses GPUs if any are visible.",
            "Hide the GPUs with CUDA_VISIBLE_DEVICES='', or run on the GPUs.",
        ),
        "attention_needs_gpu": (
            "The attention kernel runs on NVIDIA GPUs only.",
            "Run on a GPU, or leave this option out.",
        ),
        "attention_unsupported": (
            "The GPU is too old for the attention kernel: flash attention 2 needs Ampere (compute capability 8.0), "
            "and flash attention 3 needs Hopper (9.0).",
            "Use sdpa.",
        ),
        "compile_unsupported": (
            "The GPU is too old for torch.compile, which needs Volta (compute capability 7.0).",
            "Turn this option off.",
        ),
        # ------------------------------------------------------ installed software
        "missing_package": (
            "An option needs a Python package that is not installed.",
            "Install the package, or leave this option out.",
        ),
        "continuous_unavailable": (
            "transformers cannot batch this model continuously: the installed version is too old, or the model does "
            "not work correctly with a paged key/value cache.",
            "Use static batching, or backend=vllm.",
        ),
        "missing_quantizer": (
            "The checkpoint's quantization method needs a package that is not installed, or it needs a GPU and the run "
            "uses none.",
            "Install the package, run on a GPU, or choose a checkpoint in another format.",
        ),
        "unknown_engine_arg": (
            "The installed version of the engine does not have this argument.",
            "Correct the name, leave this option out, or install a version that has the argument.",
        ),
        "engine_arg_type": (
            "The installed version of the engine expects a value of a different type.",
            "Correct the value, or leave this option out.",
        ),
        "sampler_ignores": (
            "The installed version of TensorRT-LLM accepts the sampling option, but its sampler ignores it.",
            "Turn this option off, or install a version with a sampler that supports the option.",
        ),
        "kv_cache_on_cpu": (
            "vLLM's CPU build does not support this dtype for the key/value cache.",
            "Use auto, float16 or bfloat16.",
        ),
        "rapl_unreadable": (
            "The processor's energy counters are missing or cannot be read.",
            "Use energy=codecarbon for an estimate instead.",
        ),
        "meter_broken": (
            "The chosen meter does not work on this machine.",
            "Repair the meter's installation, or use energy=none to run without a meter.",
        ),
        # ------------------------------------------------------ servers
        "server_unreachable": (
            "Nothing is listening at the server's address.",
            "Start the server, or have lem start it with backend.command.",
        ),
        "server_port_taken": (
            "lem would start a server at an address that is already in use.",
            "Stop the program at that address, choose another port, or leave out backend.command to use that program "
            "as the server.",
        ),
        "missing_program": (
            "The program that starts the server is neither on PATH nor next to the Python that runs lem.",
            "Install the program, or give its full path.",
        ),
        "no_api_key": (
            "The environment variable for the server's API key is not set.",
            "Set the variable, or leave this option out.",
        ),
    },
)

MACHINE_INADVISABLE = _rules(
    "inadvisable",
    "machine",
    {
        "no_effect_gpus": ("GPUs are named, but the run uses no GPU.", "Run on a GPU, or leave this option out."),
        "bfloat16_emulated": (
            "GPUs older than Ampere (compute capability 8.0) either emulate bfloat16, which is slow, or cannot run it.",
            "Use float16.",
        ),
        "unknown_engine_value": (
            "The installed version of the engine does not have this kernel, dtype, format or method, unless a plugin "
            "adds it.",
            "Correct the name, or leave this option out.",
        ),
        "prefixes_not_forgotten": (
            "The installed version of TensorRT-LLM caches prefixes of prompts but cannot drop those cached during the "
            "warm-up.",
            "Set this option to false, or update TensorRT-LLM.",
        ),
    },
)

MACHINE_WARNING = _rules(
    "warning",
    "machine",
    {
        "unused_gpus": (
            "More GPUs are named than the run uses, so only the first ones are used and metered.",
            "Name fewer GPUs, or raise num_processes or parallelism.degree.",
        ),
        "no_effect_without_gpu": (
            "An option concerns the GPUs in use, but the run uses no GPU.",
            "Run on a GPU, or leave this option out.",
        ),
        "more_processes_than_cores": (
            "There are more processes than processor cores, so the processes slow each other down.",
            "Lower the number of processes.",
        ),
        "float16_on_cpu": (
            "Most CPUs emulate float16, which is slow.",
            "Use float32 or bfloat16 for numbers that matter.",
        ),
    },
)

FILES_IMPOSSIBLE = _rules(
    "impossible",
    "files",
    {
        "no_tokenizer": ("The model's directory has no tokenizer.", "Save the tokenizer next to the weights."),
        "git_lfs_pointer": (
            "A file of the model is a Git LFS pointer: the repository was cloned without its large files.",
            "Fetch the large files with git lfs pull, or download the model again.",
        ),
        "weights_incomplete": (
            "Some of the model's weight files are missing, truncated or damaged.",
            "Download these files again.",
        ),
        "config_value_type": (
            "A value in the model's config.json has a type that transformers rejects.",
            "Correct config.json, or download it again.",
        ),
        "weights_mismatched": (
            "The shapes of the weights in the model's files do not match its config.json.",
            "Correct config.json, or download the model again.",
        ),
        "model_unsupported": (
            "transformers cannot load the model for text generation: it does not know the model's type, or the type "
            "is for another task (for example, a multimodal type).",
            "Choose a causal language model (many multimodal models have a text-only variant), or update transformers.",
        ),
        "pad_token_outside": (
            "The model's padding token is outside its vocabulary, so transformers cannot create the embedding layer.",
            "Correct pad_token_id in the model's config.json.",
        ),
        "bad_chat_template": (
            "The model's chat template cannot wrap a prompt: it raises an error, leaves the prompt out, or is a "
            "set of templates without a default.",
            "Turn this option off, or correct the template that comes with the tokenizer.",
        ),
        "encoder_decoder": (
            "The model is an encoder-decoder; lem measures decoder-only models.",
            "Choose a decoder-only model.",
        ),
        "needs_remote_code": (
            "The model cannot be loaded without the Python code that comes with it, and trust_remote_code is off.",
            "Set trust_remote_code=true if you trust the model's authors.",
        ),
        "no_adapter": (
            "The adapter is neither a directory with a LoRA adapter nor a hub id.",
            "Name a directory with an adapter_config.json, or the hub id of an adapter.",
        ),
        "no_chat_template": ("The model has no chat template to wrap the prompts in.", "Turn this option off."),
        "no_room_for_prompts": (
            "The output alone could fill the longest sequence that the model and the backend's options allow, leaving "
            "no room for a prompt.",
            "Lower max_output_tokens.",
        ),
        "too_few_positions": (
            "This option allows sequences with more tokens than the model has positions.",
            "Lower the value, or leave this option out.",
        ),
        "tensor_parallel_unsplittable": (
            "transformers has no tensor-parallel plan for the model, cannot divide its attention heads evenly, or is "
            "too old.",
            "Use data_parallel or pipeline_parallel, or a degree that divides the numbers of attention and key/value "
            "heads.",
        ),
        "float32_on_tensorrt": (
            "The model would run in float32, which TensorRT-LLM accepts but most of its kernels do not support.",
            "Use bfloat16 or float16.",
        ),
        "one_end_token_held_off": (
            "min_output_tokens is set and the model has several end tokens, but TensorRT-LLM can suppress only one.",
            "Set min_output_tokens to 0, or use another backend.",
        ),
        "head_size_on_cpu": (
            "The model's attention heads are narrower than vLLM's CPU kernels support.",
            "Use backend=pytorch, or run on a GPU.",
        ),
        "traffic_trace": (
            "The arrival trace cannot be read, has fewer arrivals than the run has requests, or contains a time that "
            "is infinite, NaN or more than 30 days after the first.",
            "Name a CSV file with a column t_s that gives each request's arrival in seconds.",
        ),
        "bad_carbon_trace": (
            "The file with the carbon intensity over time is missing or cannot be read.",
            "Name a CSV file in the format that docs/concepts/methodology.md describes under CO2e.",
        ),
        "bad_trace": (
            "The replay meter's power trace is not set, is missing or cannot be read.",
            "Name a CSV file with the columns t_s and power_w.",
        ),
        "results_unwritable": (
            "The results directory cannot be created or written to.",
            "Choose another directory with --results-dir or io.results_dir, or correct the permissions.",
        ),
    },
)

FILES_INADVISABLE = _rules(
    "inadvisable",
    "files",
    {
        "weights_unscaled": (
            "The model's weights are integers, and its config.json does not state how they were quantized. "
            "transformers would use the integers themselves, without their scales.",
            "Add quantization_config to config.json, or use the original weights.",
        ),
        "weights_missing": (
            "The model's files lack weights that the model needs. transformers would initialize them at random, "
            "differently each time.",
            "Choose a complete checkpoint of a causal language model.",
        ),
        "not_a_decoder": (
            "The model was trained to read text in both directions, not to continue it.",
            "Choose a causal language model.",
        ),
        "tokenizer_too_large": (
            "The tokenizer has tokens without an embedding in the model; prompts that contain one of these tokens "
            "cannot run.",
            "Use the tokenizer that belongs to the model.",
        ),
        "padding_changes_tokens": (
            "transformers does not mask padding for this type of model. In a batch of prompts of different lengths, "
            "the shorter prompts produce different tokens than they would alone.",
            "Use batching.batch_size=1.",
        ),
        "no_effect_input_limit": (
            "The limit on prompt length is at least the length of the longest sequence that the model and the "
            "backend's options allow.",
            "Lower the limit, leaving room for the output, or leave this option out.",
        ),
        "no_effect_revision": (
            "A revision is named, but the model does not come from the hub.",
            "Leave this option out.",
        ),
        "no_effect_dataset_option": (
            "A configuration or a file of a hub dataset is named, but the prompts are local or built into lem.",
            "Leave this option out.",
        ),
    },
)

# The rules for an experiment whose values are all valid individually: they concern its options, the machine and files.
EXPERIMENT_RULES: dict[str, Rule] = (
    OPTIONS_IMPOSSIBLE
    | OPTIONS_INADVISABLE
    | OPTIONS_WARNING
    | MACHINE_IMPOSSIBLE
    | MACHINE_INADVISABLE
    | MACHINE_WARNING
    | FILES_IMPOSSIBLE
    | FILES_INADVISABLE
)

# Problems in config files and overrides, found by `lem.config` before it creates an experiment.
FILE_RULES: dict[str, Rule] = _rules(
    "impossible",
    "files",
    {
        # ------------------------------------------------------ the text of a file
        "missing_file": ("The config file does not exist.", "Correct the path."),
        "unreadable_file": (
            "The path is a directory, or the file cannot be opened.",
            "Name a file, or correct its permissions.",
        ),
        "not_utf8": ("The text is not UTF-8.", "Save the file as UTF-8."),
        "yaml_syntax": (
            "The text is not valid YAML, or an override on the command line has a syntax error.",
            "Correct the syntax; quote strings that contain : or #.",
        ),
        "too_large": (
            "A file exceeds a limit (on size, string length, nesting, aliases or inheritance) that no real "
            "configuration reaches.",
            "Look for content that was pasted or generated by accident.",
        ),
        "several_documents": ("The file contains several YAML documents.", "Split the file, or remove the line ---."),
        "forbidden_tag": (
            "A YAML tag (!…) requests something other than plain data.",
            "Remove the tag: config files cannot run code.",
        ),
        "duplicate_key": ("A mapping contains the same key twice.", "Remove one of the two."),
        "bad_key": (
            "A key is not a string: it is a number, for example, or a word such as on, which YAML reads as a boolean.",
            "Quote the key, or correct it.",
        ),
        "not_a_mapping": ("The file does not map keys to values.", "Write `key: value`."),
        "forbidden_key": (
            "The key is a setting of Hydra itself, which config files cannot change.",
            "Set the key on the command line (hydra.…=…).",
        ),
        # ------------------------------------------------------ commands, code and keys named in files
        "command_not_agreed": (
            "A file names a program that lem would start with your permissions, and you have not agreed to this.",
            "Check the command. Then agree when lem asks on a terminal (it asks once), or pass --allow-command.",
        ),
        "code_not_agreed": (
            "A file makes lem run a model's or an engine's Python code with your permissions, and you have not agreed "
            "to this.",
            "Check the code. Then agree when lem asks on a terminal (it asks once), or pass --allow-code.",
        ),
        "key_not_agreed": (
            "A file makes lem send an API key from an environment variable to another machine, and you have not agreed "
            "to this.",
            "Check the address. Then agree when lem asks on a terminal (it asks once), or pass --allow-key.",
        ),
        # ------------------------------------------------------ inheritance
        "bad_defaults": (
            "A file's `defaults` is not a list of files to inherit from. The list may also contain options such as "
            "`backend: pytorch`.",
            "Write `defaults: [base]`, and preferably write options such as `backend: pytorch` outside this list.",
        ),
        "missing_parent": (
            "The file inherits from a file that does not exist.",
            "Correct the name, which is relative to this file.",
        ),
        "inheritance_cycle": (
            "A file inherits from itself, directly or through other files.",
            "Break the cycle: edit the `defaults` of one file.",
        ),
        # ------------------------------------------------------ values from any source
        "unknown_key": (
            "The key does not exist.",
            "Correct the key; the message names similar keys, if there are any, and docs/reference/configuration.md "
            "lists all keys.",
        ),
        "unknown_option": (
            "The value is not one of the available choices.",
            "Use one of the choices listed in the message.",
        ),
        "wrong_type": (
            "The value has the wrong type for its key.",
            'Correct the value; "4" is a string, and 4 is a number.',
        ),
        "out_of_range": (
            "The value is outside the allowed range, or does not have the allowed form.",
            "Choose a value that the message allows.",
        ),
        "missing_value": (
            "A value that must be set is missing, or is still the placeholder ???.",
            "Set the value, or remove the line.",
        ),
        "bad_interpolation": (
            "An interpolation ${…} cannot be resolved: the key or variable does not exist, or the interpolation refers "
            "to itself.",
            "Correct the interpolation; `${oc.env:NAME,default}` provides a default.",
        ),
        "secret": (
            "The value contains your hub token, but configurations are written to files that people publish.",
            "Leave this option out; the hub's client reads HF_TOKEN from the environment.",
        ),
    },
) | _rules(
    "warning",
    "files",
    {
        "empty_file": ("The file sets no values, so every value keeps its default.", "Set at least one value."),
        "no_model": (
            "No model is named: the file can serve as a base for other files, but not as an experiment.",
            "Set model, or give --model.",
        ),
    },
)

RULES: dict[str, Rule] = EXPERIMENT_RULES | FILE_RULES


@dataclass(frozen=True)
class Objection:
    """A reason not to run an experiment, or to warn about it: the broken rule, the option concerned, and the facts.

    `fact` says what is wrong in this case, with the actual values. The rule supplies the severity and the remedy.

    Raises:
        KeyError: no rule has this code.
    """

    code: str
    path: str
    fact: str

    def __post_init__(self) -> None:
        EXPERIMENT_RULES[self.code]

    @property
    def severity(self) -> Severity:
        """The severity of the rule."""
        return EXPERIMENT_RULES[self.code].severity

    @property
    def scope(self) -> Scope:
        """What the rule checks: the options alone, the machine, or files."""
        return EXPERIMENT_RULES[self.code].scope

    @property
    def remedy(self) -> str:
        """What to do about the objection."""
        return EXPERIMENT_RULES[self.code].remedy

    @property
    def message(self) -> str:
        """The fact and the remedy, without path and code."""
        return f"{self.fact} {self.remedy}"

    def __str__(self) -> str:
        return f"{self.path}: {self.message} [{self.code}]"


def without_effect(code: str, path: str, fact: str) -> Objection:
    """Return an objection to an option that would be accepted but ignored; `fact` says why."""
    return Objection(code, path, f"it would have no effect: {fact}")
