"""Objections that all engines share: to models, GPUs and engine arguments.

The checks read the model's config.json but load no weights; `lem.backends.checkpoint_objections` checks the model's
files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from lem.backends import checkpoint_objections, transformers_source
from lem.errors import did_you_mean
from lem.machine.gpu import Gpu
from lem.spec.experiment import Experiment
from lem.spec.paths import expanded
from lem.spec.processes import changed, gpus_needed
from lem.spec.rules import Objection, without_effect
from lem.workload.models import Model

# Keys under which a model's configuration gives its number of positions (the maximum length of a sequence).
POSITIONS = ("max_position_embeddings", "n_positions")
# The maximum number of values that a message lists.
LISTED = 8


# ------------------------------------------------------------------ models
def model_objections(experiment: Experiment, model: Model | None, *, limit: str | None = None) -> Iterator[Objection]:
    """Yield all objections to a model.

    Args:
        experiment: the experiment to check.
        model: the model; if None, the checks that need the model are skipped.
        limit: the name of the backend's option that limits the length of a sequence.
    """
    yield from _adapter(experiment)
    yield from _code(experiment, model)
    if model is not None:
        if model.config.get("is_encoder_decoder"):
            yield Objection("encoder_decoder", "model", f"{model.name} is an encoder-decoder model.")
        if not experiment.trust_remote_code:
            yield from checkpoint_objections.values(model)
        yield from checkpoint_objections.tokenizer(model)
        yield from _lengths(experiment, model, limit)
        yield from checkpoint_objections.chat_template(experiment, model)


def _adapter(experiment: Experiment) -> Iterator[Objection]:
    adapter = experiment.adapter
    if adapter is None:
        return
    local = expanded(adapter)
    if local.is_dir():
        is_missing = not (local / "adapter_config.json").is_file()
    else:
        is_missing = adapter.startswith(("/", ".", "~")) or adapter.count("/") != 1
    if is_missing:
        yield Objection("no_adapter", "adapter", f"there is no LoRA adapter at {adapter}.")


def _code(experiment: Experiment, model: Model | None) -> Iterator[Objection]:
    is_pytorch = experiment.backend.name == "pytorch"
    if experiment.trust_remote_code:
        fact = "Python code that comes with the model runs with your permissions."
        yield Objection("remote_code", "trust_remote_code", fact)
    # Other engines have their own code for some of these models.
    elif model is not None and needs_own_code(model) and (is_pytorch or "model_type" not in model.config):
        yield Objection("needs_remote_code", "trust_remote_code", f"{model.name} needs its own code.")


def needs_own_code(model: Model) -> bool:
    """Return whether the model needs the code that comes with it, because transformers has no code for the model."""
    known = transformers_source.language_models()
    kind = model.config.get("model_type")
    return "auto_map" in model.config and (kind is None or (bool(known) and kind not in known))


def _lengths(experiment: Experiment, model: Model, limit: str | None) -> Iterator[Objection]:
    at_most = None if limit is None else getattr(experiment.backend, limit)
    most = positions_of(model)
    if at_most is not None and most is not None and at_most > most:
        yield Objection("too_few_positions", f"backend.{limit}", f"the model has only {most} positions.")
    limits = [each for each in (most, at_most) if isinstance(each, int)]
    if not limits:
        return
    longest, output = min(limits), experiment.max_output_tokens
    if output >= longest:
        fact = f"{output} tokens leave no room for a prompt: a sequence has at most {longest} tokens."
        yield Objection("no_room_for_prompts", "max_output_tokens", fact)
    if experiment.max_input_tokens is not None and experiment.max_input_tokens >= longest:
        fact = f"a sequence has at most {longest} tokens, of which the output may take {output}."
        yield without_effect("no_effect_input_limit", "max_input_tokens", fact)


def positions_of(model: Model) -> int | None:
    """Return the model's number of positions, from its config or else from its type's defaults; None if unknown."""
    config = model.text_config
    named = [config[name] for name in POSITIONS if isinstance(config.get(name), int)]
    if named:
        return int(named[0])
    kind = config.get("model_type")
    defaults = (transformers_source.default(str(kind), name) for name in POSITIONS) if kind else ()
    return next((each for each in defaults if each is not None), None)


def checkpoint_dtype(experiment: Experiment, model: Model | None) -> str | None:
    """Return the dtype used on a GPU: the requested dtype or, for `auto`, the config's dtype; None if unknown."""
    if experiment.fp_precision != "auto":
        return experiment.fp_precision
    config = {} if model is None else model.config
    named = config.get("dtype") or config.get("torch_dtype")
    return named if isinstance(named, str) else None


# ------------------------------------------------------------------ GPUs
def unused_gpus(experiment: Experiment, gpus: Sequence[Gpu]) -> Iterator[Objection]:
    """Yield an objection if more GPUs are named than the experiment uses."""
    used = gpus_needed(experiment)
    if experiment.gpus is not None and used < len(gpus):
        fact = f"{len(gpus)} GPUs are named, but the run uses {used}."
        yield Objection("unused_gpus", "gpus", fact)


# ------------------------------------------------------------------ an engine's own options
def without_method(speculation: Any, method: str) -> Iterator[Objection]:
    """Object to every speculative decoding option that is set; called if the option named `method` is not set."""
    for name in changed(speculation, *(field.name for field in fields(speculation))):
        fact = f"backend.speculative.{method} is not set."
        yield without_effect("no_effect_speculation", f"backend.speculative.{name}", fact)


def set_by_lem(path: str, owner: str) -> Objection:
    """Return an objection to an engine argument that lem sets.

    `owner` completes the sentence "this argument is set by …": an option, or "lem" and a reason.
    """
    return Objection("engine_arg_of_lem", path, f"this argument is set by {owner}.")


class Source(Protocol):
    """The source code of an installed engine, which shows what arguments this version of the engine accepts."""

    def version(self) -> str:
        """Return the version of the engine that is installed."""

    def arguments(self) -> Collection[str]:
        """Return the names of the engine's arguments; empty if they cannot be determined."""


@dataclass(frozen=True)
class EngineArguments:
    """The engine arguments that users can pass by name in one of a backend's options.

    `dropped` maps arguments of earlier versions to advice on replacing them.
    """

    engine: str
    option: str
    source: Source
    dropped: Mapping[str, str]

    def objections(
        self,
        given: Mapping[str, Any] | None,
        owner: Callable[[str, Any], str | None],
        more: Callable[[str, str, Any], Iterator[Objection]],
    ) -> Iterator[Objection]:
        """Object to arguments that lem sets, that the engine has dropped, or that the installed version lacks.

        Args:
            given: the arguments, by name.
            owner: a function that returns what sets an argument (see `set_by_lem`), or None if nothing does.
            more: a function that yields further objections to an argument, given its path, name and value.
        """
        known = self.source.arguments()
        for name, value in (given or {}).items():
            path = f"{self.option}.{name}"
            if setter := owner(name, value):
                yield set_by_lem(path, setter)
            elif dropped := self._dropped(name):
                yield Objection("dropped_engine_arg", path, dropped)
            elif known and name not in known:
                yield self.unknown(path, name, known)
            else:
                yield from more(path, name, value)

    def about_key(self, name: str, owner: str | None, known: Collection[str] = ()) -> str | None:
        """Return a message about a key that is not an option of the backend; None if it never was an engine argument.

        Args:
            name: the key.
            owner: what sets this argument (see `set_by_lem`), or None if nothing does.
            known: the arguments that lem knows the engine to have; needed if the engine is not installed.
        """
        if dropped := self._dropped(name):
            return dropped
        if owner:
            return f"this argument of {self.engine} is set by {owner}."
        if name in self.source.arguments() or name in known:
            return f"this is an argument of {self.engine}; write {self.option}={{{name}: …}}."
        return None

    def _dropped(self, name: str) -> str | None:
        """Return advice on replacing an argument that only earlier versions had; None for any other argument."""
        if name not in self.dropped or name in self.source.arguments():
            return None
        return f"{self.engine} no longer has {name}; {self.dropped[name]}."

    def unknown(self, path: str, name: str, known: Collection[str] = ()) -> Objection:
        """Return an objection to an argument that the installed version lacks, suggesting similar ones."""
        fact = f"{self._installed} has no argument {name}.{did_you_mean(name, sorted(known))}"
        return Objection("unknown_engine_arg", path, fact)

    def unknown_value(self, path: str, value: str, known: Sequence[str]) -> Iterator[Objection]:
        """Object to a value that the installed version does not know; if `known` is empty, any value is accepted."""
        if known and value not in known:
            some = ", ".join(known[:LISTED]) + (", …" if len(known) > LISTED else "")
            fact = f"{self._installed} has no {value}.{did_you_mean(value, known) or f' It has {some}.'}"
            yield Objection("unknown_engine_value", path, fact)

    @property
    def _installed(self) -> str:
        return f"{self.engine} {self.source.version()}"
