"""Rules about the files of models, prompts, traces and results, which `tests/spec/conftest.py` makes."""

from __future__ import annotations

from tests.spec.examples.example import Example, asks, model

EXAMPLES = [
    Example("no_tokenizer", "model", asks(model=model("bare")), asks(model=model())),
    Example("encoder_decoder", "model", asks(model=model(is_encoder_decoder=True)), asks(model=model())),
    Example(
        "needs_remote_code",
        "trust_remote_code",
        asks(model=model(auto_map={})),
        asks("trust_remote_code=true", model=model(auto_map={})),
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
            "chat_template_loses_prompts",
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
        "traffic_trace",
        "traffic.trace",
        asks("traffic.pattern=trace", "traffic.trace=/nowhere.csv"),
        asks("traffic.pattern=constant", "traffic.target_qps=1.0"),
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
