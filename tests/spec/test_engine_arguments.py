"""The values that vLLM's own arguments accept, and the needs of its speculation, as checked before a run."""

from __future__ import annotations

import json

import pytest

from lem.runner.preflight import objections
from lem.spec.engines import VllmBackend, VllmSpeculation
from lem.spec.experiment import Experiment
from tests.hosts import CPU

LOOKUP = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_min": 4, "prompt_lookup_max": 4}


@pytest.mark.parametrize(
    ("name", "taken", "refused", "wanted"),
    [
        ("max_logprobs", [5, "5", 5.0, None], ["five", 5.5, [5]], "int"),
        ("watermark", [0.5, 1, "0.5"], ["half", {}], "float"),
        ("numa_bind", [True, "yes", 1], ["perhaps", 7], "bool"),
        ("code_revision", ["main", None], [3, ["main"]], "str | null"),
        ("hf_token_like", [True, "text"], [{}], "bool | str | null"),
        ("jit_monitor_mode", ["warn"], ["fatal", 1], "one of 'warn', 'error'"),
        ("scheduling_policy", ["fcfs", 3, {}], [], ""),  # defined elsewhere, so left to the engine
        ("served_model_name", ["a", ["a"], 3], [], ""),
    ],
)
def test_values_of_engine_arguments_are_of_their_plain_types(name, taken, refused, wanted):
    def refusals(value):
        found = objections(Experiment(backend=VllmBackend(engine_args={name: value})), CPU)
        return [o.message for o in found if o.code == "engine_arg_type"]

    assert not any(refusals(value) for value in taken)
    for value in refused:
        fact = f"vLLM 9.9.0 expects {wanted} for {name}, not {json.dumps(value)}."
        assert refusals(value) == [f"{fact} Correct the value, or leave this option out."]


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        ({"method": "draft_model"}, ["model", "num_speculative_tokens"]),
        ({"method": "draft_model", "model": "tiny"}, ["num_speculative_tokens"]),
        ({"method": "draft_model", "model": "tiny", "num_speculative_tokens": 2}, []),
        ({"method": "eagle3", "num_speculative_tokens": 2}, ["model"]),
        ({"method": "mtp"}, ["num_speculative_tokens"]),
        ({"method": "mtp", "num_speculative_tokens": 1}, []),
        ({"method": "mtp", "model": "its/files-tell"}, []),
        ({"model": "its/files-tell"}, []),
        ({"method": "suffix"}, []),
        ({**LOOKUP, "prompt_lookup_min": 5}, ["prompt_lookup_min"]),
        (LOOKUP, []),
    ],
)
def test_speculation_has_what_its_method_needs(config, missing):
    for path, backend in (
        ("backend.speculative", VllmBackend(speculative=VllmSpeculation(**config))),
        ("backend.engine_args.speculative_config", VllmBackend(engine_args={"speculative_config": config})),
    ):
        found = [o.path for o in objections(Experiment(backend=backend), CPU) if o.code == "speculation_incomplete"]
        assert found == [f"{path}.{name}" for name in missing]
