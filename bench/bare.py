"""A script without lem that does the work of a small experiment: it loads a model and generates for a list of prompts.

`bench.perturbation` and `bench.peers_job` run the script as `python bare.py JOB.json`, and `bench.peers_job` also runs
it in another tool's environment. The last line of its output is JSON. The script imports nothing from lem.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Generates for the first prompts, as many as the argument says, and returns the number of output tokens.
Generate = Callable[[int], int]
# The pages of transformers' continuous batching, and how many input tokens it may take in per step; as lem sets them.
PAGE_TOKENS, STEP_TOKENS, SPARE_PAGES = 16, 512, 4


def run(job: dict[str, Any]) -> dict[str, float]:
    """Run the prompts of a job; return the window's length, its CPU time, and the number of output tokens."""
    generate = {"generate": in_batches, "generate_batch": continuously, "vllm": with_vllm}[job["engine"]](job)
    _wait_for(job["starts_with"])
    if job["warmup_prompts"]:
        generate(job["warmup_prompts"])
    begun_s, cpu_s = time.perf_counter(), time.process_time()
    tokens = generate(len(job["prompts"]))
    return {
        "window_s": time.perf_counter() - begun_s,
        "window_cpu_s": time.process_time() - cpu_s,
        "output_tokens": tokens,
    }


def in_batches(job: dict[str, Any]) -> Generate:
    """Load a model into transformers and return a function that calls `generate` for one batch after another."""
    tokenizer, model, settings = _with_transformers(job)
    size, prompts, end = job["batch_size"], job["prompts"], tokenizer.eos_token_id
    tokenized = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": job["max_input_tokens"]}
    batches = [
        tokenizer(prompts[i : i + size], **tokenized, return_token_type_ids=False) for i in range(0, len(prompts), size)
    ]

    def generate(count: int) -> int:
        tokens = 0
        for batch in batches[: -(-count // size)]:
            output = model.generate(**batch, generation_config=settings)
            new = output[:, batch["input_ids"].shape[1] :].tolist()
            tokens += sum(row.index(end) + 1 if end in row else len(row) for row in new)
        return tokens

    return generate


def continuously(job: dict[str, Any]) -> Generate:
    """Load a model into transformers and return a function that calls `generate_batch`, which batches continuously."""
    from transformers import ContinuousBatchingConfig

    tokenizer, model, settings = _with_transformers(job)
    places, longest = job["batch_size"], job["max_input_tokens"] + job["max_output_tokens"]
    shortened = {"truncation": True, "max_length": job["max_input_tokens"]}
    inputs = [tokenizer(text, **shortened)["input_ids"] for text in job["prompts"]]
    config = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS, num_blocks=places * -(-longest // PAGE_TOKENS) + SPARE_PAGES,
        max_batch_tokens=places + min(STEP_TOKENS, places * job["max_input_tokens"]), max_requests_per_batch=places,
        allow_block_sharing=False, safety_margin=0.0, use_async_batching=False, use_cuda_graph=False,
    )  # fmt: skip

    def generate(count: int) -> int:
        results = model.generate_batch(
            inputs[:count], generation_config=settings, continuous_batching_config=config, persistent_manager=True
        )
        return sum(len(result.generated_tokens) for result in results.values())

    return generate


def with_vllm(job: dict[str, Any]) -> Generate:
    """Load a model into vLLM's engine, in this process, and return a function that calls `LLM.generate`."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, SamplingParams

    llm = LLM(job["model"], dtype="float32", max_num_seqs=job["batch_size"], **job["engine_args"])
    tokenizer = llm.get_tokenizer()
    prompts = [
        {"prompt_token_ids": tokenizer.encode(text, truncation=True, max_length=job["max_input_tokens"])}
        for text in job["prompts"]
    ]
    settings = SamplingParams(temperature=0, max_tokens=job["max_output_tokens"], detokenize=False)

    def generate(count: int) -> int:
        llm.reset_prefix_cache()
        outputs = llm.generate(prompts[:count], settings, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return generate


def _with_transformers(job: dict[str, Any]) -> tuple[Any, Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    settings = GenerationConfig(
        # With 0 instead of None, transformers would check the length in each step.
        max_new_tokens=job["max_output_tokens"], min_new_tokens=job["min_output_tokens"] or None, do_sample=False,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return tokenizer, model, settings


def _wait_for(pattern: str | None) -> None:
    """Wait until a file that matches an absolute pattern exists, so that two processes begin at the same time."""
    while pattern and not any(Path("/").glob(pattern.removeprefix("/"))):
        time.sleep(0.005)


if __name__ == "__main__":
    print(json.dumps(run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
