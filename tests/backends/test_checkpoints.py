"""Checkpoints that are incomplete, damaged or of another kind: what is refused before a run, and what is recorded."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lem.backends import backend_class, fit, make_backend
from lem.backends.checkpoint import as_sent
from lem.backends.pytorch_objections import objections
from lem.errors import ModelError, RunError
from lem.machine.host import Host
from lem.spec.engines import PytorchBackend, TensorrtBackend, VllmBackend
from lem.spec.experiment import Batching, Experiment
from lem.workload.models import find
from tests.hosts import CPU, IDEAL, FakeHost
from tests.models_for_tests import VOCABULARY, adapter, mixed_prompts
from tests.small_families import config_of, model_of, saved

pytestmark = pytest.mark.engines

TEXTS = mixed_prompts(6)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models") / "llama", model_of("llama"))


@pytest.fixture
def copied(llama, tmp_path):
    """Return a copy of the model to damage."""
    return shutil.copytree(llama, tmp_path / "copy")


def asked(folder, **changes):
    options = {"backend": PytorchBackend(device="cpu"), "max_output_tokens": 8, "batching": Batching(batch_size=2)}
    return Experiment(model=str(folder), **options | changes)


def found(folder, host: Host = CPU, **changes):
    return objections(asked(folder, **changes), find(str(folder)), host)


def codes(folder, host: Host = CPU, **changes):
    return {each.code for each in found(folder, host, **changes)}


def loaded(folder, *, forced=False, **changes):
    backend = make_backend(asked(folder, **changes))
    backend.forced = forced
    backend.start()
    backend.load()
    return backend


def run(backend, texts=TEXTS):
    backend.forget()
    prompts = backend.encode(texts)
    return sorted((g for batch in backend.generate(prompts) for g in batch), key=lambda g: g.index)


def warned(backend):
    return {each.code: each.text for each in backend.warnings()}


def change_weights(folder, change):
    """Rewrite a model's weights with a function of their names and tensors."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def change_json(folder, name, **values):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# ------------------------------------------------------------------ odd values
ODD_VALUES = ("x", [], {}, [[]], None, -1, 0, 1.5, 10**30, float("inf"))


@pytest.mark.parametrize("value", ODD_VALUES, ids=str)
@pytest.mark.parametrize("name", [*fit.SIZES, "quantization_config", "architectures", "model_type"])
def test_odd_value_in_a_config_is_no_traceback(copied, name, value):
    """Each value is refused, or leads to objections or to none; no value makes the checks fail or hang."""
    change_json(copied, "config.json", **{name: value})
    try:
        codes(copied)
        refusal = None
    except ModelError as error:
        refusal = str(error)
    assert refusal is None or re.fullmatch(rf"\S+config\.json: {name} is .+, not .+; correct the file\.", refusal)


@pytest.mark.parametrize("value", ODD_VALUES, ids=str)
def test_odd_limit_of_a_tokenizer_is_no_traceback(copied, value):
    change_json(copied, "tokenizer_config.json", model_max_length=value)
    (sent, _), *_ = as_sent(asked(copied), find(str(copied)), ["a prompt"])
    assert sent.token_ids


# ------------------------------------------------------------------ missing weights
def half_of_them(folder):
    change_weights(folder, lambda tensors: dict(sorted(tensors.items())[::2]))


def no_head(folder):
    change_weights(folder, lambda tensors: {name: w for name, w in tensors.items() if "lm_head" not in name})


def fewer_layers(folder):
    change_json(folder, "config.json", num_hidden_layers=3)


def one_kind_in_all_layers(folder):
    change_weights(folder, lambda tensors: {name: w for name, w in tensors.items() if "v_proj" not in name})


def the_last_norm(folder):
    change_weights(folder, lambda tensors: {name: w for name, w in tensors.items() if name != "model.norm.weight"})


def headless(folder):
    from transformers import AutoModel

    AutoModel.from_config(config_of("llama")).save_pretrained(folder)


def classifier(folder):
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_config(config_of("llama")).save_pretrained(folder)


LACKING = [half_of_them, no_head, fewer_layers, one_kind_in_all_layers, the_last_norm, headless, classifier]


@pytest.mark.parametrize("spoil", LACKING)
def test_missing_weights_refuse_the_run_while_loading_too(copied, spoil):
    spoil(copied)
    with pytest.raises(RunError, match=r"lacks weights, which transformers has initialized at random: .*--force"):
        loaded(copied)


@pytest.mark.parametrize("spoil", LACKING)
def test_missing_weights_are_foreseen_as_the_loader_reports_them(copied, spoil):
    spoil(copied)
    foreseen = fit.foreseen(find(str(copied)), asked(copied))
    reported = loaded(copied, forced=True)._loaded.fit
    assert reported.missing
    assert foreseen == reported
    (objection,) = [each for each in found(copied) if each.code == "weights_missing"]
    assert objection.severity == "inadvisable"


def test_forced_run_says_that_weights_are_random_and_which(copied):
    no_head(copied)
    backend = loaded(copied, forced=True)
    info = backend.model_info()
    assert info.random_weights
    assert info.weights_missing == ("lm_head.weight",)
    assert info.weights_unexpected == info.weights_mismatched == ()
    assert "lm_head.weight" in warned(backend)["random_weights"]


def test_complete_checkpoint_is_neither_warned_about_nor_compared(llama, monkeypatch):
    monkeypatch.setattr(fit, "_compared", lambda *_: pytest.fail("it was compared"))
    assert codes(llama) == set()
    backend = loaded(llama)
    info = backend.model_info()
    assert not info.random_weights
    assert (info.weights_missing, info.weights_unexpected, info.weights_mismatched) == ((), (), ())
    assert warned(backend) == {}


@pytest.mark.parametrize("kind", ["bloom", "deepseek_v3", "gemma3_text", "gpt2", "mamba", "mixtral", "opt", "rwkv"])
def test_complete_checkpoints_of_other_families_pass(tmp_path, kind):
    folder = saved(tmp_path / kind, model_of(kind))
    assert fit.foreseen(find(str(folder)), asked(folder)) == fit.Fit()
    assert not codes(folder, batching=Batching(batch_size=1)) & {"weights_missing", "weights_mismatched"}


def test_long_lists_of_weights_are_shortened_on_the_record():
    names = tuple(f"layer.{number}" for number in range(30))
    recorded = fit.Fit(missing=names).recorded
    assert recorded["weights_missing"] == (*names[:20], "… and 10 more")
    assert recorded["weights_unexpected"] == ()


def test_weights_that_are_not_used_are_warned_about_and_recorded(copied):
    change_json(copied, "config.json", num_hidden_layers=1)
    backend = loaded(copied)
    assert all(name.startswith("model.layers.1.") for name in backend.model_info().weights_unexpected)
    assert "model.layers.1." in warned(backend)["unused_weights"]
    assert not backend.model_info().random_weights


def test_weights_of_another_shape_are_refused_before_loading_and_while_loading(copied):
    change_json(copied, "config.json", intermediate_size=97)
    (objection,) = [each for each in found(copied) if each.code == "weights_mismatched"]
    assert "mlp.down_proj.weight (file: 64×96, model: 64×97)" in objection.fact
    with pytest.raises(RunError, match="transformers cannot load"):
        loaded(copied)


def test_adapter_that_lacks_matrices_counts_as_missing_weights(llama, tmp_path):
    folder = adapter(tmp_path / "lora", llama)
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    kept = {name: w for name, w in load_file(file).items() if "q_proj" not in name}
    assert run(loaded(llama, adapter=str(folder)))
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"lacks weights.*adapter"):
        loaded(llama, adapter=str(folder))
    assert loaded(llama, adapter=str(folder), forced=True).model_info().random_weights


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_model_that_reads_both_ways_is_objected_to_unless_it_was_made_a_decoder(tmp_path, kind):
    folder = saved(tmp_path / kind, model_of(kind))
    assert "not_a_decoder" in codes(folder)
    change_json(folder, "config.json", is_decoder=True)
    assert "not_a_decoder" not in codes(folder)


# ------------------------------------------------------------------ values that are not finite
def not_a_number(name):
    def change(tensors):
        tensors[name].view(-1)[0] = float("nan")
        return tensors

    return change


@pytest.mark.parametrize("strategy", ["static", "continuous"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight"])
def test_weights_that_are_not_numbers_are_warned_about(copied, strategy, name):
    change_weights(copied, not_a_number(name))
    backend = loaded(copied, batching=Batching(strategy=strategy, batch_size=2))
    run(backend)
    assert warned(backend)["not_finite"].endswith(f" or NaN: {len(TEXTS)}.")
    backend.forget()
    assert "not_finite" not in warned(backend)


@pytest.mark.parametrize("strategy", ["static", "continuous"])
def test_only_the_requests_whose_logits_are_not_finite_are_counted(copied, strategy):
    """Give one token's embedding a NaN; one prompt contains this token."""

    def change(tensors):
        tensors["model.embed_tokens.weight"][7] = float("inf")
        return tensors

    change_weights(copied, change)
    backend = loaded(copied, batching=Batching(strategy=strategy, batch_size=1))
    prompts = [each for each in backend.encode(TEXTS) if 7 not in each.token_ids]
    backend.forget()
    outputs = [g for batch in backend.generate(prompts) for g in batch]
    meeting = sum(7 in g.token_ids[:-1] for g in outputs)
    text = warned(backend).get("not_finite", " or NaN: 0.")
    assert text.endswith(f" or NaN: {meeting}.")
    poisoned = [type(prompts[0])(0, (5, 7, 9))]
    backend.forget()
    list(backend.generate(poisoned))
    assert warned(backend)["not_finite"].endswith(" or NaN: 1.")


# ------------------------------------------------------------------ files
def lfs_pointer(folder, name="model.safetensors"):
    (folder / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 42\n")


def cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def cut_in_the_header(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def error_page(folder):
    (folder / "model.safetensors").write_text("<html>404 Not Found</html>" * 10)


def not_there(folder):
    (folder / "model.safetensors").unlink()


def cut_archive(folder):
    import torch
    from safetensors.torch import load_file

    file = folder / "model.safetensors"
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()
    whole = folder / "pytorch_model.bin"
    whole.write_bytes(whole.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lfs_pointer, "git_lfs_pointer"),
        (lambda folder: lfs_pointer(folder, "tokenizer.json"), "git_lfs_pointer"),
        (cut_short, "weights_incomplete"),
        (cut_in_the_header, "weights_incomplete"),
        (empty, "weights_incomplete"),
        (error_page, "weights_incomplete"),
        (not_there, "weights_incomplete"),
        (cut_archive, "weights_incomplete"),
    ],
)
def test_file_that_cannot_be_used_is_refused_before_loading(copied, spoil, code):
    spoil(copied)
    (objection,) = [each for each in found(copied) if each.path == "model"]
    assert (objection.code, objection.severity) == (code, "impossible")
    assert "\n" not in str(objection)


def pickled(folder):
    """Rewrite the weights of a model as torch's archive."""
    import torch
    from safetensors.torch import load_file

    file = folder / "model.safetensors"
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()
    return folder


def pickled_in_shards(folder):
    """The same as two archives with an index."""
    import torch

    whole = torch.load(pickled(folder) / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    names = sorted(whole)
    weight_map = {name: f"pytorch_model-{1 + (i % 2)}.bin" for i, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        torch.save({name: whole[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("archive", [pickled, pickled_in_shards])
def test_pickled_weights_that_are_whole_pass(copied, archive):
    archive(copied)
    assert codes(copied) == set()
    assert run(loaded(copied))


@pytest.mark.parametrize("archive", [pickled, pickled_in_shards])
@pytest.mark.parametrize("spoil", [half_of_them, no_head, fewer_layers, headless])
def test_weights_that_archives_lack_are_foreseen_as_the_loader_reports_them(copied, spoil, archive):
    spoil(copied)
    archive(copied)
    foreseen = fit.foreseen(find(str(copied)), asked(copied))
    assert foreseen.missing
    assert foreseen == loaded(copied, forced=True)._loaded.fit
    assert "weights_missing" in codes(copied)


def test_shapes_of_archives_are_compared(copied):
    change_json(pickled(copied), "config.json", intermediate_size=97)
    assert "weights_mismatched" in codes(copied)


def test_missing_archive_of_an_index_is_refused_before_loading(copied):
    (pickled_in_shards(copied) / "pytorch_model-2.bin").unlink()
    (objection,) = found(copied)
    assert (objection.code, "pytorch_model-2.bin" in objection.fact) == ("weights_incomplete", True)


# ------------------------------------------------------------------ the hub's cache, and other engines
@pytest.fixture
def cached(copied, tmp_path, monkeypatch):
    """The model as the hub's client leaves it on disk: a snapshot of links to blobs, with no network."""
    from huggingface_hub import constants

    name, commit = "someone/llama", "0123456789abcdef0123456789abcdef01234567"
    top = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    (top / "blobs").mkdir(parents=True)
    (top / "refs").mkdir()
    (top / "refs" / "main").write_text(commit)
    snapshot = top / "snapshots" / commit
    snapshot.mkdir(parents=True)

    def keep():
        for number, file in enumerate(sorted(copied.iterdir())):
            blob = file.rename(top / "blobs" / str(number))
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
        return name

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(top.parent))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return keep


def test_complete_snapshot_of_the_hubs_cache_passes(cached):
    assert codes(cached()) == set()


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (no_head, "weights_missing"),
        (half_of_them, "weights_missing"),
        (fewer_layers, "weights_missing"),
        (lfs_pointer, "git_lfs_pointer"),
        (cut_short, "weights_incomplete"),
        (not_there, "weights_incomplete"),
    ],
)
def test_snapshot_of_the_hubs_cache_is_examined_like_a_directory(copied, cached, spoil, code):
    spoil(copied)
    assert [each.code for each in found(cached()) if each.path == "model"] == [code]


def test_what_the_hubs_cache_lacks_is_no_objection_if_it_will_be_downloaded(copied, cached, monkeypatch):
    not_there(copied)
    name = cached()
    assert "weights_incomplete" in codes(name)
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("lem.workload.models.use_cache_if_unreachable", lambda: None)
    assert "weights_incomplete" not in codes(name)


@pytest.mark.parametrize("engine", [PytorchBackend, VllmBackend, TensorrtBackend])
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("vocab_size", "x", "int"),
        ("num_attention_heads", "4", "int"),
        ("hidden_size", 32.5, "int"),
        ("rms_norm_eps", "1e-5", "float"),
        ("initializer_range", None, "float"),
        ("use_cache", "yes", "bool"),
        ("hidden_act", 3, "str"),
        ("attention_dropout", "0", "int | float | None"),
        ("eos_token_id", "</s>", "int | list[int] | None"),
        ("rope_parameters", "x", "RopeParameters | dict | None"),
    ],
)
def test_a_value_of_the_wrong_type_in_the_config_is_found_before_loading(copied, engine, name, value, expected):
    change_json(copied, "config.json", **{name: value})
    experiment = replace(asked(copied), backend=engine())
    told = backend_class(experiment.backend.name).objections(experiment, find(str(copied)), IDEAL)
    (fact,) = [each.fact for each in told if each.code == "config_value_type"]
    assert f"{name} is {json.dumps(value)}, but transformers expects {expected}." in fact


def test_only_transformers_decides_that_a_value_has_the_wrong_type(copied, monkeypatch):
    monkeypatch.setattr("lem.backends.transformers_source.value_types", lambda _: {"hidden_size": "str"})
    assert "config_value_type" not in codes(copied)


@pytest.mark.parametrize("engine", [VllmBackend, TensorrtBackend])
@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (None, None),
        (no_head, "weights_missing"),
        (headless, "weights_missing"),
        (half_of_them, "weights_missing"),
        (fewer_layers, "weights_missing"),
        (lambda folder: no_head(folder) or pickled(folder), "weights_missing"),
        (lambda folder: change_json(folder, "config.json", intermediate_size=97), "weights_mismatched"),
        (lfs_pointer, "git_lfs_pointer"),
        (cut_short, "weights_incomplete"),
        (not_there, "weights_incomplete"),
    ],
)
def test_other_engines_object_to_a_directorys_weights_as_well(copied, engine, spoil, code):
    if spoil is not None:
        spoil(copied)
    experiment = replace(asked(copied), backend=engine())
    told = {o.code for o in backend_class(experiment.backend.name).objections(experiment, find(str(copied)), IDEAL)}
    about_weights = told & {"weights_missing", "weights_mismatched", "weights_incomplete", "git_lfs_pointer"}
    assert about_weights == ({code} if code else set())


@pytest.mark.parametrize(
    "backend", [VllmBackend(load_format="dummy"), TensorrtBackend(extra_args={"load_format": "dummy"})]
)
def test_weights_that_are_not_read_are_not_missed(copied, backend):
    not_there(copied)
    experiment = replace(asked(copied), backend=backend)
    told = {o.code for o in backend_class(backend.name).objections(experiment, find(str(copied)), IDEAL)}
    assert not told & {"weights_missing", "weights_incomplete"}


@pytest.fixture
def sharded(tmp_path):
    model = model_of("llama")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    folder = saved(tmp_path / "tokenizer", model)
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "sharded")
    return tmp_path / "sharded"


def test_missing_shard_of_an_index_is_refused_before_loading(sharded):
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert codes(sharded) == set()
    shards[1].unlink()
    (objection,) = found(sharded)
    assert objection.code == "weights_incomplete"
    assert objection.fact.startswith(f"1 of the {len(shards)} files named in ")
    assert objection.fact.endswith(f" is missing: {shards[1].name}.")


@pytest.mark.parametrize("content", ["", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_index_that_is_none_is_refused_before_loading(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    (objection,) = found(sharded)
    assert (objection.code, "is not an index" in objection.fact) == ("weights_incomplete", True)


# ------------------------------------------------------------------ tokenizer
def test_tokenizer_with_more_entries_than_the_embedding_is_refused_and_only_such_a_prompt_fails(tmp_path):
    folder = saved(tmp_path / "small", model_of("llama", vocab_size=300))
    last = last_token(folder)
    assert last > 300
    (objection,) = [each for each in found(folder) if each.code == "tokenizer_too_large"]
    assert objection.fact == f"the tokenizer has ids up to {last}, but the model's embedding has 300 rows."
    backend = loaded(folder, forced=True)
    with pytest.raises(RunError, match=r"contains token 3\d\d, but the model has only 300 embeddings"):
        backend.encode(TEXTS)
    assert run(backend, ["a", "b c"])


def last_token(folder):
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(folder)) - 1


def test_padding_token_without_an_embedding_is_replaced_and_changes_no_token(llama, tmp_path):
    from transformers import AutoTokenizer

    folder = saved(tmp_path / "exact", model_of("llama", vocab_size=last_token(llama) + 1))
    before = [g.token_ids for g in run(loaded(folder))]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<a pad of its own>"})
    assert tokenizer.pad_token_id == last_token(llama) + 1
    tokenizer.save_pretrained(folder)
    assert codes(folder) == set()
    assert [g.token_ids for g in run(loaded(folder))] == before


def with_special_token(folder, token):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    tokenizer.save_pretrained(folder)
    return tokenizer.convert_tokens_to_ids(token)


def test_special_token_that_prompts_never_hold_needs_no_embedding_but_that_of_a_template_does(llama, tmp_path):
    folder = saved(
        tmp_path / "exact", model_of("llama", vocab_size=last_token(llama) + 1), chat="{{ messages[0].content }}"
    )
    assert with_special_token(folder, "<image>") == last_token(llama) + 1
    assert codes(folder, chat_template=True) == set()
    assert run(loaded(folder))
    (folder / "chat_template.jinja").write_text("<image>{{ messages[0].content }}")
    (objection,) = found(folder, chat_template=True)
    assert (objection.code, objection.path) == ("tokenizer_too_large", "chat_template")
    assert f"adds the token {last_token(llama) + 1}" in objection.fact
    with pytest.raises(RunError, match="contains token"):
        loaded(folder, chat_template=True).encode(TEXTS)


def test_padding_token_of_the_config_outside_of_the_vocabulary_is_refused(copied):
    change_json(copied, "config.json", pad_token_id=VOCABULARY)
    assert "pad_token_outside" in codes(copied)
    with pytest.raises(RunError, match="transformers cannot load"):
        loaded(copied)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('only in pairs') }}", "fails: only in pairs"),
        ("<|assistant|>", "leaves out the prompt"),
        ("{% for", "fails: "),
        ([{"name": "tools", "template": "a"}, {"name": "rag", "template": "b"}], "several chat templates"),
    ],
)
def test_chat_template_that_cannot_wrap_a_prompt_is_refused(copied, template, said):
    (copied / "chat_template.jinja").unlink(missing_ok=True)
    change_json(copied, "tokenizer_config.json", chat_template=template)
    (objection,) = found(copied, chat_template=True)
    assert objection.code == "bad_chat_template"
    assert said in objection.fact


# ------------------------------------------------------------------ models of other kinds
def test_adapter_given_as_a_model_names_its_base(llama, tmp_path):
    folder = adapter(tmp_path / "lora", llama)
    with pytest.raises(ModelError, match=rf"is a LoRA adapter, not a model.*--model {llama} --adapter {folder}"):
        find(str(folder))


def test_multimodal_model_without_a_class_for_text_is_refused_in_a_sentence(tmp_path):
    from transformers import AutoConfig

    AutoConfig.for_model("llava").save_pretrained(tmp_path)
    (objection,) = [each for each in found(tmp_path) if each.code == "model_unsupported"]
    assert objection.fact == "transformers has no text generation class for a llava model."


@pytest.mark.parametrize(
    ("quantization", "lacks"),
    [
        ({"quant_method": "gptq", "bits": 4}, ("optimum", "gptqmodel")),
        ({"quant_method": "awq", "bits": 4}, ("gptqmodel",)),
        ({"quant_method": "compressed-tensors"}, ("compressed_tensors",)),
        ({"load_in_4bit": True}, ("bitsandbytes",)),
    ],
)
def test_quantized_checkpoint_without_its_package_is_refused(copied, quantization, lacks):
    change_json(copied, "config.json", quantization_config=quantization)
    (objection,) = found(copied, FakeHost((), lacks=lacks))
    assert objection.code == "missing_quantizer"
    assert all(package in objection.fact for package in lacks)
    assert codes(copied, FakeHost(())) == set()


# ------------------------------------------------------------------ configurations
def test_model_with_its_own_code_needs_trust_only_if_transformers_has_none(copied):
    change_json(copied, "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    assert "needs_remote_code" not in codes(copied)  # transformers has its own Llama code
    assert run(loaded(copied))
    change_json(copied, "config.json", model_type="own_llama")
    assert "needs_remote_code" in codes(copied)
    assert "needs_remote_code" not in codes(copied, trust_remote_code=True)


def test_positions_of_a_multimodal_model_are_those_of_its_language_model(tmp_path):
    from transformers import Gemma3Config

    text = {"max_position_embeddings": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    Gemma3Config(text_config=text).save_pretrained(tmp_path)
    assert "no_room_for_prompts" in codes(tmp_path, max_output_tokens=64)
    assert "no_room_for_prompts" not in codes(tmp_path, max_output_tokens=63)


def test_positions_that_a_config_leaves_to_its_family_are_known(copied):
    content = json.loads((copied / "config.json").read_text())
    del content["max_position_embeddings"]
    (copied / "config.json").write_text(json.dumps(content))
    assert "no_room_for_prompts" in codes(copied, max_output_tokens=2048)
    assert "no_room_for_prompts" not in codes(copied, max_output_tokens=2047)


def test_padded_requests_of_a_model_that_does_not_mask_padding_are_counted(tmp_path):
    folder = saved(tmp_path / "rwkv", model_of("rwkv"))
    backend = loaded(folder)
    lengths = [len(each.token_ids) for each in backend.encode(TEXTS)]
    run(backend)
    padded = sum(length < max(pair) for pair in zip(lengths[::2], lengths[1::2], strict=True) for length in pair)
    assert padded
    assert warned(backend)["padding_changed_tokens"].endswith(f"padded in their batches: {padded}.")
    alone = loaded(folder, batching=Batching(batch_size=1))
    run(alone)
    assert "padding_changed_tokens" not in warned(alone)
