"""A script without lem that does the work of a small experiment: it loads a model and generates batch by batch.

`bench.perturbation` and `bench.peers_job` run the script as `python bare.py JOB.json`, and `bench.peers_job` also runs
it in another tool's environment. The last line of its output is JSON. The script imports nothing from lem.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def run(job: dict[str, Any]) -> dict[str, float]:
    """Run the prompts of a job; return the window's length, its CPU time, and the number of output tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    size, longest, prompts = job["batch_size"], job["max_input_tokens"], job["prompts"]
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    end = tokenizer.eos_token_id
    settings = GenerationConfig(
        max_new_tokens=job["max_output_tokens"], min_new_tokens=job["min_output_tokens"], do_sample=False,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=end,
    )  # fmt: skip
    tokenized = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": longest}
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

    _wait_for(job["starts_with"])
    if job["warmup_prompts"]:
        generate(job["warmup_prompts"])
    begun_s, cpu_s = time.perf_counter(), time.process_time()
    tokens = generate(len(prompts))
    return {
        "window_s": time.perf_counter() - begun_s,
        "window_cpu_s": time.process_time() - cpu_s,
        "output_tokens": tokens,
    }


def _wait_for(pattern: str | None) -> None:
    """Wait until a file that matches an absolute pattern exists, so that two processes begin at the same time."""
    while pattern and not any(Path("/").glob(pattern.removeprefix("/"))):
        time.sleep(0.005)


if __name__ == "__main__":
    print(json.dumps(run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
