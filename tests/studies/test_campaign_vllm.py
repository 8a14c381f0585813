"""`lem campaign` over two real engines, transformers and vLLM on the CPU, to its sentence (nox -s vllm)."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec

import pytest

from tests.conftest import command

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")

COMMON = "model: tiny\nfp_precision: float32\nmin_output_tokens: {0}\nmax_output_tokens: {0}\n"
ENERGY = "energy: {{name: replay, trace: {}.csv, idle_s: 0}}\n"
ENGINES = {
    "torch": "backend: pytorch\n",
    "vllm": "backend: {name: vllm, kv_cache_memory_bytes: 67108864, enforce_eager: true}\n",
}


@needs_vllm
def test_two_engines_are_compared_and_what_else_differs_is_said(tmp_path):
    for name, component, tokens in (("torch", "gpu", 16), ("vllm", "cpu", 24)):
        (tmp_path / f"{name}.csv").write_text(f"t_s,power_w,component\n0,100,{component}\n100000,100,{component}\n")
        (tmp_path / f"{name}.yaml").write_text(COMMON.format(tokens) + ENGINES[name] + ENERGY.format(name))
    done = command(
        "campaign", "torch.yaml", "vllm.yaml", "--campaign-name", "engines", "-c", "2", "--structure", "interleaved",
        "-d", "sample", "-n", "4", "warmup.prompts=1", "-y", cwd=tmp_path, timeout_s=600,
    )  # fmt: skip
    assert done.code == 0, done.out + done.err
    sentence = (
        r"vllm needs \S+ times the energy per output token of torch \(95% interval \S+, 2 cycles, interleaved\): "
    )
    assert re.search(sentence, done.out), done.out
    shown = json.loads(command("results", "show", "engines", "--json", cwd=tmp_path).out)
    warnings = {each["code"]: each["text"] for each in shown["warnings"]}
    said = r"the engine differs between cells: pytorch \(transformers .*\), vllm \(vllm 0\..*\)\."
    assert re.fullmatch(said, warnings["campaign_engines_differ"])
    assert warnings["campaign_lengths_differ"].endswith("number of output tokens per cell: torch 64, vllm 96.")
    assert warnings["campaign_meters_differ"] == "the energy's components differ between cells: gpu, cpu."
    # What is the same is not said to differ.
    assert not warnings.keys() & {"campaign_prompts_differ", "campaign_estimate", "campaign_cells_missing"}
    rows = json.loads(command("results", "list", "--campaign", "engines", "--json", cwd=tmp_path).out)
    assert sorted((row["campaign_arm"], row["backend"], row["status"]) for row in rows) == [
        *[("torch", "pytorch", "completed")] * 2,
        *[("vllm", "vllm", "completed")] * 2,
    ]
