"""`.env`: its variables reach lem, and nothing in it makes a process load code."""

from __future__ import annotations

import os
import re

import pytest

from lem.cli.environment import load_dotenv, loads_code
from tests.conftest import SIMULATED, command

CANARY = "canary"
# Variables named in the reference, and others that people set for a run.
HARMLESS = (
    "LLM_ENERGY_RESULTS_DIR", "HF_TOKEN", "CUDA_VISIBLE_DEVICES", "CODECARBON_LOG_LEVEL", "HF_HOME", "HF_HUB_OFFLINE",
    "HF_ENDPOINT", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "TOKENIZERS_PARALLELISM", "OPENAI_API_KEY", "http_proxy",
    "CUDA_DEVICE_ORDER", "NCCL_DEBUG", "VLLM_USE_V1", "VLLM_LOGGING_LEVEL", "TORCHINDUCTOR_MAX_AUTOTUNE", "TMPDIR",
    "PYTHONUNBUFFERED", "PYTHONHASHSEED", "TRANSFORMERS_VERBOSITY", "WANDB_API_KEY", "NODE_ENV", "MY_PATH", "LANG",
)  # fmt: skip
LOADING = (
    "PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME", "PYTHONUSERBASE", "PYTHONPYCACHEPREFIX", "PYTHONWARNINGS",
    "PYTHONBREAKPOINT", "PYTHONINSPECT", "PYTHONEXECUTABLE", "PYTHONPLATLIBDIR", "LD_PRELOAD", "LD_LIBRARY_PATH",
    "LD_AUDIT", "DYLD_INSERT_LIBRARIES", "GCONV_PATH", "GLIBC_TUNABLES", "BASH_ENV", "BASH_FUNC_ls%%", "ENV", "PATH",
    "HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "LEM_STATE_DIR", "PERL5OPT", "RUBYOPT", "NODE_OPTIONS",
    "JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS", "CLASSPATH", "OPENSSL_CONF", "GIT_SSH_COMMAND", "GIT_EXTERNAL_DIFF",
    "GIT_CONFIG_COUNT", "CC", "CUDA_HOME", "CUDA_INJECTION64_PATH", "NVTX_INJECTION64_PATH", "NCCL_NET_PLUGIN",
    "NCCL_PROFILER_PLUGIN", "OMP_TOOL_LIBRARIES", "TRITON_CACHE_DIR", "TRITON_PTXAS_PATH", "TORCHINDUCTOR_CACHE_DIR",
    "TORCH_EXTENSIONS_DIR", "VLLM_CACHE_ROOT", "HF_MODULES_CACHE", "MPLBACKEND", "LUA_INIT", "PAGER", "EDITOR",
    "VLLM_LOGGING_CONFIG_PATH", "VLLM_NCCL_SO_PATH", "VLLM_ALLOW_INSECURE_SERIALIZATION", "RAY_RUNTIME_ENV_HOOK",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TRITON_PLUGIN_DIRS", "PRTE_MCA_mca_base_component_path", "OPAL_LIBDIR",
    "DG_JIT_CACHE_DIR", "TRTLLM_DG_CACHE_DIR", "TVM_LIBRARY_PATH", "TILELANG_CACHE_DIR", "LOCAL_KERNELS",
)  # fmt: skip


@pytest.mark.parametrize("name", LOADING)
def test_variables_that_load_code(name):
    assert loads_code(name)
    assert loads_code(name.lower())


@pytest.mark.parametrize("name", HARMLESS)
def test_variables_that_load_none(name):
    assert not loads_code(name)


@pytest.fixture
def dotenv(tmp_path, monkeypatch):
    """Write `.env` in the working directory; its variables are removed after the test."""
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)

    def write(content: str | bytes) -> None:
        (tmp_path / ".env").write_bytes(content.encode() if isinstance(content, str) else content)

    yield write
    os.environ.clear()
    os.environ.update(before)


def test_what_loads_code_is_refused_with_a_warning_and_the_rest_is_set(dotenv, monkeypatch, capsys):
    monkeypatch.setenv("ALREADY", "mine")
    names = [*LOADING, *HARMLESS]
    for name in names:
        monkeypatch.delenv(name, raising=False)
    lines = [f"{name}=x" for name in names if re.fullmatch(r"\w+", name)]
    dotenv("\n".join([*lines, "ALREADY=theirs", 'QUOTED="a b"  # comment', "export EXPORTED=1", "BOTH=${QUOTED}c", ""]))
    load_dotenv()
    assert {name for name in names if name in os.environ} == set(HARMLESS)
    assert [os.environ[name] for name in ("ALREADY", "QUOTED", "EXPORTED", "BOTH")] == ["mine", "a b", "1", "a bc"]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == len(lines) - len(HARMLESS)
    assert all(re.fullmatch(r"Warning: \S+\.env: \w+ is ignored because it can .*", text) for text in warnings)


def test_a_variable_that_is_already_set_is_no_warning(dotenv, capsys):
    dotenv("PATH=/elsewhere\n")
    before = os.environ["PATH"]
    load_dotenv()
    assert os.environ["PATH"] == before
    assert capsys.readouterr().err == ""


def test_a_null_character_is_refused(dotenv, capsys):
    dotenv(b"A_NAME=a\0b\nOTHER=1\n")
    load_dotenv()
    assert os.environ["OTHER"] == "1"
    assert "A_NAME is ignored" in capsys.readouterr().err


@pytest.mark.processes
@pytest.mark.parametrize(
    ("variable", "file"),
    [
        ("PYTHONPATH={folder}", "sitecustomize.py"),
        ("PYTHONPATH={folder}", "transformers.py"),
        ("PYTHONUSERBASE={folder}", "lib/python3.11/site-packages/usercustomize.py"),
    ],
)
def test_code_beside_a_cloned_dotenv_does_not_run_in_any_process(variable, file, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(f"open({str(tmp_path / CANARY)!r}, 'w').close()")
    (tmp_path / ".env").write_text(f"{variable.format(folder=tmp_path)}\nLLM_ENERGY_RESULTS_DIR=theirs\n")
    done = command("experiment", *SIMULATED, "-n", "1", cwd=tmp_path)
    assert done.code == 0, done.err
    assert not (tmp_path / CANARY).exists()
    assert f"{variable.partition('=')[0]} is ignored" in done.err
    assert (tmp_path / "theirs" / "raw").is_dir()


@pytest.mark.processes
def test_a_dotenv_that_is_no_text_is_one_line(tmp_path):
    (tmp_path / ".env").write_bytes(b"A=\xff\xfe\n")
    done = command("results", "list", cwd=tmp_path)
    assert done.code == 2
    assert re.fullmatch(r"Error: \S+\.env: the file cannot be read .*\n", done.err)
