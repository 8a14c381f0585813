"""A script without lem that does the work of a job: it loads a model and generates for all prompts, batch by batch.

`bench.peers_job` runs it as `python peers_job_bare.py JOB.json`, in the environment of the tool that it is compared
with. It imports nothing from lem.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def run(job: dict[str, Any]) -> int:
    """Generate for the prompts of a job; return the number of output tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    size, tokens = job["batch_size"], 0
    for begin in range(0, len(job["prompts"]), size):
        texts = job["prompts"][begin : begin + size]
        inputs = tokenizer(
            texts, return_tensors="pt", padding=True, truncation=True, max_length=job["input_tokens"],
            return_token_type_ids=False,
        )  # fmt: skip
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=job["output_tokens"], min_new_tokens=job["output_tokens"],
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        tokens += output[:, inputs["input_ids"].shape[1] :].numel()
    return tokens


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        print(json.dumps({"output_tokens": run(json.load(file))}))
