"""Quantized weights through bitsandbytes, for real: it also runs on the CPU."""

from __future__ import annotations

import pytest

from lem.backends import make_backend
from lem.spec.engines import PytorchBackend
from lem.spec.experiment import Experiment, Quantization

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

pytestmark = pytest.mark.engines

TEXTS = ["How do tides work?", "Write a haiku about rain."]


def loaded(**wanted):
    experiment = Experiment(
        model="tiny",
        max_output_tokens=8,
        backend=PytorchBackend(device="cpu"),
        quantization=Quantization(quantization=bool(wanted), **wanted),
    )
    backend = make_backend(experiment)
    backend.start()
    backend.load()
    return backend


@pytest.mark.parametrize(
    ("wanted", "name", "largest_share"),
    [
        ({"load_in_8bit": True}, "bitsandbytes 8-bit", 0.6),
        ({"load_in_4bit": True}, "bitsandbytes 4-bit nf4", 0.5),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes 4-bit fp4", 0.5),
    ],
)
def test_quantized_weights_are_smaller_named_and_run(wanted, name, largest_share):
    full, quantized = loaded(), loaded(**wanted)
    assert quantized.model_info().quantization == name
    # The embeddings and the output projection are not quantized.
    assert quantized.model_info().weights_bytes < largest_share * full.model_info().weights_bytes
    outputs = [output for batch in quantized.generate(quantized.encode(TEXTS)) for output in batch]
    assert [len(output.token_ids) for output in outputs] == [8, 8]


def test_flops_do_not_shrink_with_the_bits():
    assert loaded(load_in_4bit=True).architecture() == loaded().architecture()
