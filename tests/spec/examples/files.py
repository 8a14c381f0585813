"""Rules about the files of models, prompts, traces and results; `tests/spec/conftest.py` creates these files."""

from __future__ import annotations

from lem.workload import tiny
from tests.hosts import CPU, H100, ONE, bare
from tests.spec.examples.example import Example, asks, model


def copy_of_tiny(folder, **changes):
    """Return a copy of the model tiny, with its whole config.json."""
    return model(folder, **tiny.CONFIG | changes)


WHOLE = asks(model=copy_of_tiny("templated"))

EXAMPLES = [
    Example("git_lfs_pointer", "model", asks(model=copy_of_tiny("pointer")), WHOLE),
    Example("weights_incomplete", "model", asks(model=copy_of_tiny("cut")), WHOLE),
    Example("weights_incomplete", "model", asks(model=model()), WHOLE),
    Example("weights_missing", "model", asks(model=copy_of_tiny("headless")), WHOLE),
    Example("weights_mismatched", "model", asks(model=copy_of_tiny("wider", intermediate_size=705)), WHOLE),
    Example("config_value_type", "model", asks(model=copy_of_tiny("typed", rms_norm_eps="1e-5")), WHOLE),
    Example("weights_unscaled", "model", asks(model=copy_of_tiny("unscaled")), WHOLE),
    Example("model_unsupported", "model", asks(model=model(model_type="llava")), WHOLE),
    Example("model_unsupported", "model", asks(model=model(model_type="of tomorrow")), WHOLE),
    Example("not_a_decoder", "model", asks(model=model(model_type="bert")), WHOLE),
    Example(
        "not_a_decoder",
        "model",
        asks(model=model(model_type="xlm-roberta")),
        asks(model=model(model_type="xlm-roberta", is_decoder=True)),
    ),
    Example("pad_token_outside", "model", asks(model=copy_of_tiny("templated", pad_token_id=4096)), WHOLE),
    Example("tokenizer_too_large", "model", asks(model=copy_of_tiny("templated", vocab_size=4095)), WHOLE),
    Example(
        "padding_changes_tokens",
        "batching.batch_size",
        asks("batching.batch_size=2", model=model(model_type="rwkv")),
        asks("batching.batch_size=1", model=model(model_type="rwkv")),
    ),
    Example(
        "missing_quantizer",
        "model",
        asks(model=model(quantization_config={"quant_method": "gptq"}), host=bare(H100)),
        asks(model=model(quantization_config={"quant_method": "gptq"}), host=ONE),
    ),
    Example(
        "missing_quantizer",
        "model",
        asks(model=model(quantization_config={"quant_method": "vptq"}), host=CPU),
        asks(model=model(quantization_config={"quant_method": "vptq"}), host=ONE),
    ),
    Example("no_tokenizer", "model", asks(model=model("bare")), asks(model=model())),
    Example("encoder_decoder", "model", asks(model=model(is_encoder_decoder=True)), asks(model=model())),
    Example(
        "needs_remote_code",
        "trust_remote_code",
        asks(model=model(auto_map={})),
        asks("trust_remote_code=true", model=model(auto_map={})),
    ),
    Example(
        "needs_remote_code",
        "trust_remote_code",
        asks(model=model(auto_map={}, model_type="of tomorrow")),
        asks(model=model(auto_map={}, model_type="llama")),
    ),
    Example("no_adapter", "adapter", asks("adapter=bare"), asks("adapter=adapter")),
    Example("no_adapter", "adapter", asks("adapter=nowhere"), asks("adapter=owner/name")),
    Example(
        "no_chat_template",
        "chat_template",
        asks("chat_template=true", model=model("untemplated")),
        asks("chat_template=true", model=model("templated")),
    ),
    *(
        Example(
            "bad_chat_template",
            "chat_template",
            asks("chat_template=true", model=model(folder)),
            asks("chat_template=true", model=model("templated")),
        )
        for folder in ("deaf", "failing")
    ),
    Example(
        "no_room_for_prompts",
        "max_output_tokens",
        asks(model=model(max_position_embeddings=128)),
        asks(model=model(max_position_embeddings=129)),
    ),
    Example(
        "no_room_for_prompts",
        "max_output_tokens",
        asks(model=model(text_config={"max_position_embeddings": 128})),
        asks(model=model(text_config={"max_position_embeddings": 129})),
    ),
    Example(
        "traffic_trace",
        "traffic.trace",
        asks("traffic.pattern=trace", "traffic.trace=/nowhere.csv"),
        asks("traffic.pattern=constant", "traffic.target_qps=1.0"),
    ),
    Example(
        "bad_carbon_trace",
        "energy.carbon_trace",
        asks("energy.carbon_trace=trace.csv"),
        asks("energy.carbon_trace=grid.csv"),
    ),
    Example("bad_trace", "energy.trace", asks("energy=replay"), asks("energy=replay", "energy.trace=trace.csv")),
    Example(
        "bad_trace",
        "energy.trace",
        asks("energy=replay", "energy.trace=prompts.txt"),
        asks("energy=replay", "energy.trace=trace.csv"),
    ),
    Example(
        "results_unwritable",
        "io.results_dir",
        asks("io.results_dir=prompts.txt/below"),
        asks("io.results_dir=bare/below"),
    ),
    Example(
        "no_effect_input_limit",
        "max_input_tokens",
        asks("max_input_tokens=1024", model=model(n_positions=1024)),
        asks("max_input_tokens=1023", model=model(n_positions=1024)),
    ),
    Example("no_effect_revision", "revision", asks("model=tiny", "revision=v1"), asks("revision=v1")),
    Example("no_effect_revision", "revision", asks("model=model", "revision=v1"), asks("model=model")),
    Example(
        "no_effect_dataset_option",
        "dataset.config",
        asks("dataset.path=builtin:sample", "dataset.config=main"),
        asks("dataset.path=owner/name", "dataset.config=main"),
    ),
    Example(
        "no_effect_dataset_option",
        "dataset.files",
        asks("dataset.path=prompts.txt", "dataset.files=a.json"),
        asks("dataset.path=bare", "dataset.files=a.json"),
    ),
]
