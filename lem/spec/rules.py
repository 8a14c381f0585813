"""The catalogue of what can speak against an experiment: a code, how grave it is, what it means, what to do.

The single source of the codes and of their severities: an objection with any other code cannot be made, and the page
`docs/rules.md` is generated from it. Knows no experiment and no machine; what provokes a rule stands where its
facts are known: `lem.spec.conflicts`, `lem.runner.preflight` and the backends; for config files, `lem.config`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# impossible: it cannot run; inadvisable: it can, but --force must be given; warning: it runs, and says so.
Severity = Literal["impossible", "inadvisable", "warning"]
# What must be looked at to know: the options alone, the machine and what is installed on it, or files.
Scope = Literal["options", "machine", "files"]


@dataclass(frozen=True)
class Rule:
    """A kind of objection: how grave, what it is about, what it means and what to do about it."""

    severity: Severity
    scope: Scope
    meaning: str
    remedy: str


# Of experiments, each value of which is right by itself.
OBJECTIONS: dict[str, Rule] = {
    # -------------------------------------------------------------- options that exclude each other
    "min_above_max": Rule(
        "impossible", "options", "More output tokens are asked for at least than at most.", "Lower min_output_tokens."
    ),
    "no_token_budget": Rule(
        "impossible",
        "options",
        "Dynamic batching fills its batches by a token budget, and there is none.",
        "Set batching.max_tokens_per_batch, or use static batching.",
    ),
    "bits_conflict": Rule("impossible", "options", "4-bit and 8-bit weights are both asked for.", "Choose one."),
    "no_bits": Rule(
        "impossible",
        "options",
        "Quantization is on, and nothing says to how many bits.",
        "Set quantization.load_in_8bit or quantization.load_in_4bit.",
    ),
    "processes_unlike_degree": Rule(
        "impossible",
        "options",
        "The strategy starts as many processes as its degree, and num_processes says another number.",
        "Leave num_processes out, or set it to parallelism.degree.",
    ),
    "pipeline_processes": Rule(
        "impossible",
        "options",
        "A pipeline's layers lie on the GPUs of one process, and several processes are asked for.",
        "Set num_processes to 1; parallelism.degree is the number of GPUs.",
    ),
    "tensor_parallel_quantized": Rule(
        "impossible",
        "options",
        "bitsandbytes' weights cannot be split over processes.",
        "Use pipeline_parallel or data_parallel, or leave quantization off.",
    ),
    "no_continuous_batching": Rule(
        "impossible",
        "options",
        "Continuous batching fills a request's place as soon as it is finished, from a cache of pages; the backend or "
        "an option that is set does not go with that.",
        "Choose static batching or leave the option out, as the sentence says; or use another backend.",
    ),
    "continuous_unavailable": Rule(
        "impossible",
        "machine",
        "transformers cannot batch this model continuously: the installed version is too old, or the model's attention "
        "cannot be run on a cache of pages.",
        "Choose static batching, or backend=vllm.",
    ),
    "quantized_by_vllm": Rule(
        "impossible",
        "options",
        "The options of bitsandbytes are the pytorch backend's; vLLM has methods of its own.",
        "Set backend.quantization, or leave it out for a checkpoint that is quantized already.",
    ),
    "quantized_by_tensorrt": Rule(
        "impossible",
        "options",
        "The options of bitsandbytes are the pytorch backend's; TensorRT-LLM runs checkpoints that are quantized.",
        "Leave them out, and name such a checkpoint.",
    ),
    "no_ngram_ban": Rule(
        "impossible",
        "options",
        "Repeated n-grams are to be forbidden, and vLLM cannot.",
        "Set decoder.no_repeat_ngram_size to 0.",
    ),
    "temperature_raised": Rule(
        "impossible",
        "options",
        "vLLM raises temperatures below 0.01 to that, and says so only in its log.",
        "Set 0.01 or more, or decode greedily.",
    ),
    "speculation_min_p": Rule(
        "impossible",
        "options",
        "vLLM's speculative decoding cannot sample with min_p.",
        "Set decoder.min_p to 0, or leave backend.speculative out.",
    ),
    "speculation_incomplete": Rule(
        "impossible",
        "options",
        "vLLM's speculative decoding lacks a value that its method needs, or its n-gram lengths exclude each other.",
        "Set the value that the sentence names.",
    ),
    "speculation_ngram_ban": Rule(
        "impossible",
        "options",
        "While tokens are drafted, TensorRT-LLM refuses to ban n-grams, or bans them a step late.",
        "Set decoder.no_repeat_ngram_size to 0, or leave backend.speculative out.",
    ),
    "engine_arg_of_lem": Rule(
        "impossible",
        "options",
        "An argument of the engine has an option of lem's, or is lem's to give.",
        "Use that option; the sentence names it.",
    ),
    "engine_arg_code": Rule(
        "impossible",
        "options",
        "An engine argument names Python code that the engine would load and run, with all your rights.",
        "Leave it out, or set trust_remote_code to true if you trust its authors.",
    ),
    "dropped_engine_arg": Rule(
        "impossible",
        "options",
        "An argument that former versions of the engine had.",
        "As the sentence says.",
    ),
    "no_server": Rule(
        "impossible",
        "options",
        "Neither the address of a server is given nor a command that starts one.",
        "Set backend.url or backend.command.",
    ),
    "bad_server_url": Rule(
        "impossible",
        "options",
        "The server's address is no URL, or holds more than scheme, host, port and path.",
        "Write it as http://host:port.",
    ),
    "bad_server_command": Rule(
        "impossible",
        "options",
        "The command that starts the server cannot be read, has an unknown placeholder, or lacks {port}.",
        "Correct it as the sentence says.",
    ),
    "server_not_told": Rule(
        "impossible",
        "options",
        "An option concerns what the server does, and nothing would tell the server: no request has a field for it in "
        "this dialect, and the command has no placeholder for it.",
        "Write the placeholder into backend.command, or leave the option out.",
    ),
    "server_processes": Rule(
        "impossible",
        "options",
        "Several processes are asked for, and a server is asked by one; how it runs is its own affair.",
        "Leave the option out; a server has options of its own for replicas.",
    ),
    "no_meter_elsewhere": Rule(
        "impossible",
        "options",
        "A meter of this machine is asked for, and the server runs on another one.",
        "Use energy=auto, which is null there, or measure on the server's machine.",
    ),
    "api_key_in_config": Rule(
        "impossible",
        "options",
        "The server's key stands in the configuration, which is written to files that people publish.",
        "Put it into the environment variable that backend.api_key_env names.",
    ),
    "no_effect_start_limit": Rule(
        "inadvisable",
        "options",
        "A limit for the start of a server is set, and none is started.",
        "Set backend.command, or leave it out.",
    ),
    "attention_float32": Rule(
        "impossible",
        "options",
        "Flash attention computes in half precision only, and float32 is asked for.",
        "Use fp_precision float16 or bfloat16, or another attention kernel.",
    ),
    "unknown_country": Rule(
        "impossible",
        "options",
        "No carbon intensity is known for the country.",
        "Correct the code, or give energy.carbon_intensity_g_per_kwh.",
    ),
    # -------------------------------------------------------------- options without effect
    "no_effect_sampling": Rule(
        "inadvisable",
        "options",
        "An option of sampling is set, and the decoder does not sample.",
        "Set decoder.do_sample to true, or leave the option out.",
    ),
    "no_effect_bits": Rule(
        "inadvisable",
        "options",
        "Bits of quantized weights are chosen, and quantization is off.",
        "Set quantization.quantization to true, or leave the bits out.",
    ),
    "no_effect_4bit_option": Rule(
        "inadvisable",
        "options",
        "An option of 4-bit weights is set, and the weights are not in 4 bits.",
        "Leave it out, or load in 4 bits.",
    ),
    "no_effect_compile_mode": Rule(
        "inadvisable",
        "options",
        "A mode of torch.compile is chosen, and nothing is compiled.",
        "Set backend.torch_compile to true, or leave the mode out.",
    ),
    "no_effect_speculation": Rule(
        "inadvisable",
        "options",
        "An option of speculative decoding is set, and neither a method nor a draft model is.",
        "Set backend.speculative.method (tensorrt: decoding_type), or leave the option out.",
    ),
    "seeds_of_batches": Rule(
        "inadvisable",
        "options",
        "TensorRT-LLM draws the tokens of all requests that run at the same time from one stream of random numbers: "
        "with sampling the same seed does not give the same tokens again.",
        "Decode greedily, or use batching.batch_size=1; force it where the lengths of outputs may differ.",
    ),
    "no_effect_trace": Rule(
        "inadvisable",
        "options",
        "A recorded power trace is named, and the meter reads none.",
        "Use energy=replay, or leave the trace out.",
    ),
    "no_effect_warmup_limit": Rule(
        "inadvisable",
        "options",
        "A limit of the warm-up until latencies are steady is set, and the warm-up has a fixed length.",
        "Set warmup.until_cv, or leave the limit out.",
    ),
    "no_effect_warmup_prompts": Rule(
        "warning",
        "options",
        "A number of warm-up prompts is set, and warmup.until_cv or streaming.warmup_requests decides how long the "
        "warm-up is. Presets set one.",
        "Nothing, or choose one of the two.",
    ),
    "no_effect_streaming_warmup": Rule(
        "inadvisable",
        "options",
        "A number of warm-up requests for streaming is set, and it does not count.",
        "Turn streaming on (--streaming), or leave it out.",
    ),
    "traffic_incomplete": Rule(
        "impossible", "options", "The pattern of traffic needs a value that is not set.", "Set the value it names."
    ),
    "traffic_not_divisible": Rule(
        "impossible",
        "options",
        "The requests that are to be in the system at any time cannot be shared evenly by the processes.",
        "Use a multiple of the number of processes.",
    ),
    "traffic_trace": Rule(
        "impossible",
        "files",
        "The trace of arrivals cannot be read, has fewer arrivals than there are requests, or holds a time that is not "
        "finite or more than 30 days after the first.",
        "Name a CSV file with a column t_s: when each request arrives, in seconds.",
    ),
    "no_effect_traffic": Rule(
        "inadvisable",
        "options",
        "A value of another pattern of traffic is set.",
        "Choose the pattern that reads it, or leave it out.",
    ),
    "no_effect_batching": Rule(
        "warning",
        "options",
        "Batching is set, and with traffic a server is sent each request as it arrives; the rows name the batching all "
        "the same. Presets set some.",
        "Nothing, or leave batching or traffic.pattern out.",
    ),
    "no_effect_goodput_limit": Rule(
        "inadvisable",
        "options",
        "A limit for goodput is set, and tokens are not timed.",
        "Turn streaming on (--streaming), or leave it out.",
    ),
    "no_effect_cooldown_limit": Rule(
        "inadvisable",
        "options",
        "A limit of waiting for a temperature is set, and no temperature is waited for.",
        "Set cooldown.to_c, or leave the limit out.",
    ),
    "no_effect_country": Rule(
        "inadvisable",
        "options",
        "Both a country and a carbon intensity are given: the intensity wins.",
        "Leave one of them out.",
    ),
    "no_effect_degree": Rule(
        "inadvisable",
        "options",
        "A degree of parallelism is set, and there is no strategy.",
        "Choose parallelism.strategy, or set num_processes for processes that share the prompts.",
    ),
    "no_effect_strategy": Rule(
        "warning",
        "options",
        "A strategy of degree 1 spreads nothing.",
        "Raise parallelism.degree; as the first point of a sweep over degrees it is right.",
    ),
    "no_effect_token_budget": Rule(
        "warning",
        "options",
        "A token budget is set, and static batching has none. Presets set one.",
        "Use dynamic batching, or set batching.max_tokens_per_batch to null.",
    ),
    "no_effect_carbon": Rule(
        "warning",
        "options",
        "A country or a carbon intensity is given, and no energy is measured that it could turn into CO2e.",
        "Choose a meter, or leave it out.",
    ),
    "no_effect_meter_option": Rule(
        "warning",
        "options",
        "An option of energy is set that the chosen meter does not read. Presets set some.",
        "Nothing, or choose a meter that reads it.",
    ),
    "no_effect_on_simulation": Rule(
        "warning",
        "options",
        "The simulated backend runs no model, so that an option of how a model runs does nothing.",
        "Nothing, if you try out a grid; else choose another backend.",
    ),
    "no_weights_to_change": Rule(
        "inadvisable",
        "options",
        "The simulated backend loads no weights, and other weights are asked for: quantized ones, a revision, "
        "an adapter. The results would bear their names.",
        "Leave the option out, or choose another backend.",
    ),
    "no_cache": Rule(
        "warning",
        "options",
        "Without a key/value cache every step recomputes the whole sequence; FLOPs count each token once.",
        "Use backend.cache_implementation=dynamic unless that is what you study.",
    ),
    "remote_code": Rule(
        "warning",
        "options",
        "Python code that comes with the model runs, with all your rights.",
        "Leave trust_remote_code off unless you trust the model's authors.",
    ),
    # -------------------------------------------------------------- devices
    "no_gpu": Rule(
        "impossible",
        "machine",
        "A GPU is asked for by an option, and none is visible.",
        "See lem gpus and CUDA_VISIBLE_DEVICES; or leave the option out.",
    ),
    "no_gpu_in_use": Rule(
        "impossible",
        "machine",
        "The meter reads the GPUs in use, and none is.",
        "Use energy=auto, or run on a GPU.",
    ),
    "unknown_gpu": Rule(
        "impossible",
        "machine",
        "An entry of gpus means no visible GPU, or more than one.",
        "See lem gpus; indices count the visible ones from 0, UUIDs begin with GPU- or MIG-.",
    ),
    "repeated_gpu": Rule("impossible", "machine", "A GPU stands more than once in gpus.", "Name each once."),
    "too_few_gpus": Rule(
        "impossible",
        "machine",
        "More GPUs are needed than are visible, or than gpus names.",
        "Lower the number of processes or the degree, or name more GPUs.",
    ),
    "pipeline_needs_gpus": Rule(
        "impossible",
        "machine",
        "A pipeline spreads a model's layers over GPUs, and the run would be on the CPU.",
        "Run on GPUs, or choose another strategy.",
    ),
    "tensor_parallel_beside_gpus": Rule(
        "impossible",
        "machine",
        "A model is to be split over processes on the CPU; transformers takes the GPUs where any is visible.",
        "Hide them (CUDA_VISIBLE_DEVICES=''), or run on them.",
    ),
    "no_effect_gpus": Rule(
        "inadvisable",
        "machine",
        "GPUs are named, and the run uses none.",
        "Leave gpus out, or run on them.",
    ),
    "unused_gpus": Rule(
        "warning",
        "machine",
        "More GPUs are named than the processes use; only the first ones are used and metered.",
        "Name as many as there are processes (pipeline_parallel: parallelism.degree).",
    ),
    "no_effect_without_gpu": Rule(
        "warning",
        "machine",
        "An option concerns the GPUs in use, and none is.",
        "Nothing, or leave the option out.",
    ),
    "more_processes_than_cores": Rule(
        "warning",
        "machine",
        "More processes than processor cores share the CPU: they slow each other.",
        "Lower the number of processes.",
    ),
    # -------------------------------------------------------------- what devices and packages can do
    "server_unreachable": Rule(
        "impossible",
        "machine",
        "Nobody takes connections at the server's address.",
        "Start the server, or have lem start it (backend.command).",
    ),
    "server_port_taken": Rule(
        "impossible",
        "machine",
        "A server is to be started at an address that another program uses.",
        "End that program, choose another port, or leave backend.command out to use it.",
    ),
    "missing_program": Rule(
        "impossible",
        "machine",
        "The program that starts the server is neither on PATH nor beside the Python that runs lem.",
        "Install it, or give its whole path.",
    ),
    "no_api_key": Rule(
        "impossible",
        "machine",
        "The environment variable that is to hold the server's key is not set.",
        "Set it, or leave backend.api_key_env out.",
    ),
    "missing_package": Rule(
        "impossible",
        "machine",
        "An option needs a Python package that is not installed.",
        "Install it; the sentence names it.",
    ),
    "attention_needs_gpu": Rule(
        "impossible",
        "machine",
        "The attention kernel runs on NVIDIA GPUs only.",
        "Use sdpa or eager on pytorch, CPU_ATTN on vllm, or leave it out.",
    ),
    "attention_unsupported": Rule(
        "impossible",
        "machine",
        "The GPU is older than the attention kernel can use: flash attention 2 begins with Ampere (compute capability "
        "8.0), flash attention 3 with Hopper (9.0).",
        "Use sdpa.",
    ),
    "compile_unsupported": Rule(
        "impossible",
        "machine",
        "torch.compile makes code for GPUs from Volta on (compute capability 7.0), and this one is older.",
        "Leave backend.torch_compile off.",
    ),
    "bfloat16_emulated": Rule(
        "inadvisable",
        "machine",
        "GPUs before Ampere (compute capability 8.0) have no bfloat16 arithmetic: it is emulated and slow, or fails.",
        "Use float16.",
    ),
    "float16_on_cpu": Rule(
        "warning",
        "machine",
        "Most CPUs emulate float16, which is slow.",
        "Use float32 or bfloat16 for numbers that matter.",
    ),
    "unknown_engine_arg": Rule(
        "impossible",
        "machine",
        "The installed version of the engine has no such argument.",
        "Correct it (the sentence names the nearest), leave it out, or install another version.",
    ),
    "engine_arg_type": Rule(
        "impossible",
        "machine",
        "The installed version of the engine takes values of another type for an argument.",
        "Give it a value of the type that the sentence names.",
    ),
    "unknown_engine_value": Rule(
        "inadvisable",
        "machine",
        "The installed version of the engine has no such kernel, dtype, format or method by itself; a plugin may "
        "bring it.",
        "Correct it, or force it where a plugin has it.",
    ),
    "sampler_ignores": Rule(
        "impossible",
        "machine",
        "The installed TensorRT-LLM takes the sampling option, and its sampler does not look at it.",
        "Set it to the value that does nothing, or install another version.",
    ),
    "prefixes_not_forgotten": Rule(
        "inadvisable",
        "machine",
        "The installed TensorRT-LLM reuses prefixes of prompts and cannot be made to forget those of the warm-up.",
        "Set backend.kv_cache.enable_block_reuse to false, or install another version.",
    ),
    "kv_cache_on_cpu": Rule(
        "impossible",
        "machine",
        "vLLM's build for the CPU has no key/value cache of that dtype.",
        "Set backend.kv_cache_dtype to auto, float16 or bfloat16.",
    ),
    "rapl_unreadable": Rule(
        "impossible",
        "machine",
        "The processor's energy counters are not there or not readable.",
        "As the sentence says, or use energy=codecarbon for an estimate.",
    ),
    # -------------------------------------------------------------- model, prompts, results
    "no_tokenizer": Rule(
        "impossible", "files", "The model's directory has no tokenizer.", "Save one beside the weights."
    ),
    "no_room_for_prompts": Rule(
        "impossible",
        "files",
        "The output alone may take all of the model's positions.",
        "Lower max_output_tokens.",
    ),
    "no_effect_input_limit": Rule(
        "inadvisable",
        "files",
        "Prompts are cut to a length that the model cannot take anyway.",
        "Lower max_input_tokens below the model's positions less max_output_tokens, or leave it out.",
    ),
    "encoder_decoder": Rule(
        "impossible",
        "files",
        "The model is an encoder-decoder; lem measures decoder-only models.",
        "Choose a causal language model.",
    ),
    "too_few_positions": Rule(
        "impossible",
        "files",
        "More tokens are to fit into a sequence than the model has positions for.",
        "Lower backend.max_model_len, or leave it out.",
    ),
    "float32_on_tensorrt": Rule(
        "impossible",
        "files",
        "Most of TensorRT-LLM's kernels have no float32, which its arguments take all the same, and it is asked for or "
        "is the checkpoint's.",
        "Use fp_precision bfloat16 or float16.",
    ),
    "one_end_token_held_off": Rule(
        "impossible",
        "files",
        "Outputs of a least length are asked for, and the model has several end tokens, of which TensorRT-LLM can hold "
        "off one.",
        "Set min_output_tokens to 0, or use another backend.",
    ),
    "head_size_on_cpu": Rule(
        "impossible",
        "files",
        "The model's attention heads are narrower than vLLM's kernels for the CPU can take.",
        "Use backend=pytorch, or a GPU.",
    ),
    "needs_remote_code": Rule(
        "impossible",
        "files",
        "The model comes with Python code of its own, without which it cannot be loaded.",
        "Set trust_remote_code to true if you trust its authors.",
    ),
    "tensor_parallel_unsplittable": Rule(
        "impossible",
        "files",
        "transformers has no tensor-parallel plan for the model, or its attention heads cannot be shared evenly.",
        "Set parallelism.degree to a divisor of the heads, or use data_parallel or pipeline_parallel.",
    ),
    "no_chat_template": Rule(
        "impossible",
        "files",
        "Prompts are to be wrapped in the model's chat template, and it has none.",
        "Leave chat_template off.",
    ),
    "no_adapter": Rule(
        "impossible",
        "files",
        "There is no LoRA adapter where one is named.",
        "Name a directory with an adapter_config.json, or a hub id.",
    ),
    "no_effect_revision": Rule(
        "inadvisable",
        "files",
        "A revision is named, and the model does not come from the hub.",
        "Leave revision out.",
    ),
    "no_effect_dataset_option": Rule(
        "inadvisable",
        "files",
        "A configuration or a file of a hub dataset is named, and the prompts come from a local file or with lem.",
        "Leave dataset.config and dataset.files out.",
    ),
    "bad_trace": Rule(
        "impossible",
        "files",
        "The replay meter's trace is missing or cannot be read.",
        "Name a CSV file with the columns t_s and power_w in energy.trace.",
    ),
    "results_unwritable": Rule(
        "impossible",
        "files",
        "The results directory cannot be made or written to.",
        "Choose another with --results-dir or io.results_dir, or mend its permissions.",
    ),
}

# Of config files and of values, before they make an experiment; made by `lem.config`.
CONFIG_FAULTS: dict[str, Rule] = {
    # -------------------------------------------------------------- config files: their text and their keys
    "missing_file": Rule("impossible", "files", "There is no such config file.", "Correct the path."),
    "unreadable_file": Rule(
        "impossible",
        "files",
        "The path is a directory, or the file cannot be opened.",
        "Name a file, or mend its permissions.",
    ),
    "not_utf8": Rule("impossible", "files", "The text is not UTF-8.", "Save the file as UTF-8."),
    "yaml_syntax": Rule(
        "impossible", "files", "The text is not YAML, at the line and column named.", "Mend it; quote text with : or #."
    ),
    "too_large": Rule(
        "impossible",
        "files",
        "A file, a text in it, its nesting, its aliases or its inheritance goes beyond what any configuration needs.",
        "Look for what was pasted or generated by mistake.",
    ),
    "several_documents": Rule(
        "impossible", "files", "The file holds several YAML documents.", "Make a file of each, or remove the line ---."
    ),
    "forbidden_tag": Rule(
        "impossible",
        "files",
        "A YAML tag (!…) asks for something other than plain data.",
        "Remove the tag; no config file runs code.",
    ),
    "duplicate_key": Rule("impossible", "files", "A key stands twice in one mapping.", "Remove one."),
    "bad_key": Rule("impossible", "files", "A key is not a word.", "Correct it; all keys are words."),
    "not_a_mapping": Rule("impossible", "files", "The file is no mapping of keys to values.", "Write `key: value`."),
    "empty_file": Rule("warning", "files", "The file sets nothing: all values are the defaults.", "Set a value."),
    "forbidden_key": Rule(
        "impossible",
        "files",
        "A key that configures Hydra itself, which a config file cannot.",
        "Give it on the command line (hydra.…=…).",
    ),
    "bad_defaults": Rule(
        "impossible",
        "files",
        "The defaults of a file are not a list of files to inherit from and options to choose.",
        "Write `defaults: [base]`, and options as `backend: pytorch` outside of it.",
    ),
    "missing_parent": Rule(
        "impossible", "files", "The file inherits from one that is not there.", "Correct its name; it counts from here."
    ),
    "inheritance_cycle": Rule("impossible", "files", "A file inherits from itself.", "Remove one of the steps."),
    # -------------------------------------------------------------- values, whichever source they come from
    "unknown_key": Rule(
        "impossible",
        "files",
        "There is no such key.",
        "The sentence names the nearest; or see reference/configuration.",
    ),
    "unknown_option": Rule(
        "impossible",
        "files",
        "A value or an option is none of those there are.",
        "Choose one of those that the sentence names.",
    ),
    "wrong_type": Rule(
        "impossible", "files", "A value has another type than its key.", 'Correct it; "4" is a text and 4 a number.'
    ),
    "out_of_range": Rule("impossible", "files", "A value lies outside its range.", "Choose one inside."),
    "missing_value": Rule(
        "impossible", "files", "??? stands for a value that has to be given.", "Give it, or remove the line."
    ),
    "bad_interpolation": Rule(
        "impossible",
        "files",
        "An interpolation ${…} cannot be resolved: no such key, no such variable, or a circle.",
        "Correct it; `${oc.env:NAME,default}` has a default.",
    ),
    "secret": Rule(
        "impossible",
        "files",
        "A value holds the hub's token, and configurations are written to files that people publish.",
        "Leave it out: the hub's client reads HF_TOKEN from the environment.",
    ),
    "no_model": Rule(
        "warning",
        "files",
        "No model is named: the file is a base for others, not an experiment.",
        "Set model, or give --model.",
    ),
}

CATALOGUE: dict[str, Rule] = OBJECTIONS | CONFIG_FAULTS


@dataclass(frozen=True)
class Objection:
    """What is wrong, at which key, and what to do about it; its code says how grave it is.

    Raises:
        KeyError: the catalogue has no such code.
    """

    code: str
    path: str
    reason: str
    remedy: str

    def __post_init__(self) -> None:
        OBJECTIONS[self.code]

    @property
    def severity(self) -> Severity:
        """How grave it is: the catalogue's word."""
        return OBJECTIONS[self.code].severity

    @property
    def scope(self) -> Scope:
        """What it is about: the options alone, the machine, or files."""
        return OBJECTIONS[self.code].scope

    @property
    def message(self) -> str:
        """The reason and the remedy, without key and code."""
        return f"{self.reason} {self.remedy}".rstrip()

    def __str__(self) -> str:
        return f"{self.path}: {self.message} [{self.code}]"


def without_effect(code: str, path: str, reason: str, remedy: str) -> Objection:
    """Object to an option that would be accepted and ignored."""
    return Objection(code, path, f"it would have no effect: {reason}", remedy)
