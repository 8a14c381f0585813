"""What speaks against a model and its files, whichever engine loads it: tokenizer, lengths, code, adapter; and GPUs.

Looks at the model's config.json and the names of its files; loads no weights. Only where a chat template is asked for
is the tokenizer loaded, to see whether it has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lem.machine.gpu import Gpu
from lem.spec.experiment import Experiment
from lem.spec.processes import gpus_needed
from lem.spec.rules import Objection, without_effect
from lem.workload.models import Model

# Any of these is a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def model_objections(experiment: Experiment, model: Model | None, *, at_most: int | None = None) -> Iterator[Objection]:
    """Yield all objections to a model.

    Args:
        experiment: what is to run.
        model: None when none was found, which has been objected to already.
        at_most: positions that the engine allows, where that is fewer than the model has.
    """
    yield from _adapter_objections(experiment)
    yield from _code_objections(experiment, model)
    if model is not None:
        yield from _file_objections(experiment, model, at_most)
        yield from _chat_template_objections(experiment, model)


def _adapter_objections(experiment: Experiment) -> Iterator[Objection]:
    if experiment.adapter is not None and _is_missing_adapter(experiment.adapter):
        yield Objection(
            "no_adapter",
            "adapter",
            f"there is no LoRA adapter at {experiment.adapter}.",
            "Name a directory with an adapter_config.json, or a hub id.",
        )


def _is_missing_adapter(adapter: str) -> bool:
    local = Path(adapter).expanduser()
    if local.is_dir():
        return not (local / "adapter_config.json").is_file()
    return adapter.startswith(("/", ".", "~")) or adapter.count("/") != 1


def _file_objections(experiment: Experiment, model: Model, at_most: int | None) -> Iterator[Objection]:
    folder = Path(model.path)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        yield Objection("no_tokenizer", "model", f"{model.path} has no tokenizer.", "Save one beside the weights.")
    positions = model.config.get("max_position_embeddings", model.config.get("n_positions"))
    limits = [limit for limit in (positions, at_most) if isinstance(limit, int)]
    if limits:
        yield from _length_objections(experiment, min(limits))
    if model.config.get("is_encoder_decoder"):
        yield Objection(
            "encoder_decoder",
            "model",
            f"{model.name} is an encoder-decoder model; lem measures decoder-only models.",
            "Choose a causal language model.",
        )


def _length_objections(experiment: Experiment, positions: int) -> Iterator[Objection]:
    room = positions - experiment.max_output_tokens
    if room <= 0:
        yield Objection(
            "no_room_for_prompts",
            "max_output_tokens",
            f"{experiment.max_output_tokens} leave no room for a prompt in the model's {positions} positions.",
            "Lower it.",
        )
    if experiment.max_input_tokens is not None and experiment.max_input_tokens >= positions:
        yield without_effect(
            "no_effect_input_limit",
            "max_input_tokens",
            f"the model has {positions} positions.",
            f"Lower it to {room} or less, or leave it out." if room > 0 else "Leave it out.",
        )


def _code_objections(experiment: Experiment, model: Model | None) -> Iterator[Objection]:
    if experiment.trust_remote_code:
        reason = "Python code that comes with the model runs, with all your rights."
        yield Objection("remote_code", "trust_remote_code", reason, "Leave it off unless you trust its authors.")
    elif model is not None and "auto_map" in model.config and "model_type" not in model.config:
        yield Objection(
            "needs_remote_code",
            "trust_remote_code",
            f"{model.name} comes with its own code.",
            "Set trust_remote_code=true if you trust its authors.",
        )


def _chat_template_objections(experiment: Experiment, model: Model) -> Iterator[Objection]:
    if not experiment.chat_template:
        return
    import transformers  # seconds, but only where a template is asked for

    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        model.path, revision=model.revision, trust_remote_code=experiment.trust_remote_code
    )
    if not getattr(tokenizer, "chat_template", None):
        yield Objection("no_chat_template", "chat_template", f"{model.name} has no chat template.", "Leave it off.")


def checkpoint_dtype(experiment: Experiment, model: Model | None) -> str | None:
    """Return the dtype on a GPU: what is asked for, else the checkpoint's where its config says it."""
    if experiment.fp_precision != "auto":
        return experiment.fp_precision
    config = {} if model is None else model.config
    said = config.get("dtype") or config.get("torch_dtype")
    return said if isinstance(said, str) else None


def unused_gpus(experiment: Experiment, gpus: Sequence[Gpu]) -> Iterator[Objection]:
    """Object to more GPUs being named than the experiment uses."""
    if experiment.gpus is not None and gpus_needed(experiment) < len(gpus):
        reason = f"{len(gpus)} GPUs are named, only the first {gpus_needed(experiment)} will be used."
        yield Objection("unused_gpus", "gpus", reason, "Set num_processes or a parallelism to use them all.")
