import filecmp
import hashlib
import json
import subprocess
import sys
import time

import pytest

from lem.errors import ModelError
from lem.workload import builtin, models, tiny

# To change the model's bytes on purpose, raise tiny.VERSION and put the new digests here.
SHA256 = {
    "model.safetensors": "68aed4e6ee8113b3f33ddfd22bcea2d330f1d27f777a031b0595ef9a59599bea",
    "tokenizer.json": "c9988e4628246f99c31ef79d37aa4cdc79111ff48ee8f3bcde2a82832fd061ce",
}
MAKE_AT_A_SIGNAL = """
import sys, time
from pathlib import Path
import numpy, platformdirs, safetensors.numpy, tokenizers
from lem.workload import tiny
import lem.workload.builtin
ready, go = map(Path, sys.argv[1:])
ready.touch()
while not go.exists():
    time.sleep(0.001)
print(tiny.path())
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return tiny.path()


@pytest.fixture(scope="session")
def sample():
    return [row["text"] for row in builtin.read("builtin:sample")]


@pytest.mark.parametrize("name", SHA256)
def test_files_have_the_bytes_that_they_have_everywhere(folder, name):
    assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == SHA256[name]


def test_another_process_makes_the_same_bytes(folder, tmp_path):
    # Another process has a different hash seed, so no order may depend on hashes.
    code = "import sys; from pathlib import Path; from lem.workload import tiny; tiny.write_files(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    names = sorted(file.name for file in folder.iterdir())
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    assert filecmp.cmpfiles(folder, tmp_path, names, shallow=False) == (names, [], [])


def test_two_processes_at_once_leave_one_whole_directory(folder, tmp_path, monkeypatch):
    cache, go = tmp_path / "cache", tmp_path / "go"
    monkeypatch.setenv("LEM_CACHE_DIR", str(cache))
    ready = [tmp_path / "ready-0", tmp_path / "ready-1"]
    makers = [
        subprocess.Popen([sys.executable, "-c", MAKE_AT_A_SIGNAL, str(r), str(go)], stdout=subprocess.PIPE, text=True)
        for r in ready
    ]
    deadline = time.monotonic() + 60
    while not all(r.exists() for r in ready) and time.monotonic() < deadline:
        time.sleep(0.01)
    go.touch()
    printed = {maker.communicate(timeout=60)[0].strip() for maker in makers}
    assert [maker.returncode for maker in makers] == [0, 0]
    assert printed == {str(cache / "models" / folder.name)}
    assert [entry.name for entry in (cache / "models").iterdir()] == [folder.name]
    names = [file.name for file in folder.iterdir()]
    assert filecmp.cmpfiles(folder, cache / "models" / folder.name, names, shallow=False)[1:] == ([], [])


def test_failed_making_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    monkeypatch.setenv("LEM_CACHE_DIR", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", disk_full)
        with pytest.raises(ModelError, match=r"No space left.*LEM_CACHE_DIR"):
            tiny.path()
    assert list((tmp_path / "models").iterdir()) == []
    assert (tiny.path() / "model.safetensors").exists()


def test_user_without_a_home_directory_is_told_what_to_set(monkeypatch):
    def unknown(*_):
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv("LEM_CACHE_DIR", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_dir", unknown)
    with pytest.raises(ModelError, match="LEM_CACHE_DIR"):
        tiny.path()


def disk_full(*args, **options):
    raise OSError("No space left on device")


def test_made_once_and_then_found(folder, monkeypatch):
    monkeypatch.setenv("LEM_CACHE_DIR", str(folder.parents[1]))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert tiny.path() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_plain_transformers_loads_it_whole(folder):
    import torch
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert 5e6 <= model.num_parameters() <= 10e6
    # Attention kernels for GPUs need heads of at least 32.
    assert model.config.head_dim >= 32
    assert model.dtype == torch.float32


def test_model_writes_something_else_for_each_prompt(folder, sample):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    written = set()
    for text in sample[:5]:
        inputs = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            new = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        written.add(tuple(new.tolist()))
    assert len(written) == 5
    assert all(len(set(output)) > 4 for output in written)


def test_tokenizer_gives_the_sample_prompts_back(folder, sample):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in sample:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_gives_any_text_back(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "  Zwölf Boxkämpfer\tjagen 狐 \N{SNAKE}\nüber den Deich . "
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_tokenizer_and_model_agree_on_the_special_tokens(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(tokenizer, name) == config[name]
    assert len(tokenizer) <= config["vocab_size"]


def test_longest_sample_prompt_leaves_room_for_an_output(folder, sample):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    longest = max(len(tokenizer(text)["input_ids"]) for text in sample)
    assert longest + 1024 <= json.loads((folder / "config.json").read_text())["max_position_embeddings"]


def test_model_is_found_by_its_name_and_marked_as_random(folder, monkeypatch):
    monkeypatch.setenv("LEM_CACHE_DIR", str(folder.parents[1]))
    found = models.find("tiny")
    assert (found.name, found.path, found.revision) == ("tiny", str(folder), None)
    assert found.random_weights
    assert not models.find(str(folder)).random_weights
