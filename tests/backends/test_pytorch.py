"""The pytorch backend against transformers used directly, on models that are no Llama and really end their outputs."""

import gc
import json
import shutil
import weakref
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

from lem.backends import make_backend
from lem.backends.pytorch import Pytorch, check_devices
from lem.errors import RunError
from lem.machine.gpu import Gpu
from lem.machine.host import Host
from lem.spec.engines import PytorchBackend
from lem.spec.experiment import Batching, Dataset, Decoder, Experiment, Quantization
from lem.workload import models
from lem.workload.datasets import load_prompts
from tests.hosts import EVERY_PACKAGE, FakeHost, bare
from tests.models_for_tests import NEW_TOKENS, POSITIONS, gpt2, mistral, mixed_prompts, mixtral, qwen2, write_prompts

pytestmark = pytest.mark.engines


GPUS = (Gpu(0, "GPU-0", "NVIDIA", 80 * 2**30),)
NO_GPU, ONE_GPU = Host(gpus=()), Host(gpus=GPUS)
NEUTRAL = Decoder()
SAMPLING = Decoder(do_sample=True)
BUILDERS = {"gpt2": gpt2, "qwen2": qwen2, "mixtral": mixtral}
STRATEGIES = ("static", "dynamic", "sorted_static", "sorted_dynamic", "continuous")


def test_an_instance_of_the_gpu_that_is_metered_is_accepted_and_another_gpu_is_not():
    # CUDA gives a MIG instance an id of its own.
    cuda = SimpleNamespace(
        device_count=lambda: 1,
        set_device=lambda _: None,
        get_device_properties=lambda _: SimpleNamespace(uuid="7d1c"),
    )
    torch, device = SimpleNamespace(cuda=cuda), SimpleNamespace(type="cuda", index=0)
    for metered in (
        replace(GPUS[0], mig=True),
        replace(GPUS[0], mig_uuid="MIG-0-0"),
        replace(GPUS[0], uuid="GPU-7d1c"),
    ):
        check_devices(torch, [device], [metered])
    with pytest.raises(RunError, match="the driver's is GPU-0"):
        check_devices(torch, [device], GPUS)


# ------------------------------------------------------------------ models and prompts
@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return {name: build(tmp_path_factory.mktemp("models") / name) for name, build in BUILDERS.items()}


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    file = write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", mixed_prompts(50))
    return load_prompts(Dataset(path=str(file)), seed=0).texts


@pytest.fixture(scope="session")
def alone(folders, texts):
    """The output of plain transformers for each prompt alone."""
    return {name: generate_alone(folder, texts) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def adapter(folders, tmp_path_factory):
    import peft
    import torch

    torch.manual_seed(5)
    # Without the usual initialisation, with which an untrained adapter changes nothing.
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["c_attn"],
        fan_in_fan_out=True,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    peft.get_peft_model(_model(folders["gpt2"]), lora).save_pretrained(folder)
    return folder


# ------------------------------------------------------------------ generating with transformers and with lem
def generate_alone(folder, texts, *, seed=None, adapter=None, **options):
    """Return each prompt's new tokens from transformers' own loop: no batch, no padding, no lem code."""
    import torch
    from transformers import AutoTokenizer

    model, tokenizer = _model(folder), AutoTokenizer.from_pretrained(folder)
    if adapter is not None:
        import peft

        model = peft.PeftModel.from_pretrained(model, adapter)
    outputs = []
    for index, text in enumerate(texts):
        if seed is not None:
            torch.manual_seed(seed + index)  # lem seeds each batch, and here a batch is one prompt
        inputs = tokenizer(text, return_tensors="pt")
        new = model.generate(**inputs, **{"max_new_tokens": NEW_TOKENS, "do_sample": False} | options)
        outputs.append(tuple(new[0, inputs["input_ids"].shape[1] :].tolist()))
    return outputs


def _model(folder):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def experiment(folder, *, batch_size=4, **changes):
    options = {"backend": PytorchBackend(device="cpu"), "max_output_tokens": NEW_TOKENS}
    options["batching"] = Batching(batch_size=batch_size)
    return Experiment(model=str(folder), **options | changes)


def load(wanted):
    backend = make_backend(wanted)
    backend.start()
    backend.load()
    return backend


def run(wanted, texts):
    backend = load(wanted)
    batches = backend.generate(backend.encode(texts))
    generations = sorted((g for batch in batches for g in batch), key=lambda g: g.index)
    assert [g.index for g in generations] == list(range(len(texts)))
    return generations


def outputs(wanted, texts):
    return [g.token_ids for g in run(wanted, texts)]


def forward_calls(backend, texts):
    """Return, for each forward pass, the number of input tokens and the kind of cache."""
    calls = []

    def note(module, args, options):
        calls.append((options["input_ids"].shape[1], type(options.get("past_key_values")).__name__))

    hook = backend._loaded.model.register_forward_pre_hook(note, with_kwargs=True)
    list(backend.generate(backend.encode(texts)))
    hook.remove()
    return calls


# ------------------------------------------------------------------ work done while the device is busy
@pytest.mark.parametrize("strategy", ["static", "continuous"])
def test_work_is_called_in_each_forward_pass_before_its_result_is_awaited(folders, texts, strategy, monkeypatch):
    monkeypatch.setattr(Pytorch, "_computes_apart", True)  # as on a GPU
    backend = load(experiment(folders["gpt2"], batching=Batching(strategy=strategy, batch_size=4)))
    seen = []
    assert backend.call_while_busy(lambda: seen.append(getattr(backend._runner, "_prefill_end_ns", None)))
    passes = len(forward_calls(backend, texts[:8]))
    assert len(seen) == passes > 0
    if strategy == "static":
        assert [at for at, end_ns in enumerate(seen) if end_ns is None] == [0, passes // 2], "twice, for two prefills"
    assert not backend.call_while_busy(None)
    list(backend.generate(backend.encode(texts[:8])))
    assert len(seen) == passes


def test_nothing_that_a_forward_pass_returned_is_kept_after_its_batch(folders, texts):
    """Otherwise, the cache of a batch would take up memory beside that of the next one."""
    backend, kept = load(experiment(folders["gpt2"])), []

    def keep(_module, _args, output):
        kept.append(weakref.ref(output.past_key_values))

    backend._loaded.model.register_forward_hook(keep)
    for _ in backend.generate(backend.encode(texts[:8])):
        gc.collect()
        assert kept
        assert not any(cache() for cache in kept)


def test_a_cpu_is_not_busy_while_python_runs(folders):
    assert not load(experiment(folders["gpt2"])).call_while_busy(lambda: None)


# ------------------------------------------------------------------ tokens and counts
@pytest.mark.parametrize(("name", "strategy"), list(product(BUILDERS, STRATEGIES)))
def test_batches_write_what_each_prompt_alone_writes(folders, texts, alone, name, strategy):
    batching = Batching(strategy=strategy, batch_size=4, max_tokens_per_batch=120)
    generations = run(experiment(folders[name], batching=batching), texts)
    assert [g.token_ids for g in generations] == alone[name]
    assert [len(g.token_ids) for g in generations] == [len(output) for output in alone[name]]


@pytest.mark.parametrize("name", BUILDERS)
def test_outputs_end_by_one_end_token_or_by_the_limit(folders, texts, name):
    ends = _model(folders[name]).generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends)
    generations = run(experiment(folders[name]), texts)
    stopped = [g.token_ids for g in generations if g.finish_reason == "stop"]
    limited = [g.token_ids for g in generations if g.finish_reason == "length"]
    assert min(len(stopped), len(limited)) > 10
    assert all(output[-1] in ends and not ends.intersection(output[:-1]) for output in stopped)
    assert all(len(output) == NEW_TOKENS and not ends.intersection(output) for output in limited)
    assert len({len(output) for output in stopped}) > 5


@pytest.mark.parametrize("name", BUILDERS)
def test_inputs_are_the_tokenizers_own_without_padding(folders, texts, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    encoded = load(experiment(folders[name])).encode(texts)
    assert [list(p.token_ids) for p in encoded] == [tokenizer(text)["input_ids"] for text in texts]


def test_model_without_an_end_token_runs_to_the_limit(folders, texts, tmp_path):
    folder = with_generation_config(folders["qwen2"], tmp_path / "endless", eos_token_id=None)
    change_json(folder / "config.json", eos_token_id=None)
    change_json(folder / "tokenizer_config.json", eos_token=None)
    generations = run(experiment(folder), texts[:8])
    assert {(g.finish_reason, len(g.token_ids)) for g in generations} == {("length", NEW_TOKENS)}


# ------------------------------------------------------------------ decoder
DETERMINISTIC = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
DRAWN = {"temperature": 0.4, "top_k": 3, "top_p": 0.5, "min_p": 0.3, **DETERMINISTIC}


@pytest.mark.parametrize("option", DETERMINISTIC)
def test_option_of_the_greedy_decoder_arrives(folders, texts, alone, option):
    wanted = {option: DETERMINISTIC[option]}
    expected = generate_alone(folders["gpt2"], texts, **wanted)
    assert expected != alone["gpt2"]
    assert outputs(experiment(folders["gpt2"], batch_size=1, decoder=Decoder(**wanted)), texts) == expected


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("gpt2", "repetition_penalty", 1.7),
        ("qwen2", "repetition_penalty", 1.7),
        ("gpt2", "no_repeat_ngram_size", 1),
        ("gpt2", "no_repeat_ngram_size", 2),
    ],
)
def test_option_of_the_greedy_decoder_does_not_take_padding_for_text(folders, texts, name, option, value):
    # Padding comes before a prompt, like text; GPT-2 pads with the end token, which a penalty or ban would suppress.
    expected = generate_alone(folders[name], texts, **{option: value})
    assert outputs(experiment(folders[name], decoder=Decoder(**{option: value})), texts) == expected


@pytest.mark.parametrize("option", DRAWN)
def test_option_of_the_sampling_decoder_arrives(folders, texts, option):
    neutral = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    wanted = neutral | {option: DRAWN[option]}
    expected = generate_alone(folders["gpt2"], texts[:12], seed=3, **wanted)
    assert expected != generate_alone(folders["gpt2"], texts[:12], seed=3, **neutral)
    assert outputs(experiment(folders["gpt2"], batch_size=1, seed=3, decoder=Decoder(**wanted)), texts[:12]) == expected


def test_neutral_sampling_is_from_the_whole_distribution(folders, texts):
    # transformers' own default is top_k=50.
    expected = generate_alone(folders["gpt2"], texts[:12], seed=3, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    assert outputs(experiment(folders["gpt2"], batch_size=1, seed=3, decoder=SAMPLING), texts[:12]) == expected


@pytest.mark.parametrize("decoder", [NEUTRAL, SAMPLING], ids=["greedy", "sampling"])
def test_defaults_that_ship_with_a_model_change_nothing(folders, texts, tmp_path, decoder):
    shipped = {"do_sample": True, "temperature": 0.3, "top_k": 2, "top_p": 0.5, "min_p": 0.2}
    shipped |= {"repetition_penalty": 1.9, "no_repeat_ngram_size": 2, "max_length": 20, "min_length": 19}
    opinionated = with_generation_config(folders["gpt2"], tmp_path / "opinionated", **shipped)
    assert generate_alone(opinionated, texts[:8]) != generate_alone(folders["gpt2"], texts[:8])
    plain, changed = (outputs(experiment(f, decoder=decoder), texts) for f in (folders["gpt2"], opinionated))
    assert changed == plain


def with_generation_config(folder, copy, **changes):
    shutil.copytree(folder, copy)
    change_json(copy / "generation_config.json", **changes)
    return copy


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ------------------------------------------------------------------ engine options
def test_growing_cache_takes_one_token_a_step(folders, texts):
    calls = forward_calls(load(experiment(folders["gpt2"])), texts[:4])
    assert [tokens for tokens, _ in calls[1:]] == [1] * (len(calls) - 1)
    assert {cache for _, cache in calls} == {"DynamicCache"}


@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_size_of_the_cache_is_that_of_the_largest_batch(folders, texts, name, cache):
    backend = load(experiment(folders[name], backend=PytorchBackend(device="cpu", cache_implementation=cache)))
    prompts = backend.encode(texts[:7])
    assert backend.peak_memory().kv_cache_bytes is None
    sizes = {}
    for batch in (prompts[:4], prompts[4:]):
        longest = max(len(p.token_ids) for p in batch)
        (made,) = backend.generate(batch)
        # The last token is never fed back; a static cache has room for the longest possible output.
        tokens = longest + (NEW_TOKENS if cache == "static" else max(len(g.token_ids) for g in made)) - 1
        # 2 layers, keys and values with 2 heads of 16, 4 bytes each.
        sizes[len(batch) * (longest + max(len(g.token_ids) for g in made))] = len(batch) * tokens * 2 * 2 * 2 * 16 * 4
    expected = None if cache == "none" else sizes[max(sizes)]
    assert backend.peak_memory().kv_cache_bytes == expected
    backend.reset_peak_memory()
    assert backend.peak_memory().kv_cache_bytes is None


@pytest.mark.parametrize("name", BUILDERS)
def test_static_cache_is_used_and_writes_the_same(folders, texts, alone, name):
    wanted = experiment(folders[name], backend=PytorchBackend(device="cpu", cache_implementation="static"))
    assert {cache for _, cache in forward_calls(load(wanted), texts[:4])} == {"StaticCache"}
    assert outputs(wanted, texts) == alone[name]


@pytest.mark.parametrize("name", BUILDERS)
def test_without_a_cache_each_step_takes_the_whole_sequence_and_writes_the_same(folders, texts, alone, name):
    wanted = experiment(folders[name], backend=PytorchBackend(device="cpu", cache_implementation="none"))
    calls = forward_calls(load(wanted), texts[:4])
    assert [tokens - calls[0][0] for tokens, _ in calls] == list(range(len(calls)))
    assert {cache for _, cache in calls} == {"NoneType"}
    assert outputs(wanted, texts) == alone[name]


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_attention_kernel_is_used_and_writes_the_same(folders, texts, alone, kernel):
    wanted = experiment(folders["gpt2"], backend=PytorchBackend(device="cpu", attn_implementation=kernel))
    assert load(wanted).engine_info().settings["attn_implementation"] == kernel
    assert outputs(wanted, texts) == alone["gpt2"]


@pytest.mark.parametrize(("precision", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_precision_arrives_in_the_weights(folders, texts, precision, size):
    wanted = experiment(folders["gpt2"], fp_precision=precision)
    backend = load(wanted)
    info = backend.model_info()
    assert info.dtype == precision
    assert info.weights_bytes == size * info.parameters
    assert sum(map(len, backend.generate(backend.encode(texts[:4])))) == 4


def test_automatic_precision_on_a_cpu_is_float32_whatever_the_checkpoint(folders, tmp_path):
    import torch

    half = tmp_path / "half"
    shutil.copytree(folders["gpt2"], half)
    _model(half).to(torch.bfloat16).save_pretrained(half)
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    assert load(experiment(half)).model_info().dtype == "float32"


def test_compiled_model_writes_the_same(folders, texts, alone):
    graphs, compiled = run_compiled(experiment(folders["gpt2"], max_output_tokens=2), texts[:1])
    assert graphs > 0
    assert compiled == [alone["gpt2"][0][:2]]


def test_model_with_an_adapter_is_compiled_too(folders, texts, adapter):
    graphs, _ = run_compiled(experiment(folders["gpt2"], max_output_tokens=1, adapter=str(adapter)), texts[:1])
    assert graphs > 0


def test_compiling_in_the_window_is_warned_about_and_having_compiled_before_is_not(folders, texts):
    from torch._dynamo import reset

    reset()
    wanted = experiment(folders["gpt2"], max_output_tokens=1)
    backend = load(replace(wanted, backend=PytorchBackend(device="cpu", torch_compile=True)))
    warned = []
    for _ in range(2):
        list(backend.generate(backend.encode(texts[:1])))
        warned.append("compiled_in_window" in [each.code for each in backend.warnings()])
    assert warned == [True, False]


def run_compiled(wanted, texts):
    """Return the number of graphs that the compiler made, and the outputs. Each new shape of a step costs seconds."""
    from torch._dynamo import reset
    from torch._dynamo.utils import counters

    reset()
    counters.clear()
    written = outputs(replace(wanted, backend=PytorchBackend(device="cpu", torch_compile=True)), texts)
    return counters["stats"]["unique_graphs"], written


# ------------------------------------------------------------------ LoRA
def test_adapter_changes_the_outputs_as_it_does_in_transformers(folders, texts, alone, adapter):
    expected = generate_alone(folders["gpt2"], texts, adapter=adapter)
    different = sum(a != b for a, b in zip(expected, alone["gpt2"], strict=True))
    assert different > 40
    assert outputs(experiment(folders["gpt2"], adapter=str(adapter)), texts) == expected


def test_adapter_is_recorded_and_its_parameters_are_counted(folders, adapter):
    plain = load(experiment(folders["gpt2"])).model_info()
    adapted = load(experiment(folders["gpt2"], adapter=str(adapter))).model_info()
    assert (plain.adapter, adapted.adapter) == (None, str(adapter))
    # Two layers, rank 4, from 64 to 3·64.
    assert adapted.parameters - plain.parameters == 2 * 4 * (64 + 3 * 64)
    assert adapted.architecture == "GPT2LMHeadModel"


# ------------------------------------------------------------------ continuous batching
CONTINUOUS = Batching(strategy="continuous", batch_size=4)


def test_layers_that_see_a_window_of_the_text_are_batched_continuously_too(tmp_path, texts):
    folder = mistral(tmp_path)
    expected = generate_alone(folder, texts[:20])
    assert outputs(experiment(folder, batching=CONTINUOUS), texts[:20]) == expected


@pytest.mark.parametrize(("kernel", "used"), [("eager", "paged|eager"), ("sdpa", "sdpa")])
def test_attention_kernel_is_used_with_continuous_batching_and_given_back(folders, texts, alone, kernel, used):
    options = PytorchBackend(device="cpu", attn_implementation=kernel)
    backend = load(experiment(folders["gpt2"], backend=options, batching=CONTINUOUS))
    prompts = backend.encode(texts[:8])
    assert backend.engine_info().settings["attn_implementation"] == used
    assert backend.engine_info().settings["cache_implementation"] == "paged"
    written = {g.index: g.token_ids for batch in backend.generate(prompts) for g in batch}
    assert [written[i] for i in range(8)] == alone["gpt2"][:8]
    model = backend._loaded.model
    backend.close()
    assert model.config._attn_implementation == kernel


def test_adapter_and_options_of_the_decoder_arrive_with_continuous_batching(folders, texts, adapter):
    wanted = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    expected = generate_alone(folders["gpt2"], texts, adapter=adapter, min_new_tokens=6, **wanted)
    assert expected != generate_alone(folders["gpt2"], texts, adapter=adapter)
    changes = {"adapter": str(adapter), "decoder": Decoder(**wanted), "min_output_tokens": 6}
    assert outputs(experiment(folders["gpt2"], batching=CONTINUOUS, **changes), texts) == expected


@pytest.mark.parametrize("option", ["", *DRAWN])
def test_sampling_is_that_of_each_prompt_alone_with_continuous_batching(folders, texts, option):
    neutral = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    wanted = neutral | ({option: DRAWN[option]} if option else {})
    expected = generate_alone(folders["gpt2"], texts[:12], seed=3, **wanted)
    changes = {"batching": CONTINUOUS, "seed": 3, "decoder": Decoder(**wanted)}
    assert outputs(experiment(folders["gpt2"], **changes), texts[:12]) == expected


def test_model_without_an_end_token_runs_to_the_limit_with_continuous_batching(folders, texts, tmp_path):
    folder = with_generation_config(folders["qwen2"], tmp_path / "endless", eos_token_id=None)
    change_json(folder / "config.json", eos_token_id=None)
    change_json(folder / "tokenizer_config.json", eos_token=None)
    generations = run(experiment(folder, batching=CONTINUOUS, min_output_tokens=5), texts[:8])
    assert {(g.finish_reason, len(g.token_ids)) for g in generations} == {("length", NEW_TOKENS)}


def test_cache_is_as_large_as_what_can_run_at_the_same_time_needs(folders, texts):
    backend = load(experiment(folders["qwen2"], batching=CONTINUOUS))
    prompts = backend.encode(texts)
    longest = max(len(p.token_ids) for p in prompts) + NEW_TOKENS
    # 2 layers, keys and values with 2 heads of 16, 4 bytes each.
    needed = 4 * longest * 2 * 2 * 2 * 16 * 4
    assert needed <= backend.peak_memory().kv_cache_bytes < 2 * needed
    assert int(backend.engine_info().settings["kv_cache_tokens"]) >= 4 * longest
    allocated = backend.peak_memory().kv_cache_bytes
    list(backend.generate(prompts[:2]))
    assert backend.peak_memory().kv_cache_bytes == allocated


def test_cache_that_does_not_fit_is_refused_in_a_sentence(folders, texts):
    wanted = experiment(folders["qwen2"], batching=Batching(strategy="continuous", batch_size=65536))
    backend = load(replace(wanted, max_output_tokens=POSITIONS - 100))
    backend._runner._model.config.num_hidden_layers = 100_000
    backend._runner._model.config.layer_types = None
    with pytest.raises(
        RunError, match=r"Too little memory for a key/value cache for 65536 requests .* Lower batching.batch_size"
    ):
        backend.encode(["the river"])


def test_model_whose_attention_cannot_be_exchanged_is_refused(folders, monkeypatch):
    from transformers import GPT2LMHeadModel

    monkeypatch.setattr(GPT2LMHeadModel, "_supports_attention_backend", False)
    with pytest.raises(RunError, match=r"cannot replace the attention implementation of .*; use static batching"):
        load(experiment(folders["gpt2"], batching=CONTINUOUS))


def test_error_in_a_step_comes_out_where_it_happened(folders, texts, monkeypatch):
    backend = load(experiment(folders["gpt2"], batching=CONTINUOUS))
    prompts = backend.encode(texts)
    generations = backend.generate(prompts)
    next(generations)
    monkeypatch.setattr(backend._loaded.model, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(generations)


def test_old_transformers_is_refused_with_the_version_that_is_needed(folders, monkeypatch):
    monkeypatch.setattr("lem.backends.pytorch_continuous.version", lambda: "5.18.2")
    found, text = objections(experiment(folders["gpt2"], batching=CONTINUOUS))
    assert found == [("impossible", "batching.strategy")]
    assert "transformers>=5.19" in text
    monkeypatch.setattr("lem.backends.pytorch_continuous.version", lambda: "6.0.0.dev0")
    assert objections(experiment(folders["gpt2"], batching=CONTINUOUS)) == ([], "")


# ------------------------------------------------------------------ inputs
def test_chat_template_wraps_each_prompt_as_the_tokenizer_does(folders, texts):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders["mixtral"])
    encoded = load(experiment(folders["mixtral"], chat_template=True)).encode(texts)
    for prompt, text in zip(encoded, texts, strict=True):
        turns = [{"role": "user", "content": text}]
        wrapped = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)
        assert list(prompt.token_ids) == wrapped["input_ids"]
        assert prompt.token_ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(encoded[0].token_ids) == f"<s>[user] {texts[0]}\n[assistant]"


def test_without_chat_template_the_text_gets_only_the_tokenizers_beginning(folders, texts):
    first = load(experiment(folders["mixtral"])).encode(texts[:1])[0]
    assert first.token_ids[0] == 1
    assert first.token_ids.count(1) == 1


def test_prompt_beyond_the_models_positions_is_refused_with_the_length_that_fits(folders, texts):
    backend = load(experiment(folders["gpt2"]))
    too_long = " ".join(["river"] * POSITIONS)
    with pytest.raises(RunError, match=rf"Prompt 1 has .* max_input_tokens to {POSITIONS - NEW_TOKENS} or less"):
        backend.encode([texts[0], too_long])


def test_prompt_that_just_fits_with_its_output_runs_and_one_more_token_does_not(folders):
    wanted = experiment(folders["gpt2"], min_output_tokens=NEW_TOKENS)
    fits, too_long = (" river" * count for count in (POSITIONS - NEW_TOKENS, POSITIONS - NEW_TOKENS + 1))
    (generation,) = run(wanted, [fits])
    assert len(generation.token_ids) == NEW_TOKENS
    with pytest.raises(RunError, match=rf"has {POSITIONS - NEW_TOKENS + 1} tokens"):
        load(wanted).encode([too_long])
    # The remedy in the message works.
    assert load(replace(wanted, max_input_tokens=POSITIONS - NEW_TOKENS)).encode([too_long])[0].truncated


def test_prompt_without_tokens_is_refused(folders, texts):
    with pytest.raises(RunError, match="turns prompt 1 into zero tokens"):
        load(experiment(folders["gpt2"])).encode([texts[0], ""])


# ------------------------------------------------------------------ objections
def objections(wanted, host=NO_GPU):
    found = Pytorch.objections(wanted, models.find(wanted.model), host)
    return [(o.severity, o.path) for o in found], " ".join(map(str, found))


def test_nothing_speaks_against_the_defaults(folders):
    assert objections(experiment(folders["gpt2"], backend=PytorchBackend())) == ([], "")
    assert objections(experiment(folders["gpt2"], backend=PytorchBackend()), ONE_GPU) == ([], "")


def test_cuda_without_a_gpu_is_impossible(folders):
    wanted = experiment(folders["gpt2"], backend=PytorchBackend(device="cuda"))
    assert objections(wanted)[0] == [("impossible", "backend.device")]
    assert objections(wanted, ONE_GPU)[0] == []


@pytest.mark.parametrize(
    ("kernel", "package"), [("flash_attention_2", "flash_attn"), ("flash_attention_3", "flash_attn_interface")]
)
def test_flash_attention_without_its_package_is_impossible(folders, kernel, package):
    wanted = experiment(folders["gpt2"], fp_precision="bfloat16", backend=PytorchBackend(attn_implementation=kernel))
    found, text = objections(wanted, FakeHost(GPUS, lacks=EVERY_PACKAGE))
    assert found == [("impossible", "backend.attn_implementation")]
    assert package in text


def test_flash_attention_on_a_cpu_or_in_float32_is_impossible(folders):
    options = PytorchBackend(attn_implementation="flash_attention_2")
    assert "only on NVIDIA GPUs" in objections(experiment(folders["gpt2"], backend=options))[1]
    in_float32 = experiment(folders["gpt2"], backend=options, fp_precision="float32")
    assert "not support float32" in objections(in_float32, ONE_GPU)[1]


def test_quantization_without_its_package_is_impossible(folders):
    wanted = experiment(folders["gpt2"], quantization=Quantization(quantization=True, load_in_8bit=True))
    found, text = objections(wanted, bare())
    assert found == [("impossible", "quantization.quantization")]
    assert "lem[bitsandbytes]" in text


def test_adapter_without_its_package_is_impossible(folders, adapter):
    wanted = experiment(folders["gpt2"], adapter=str(adapter))
    found, text = objections(wanted, bare())
    assert found == [("impossible", "adapter")]
    assert "lem[lora]" in text
    assert objections(wanted) == ([], "")


def test_encoder_decoder_model_is_impossible(folders, tmp_path):
    Path(tmp_path, "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    assert ("impossible", "model") in objections(experiment(tmp_path))[0]


def test_chat_template_is_impossible_only_where_the_tokenizer_has_none(folders):
    assert objections(experiment(folders["gpt2"], chat_template=True))[0] == [("impossible", "chat_template")]
    assert objections(experiment(folders["mixtral"], chat_template=True))[0] == []


def test_chat_template_of_a_model_without_a_tokenizer_is_impossible(folders, tmp_path):
    shutil.copy(folders["gpt2"] / "config.json", tmp_path)
    assert ("impossible", "chat_template") in objections(experiment(tmp_path, chat_template=True))[0]


def test_half_precision_on_a_cpu_is_only_warned_about(folders):
    wanted = experiment(folders["gpt2"], fp_precision="float16", backend=PytorchBackend())
    assert objections(wanted)[0] == [("warning", "fp_precision")]
    assert objections(wanted, ONE_GPU)[0] == []


def test_running_without_a_cache_is_only_warned_about(folders):
    wanted = experiment(folders["gpt2"], backend=PytorchBackend(cache_implementation="none"))
    assert objections(wanted)[0] == [("warning", "backend.cache_implementation")]
