"""transformers' continuous batching, driven step by step in the worker's main thread.

The loop that comes with transformers runs in another thread, which hides errors, cannot be interrupted, and delivers
tokens late. Instead, this module has the engine's processor take one step after another. It gives the processor a new
request whenever a slot is free, so a step has at most `batch_size` requests, and the cache has room for `batch_size`
requests of the maximum length. The processor cannot set some options per request: sampling with a seed for each prompt,
and penalties and bans that depend on the whole text. This module applies these options itself, with transformers' own
logits processors. It knows nothing about devices or files.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from lem.backends import transformers_source
from lem.backends.base import Encoded, Generation
from lem.backends.engine import reason_of, sentence
from lem.backends.pytorch_forward import ForwardWatch, Noticed, not_finite
from lem.backends.session import Request, Session
from lem.errors import RunError
from lem.quantities import NS_PER_S
from lem.spec.experiment import Experiment
from lem.workload.tokens import Chunk

# The oldest version of transformers whose steps can be driven in this way.
OLDEST = (5, 19)
# The number of tokens in a page of the cache. Flash attention reads pages of 256; other kernels read token by token.
PAGE, FLASH_PAGE = 16, 256
# The number of input tokens that a step can process in addition to one token per running request. Without flash
# attention, the mask has a row for each of these input tokens and a column for each token in the cache.
STEP_TOKENS, FLASH_STEP_TOKENS = 512, 8192
# The number of spare pages: a model with several kinds of layers allocates its cache in units larger than a page.
SPARE_PAGES = 4
LAYER_TYPES = frozenset(["full_attention", "sliding_attention"])
# Models whose attention can be replaced, but which fail or give different tokens with the paged cache, and why
# (transformers 5.23).
_CACHE_NOT_PASSED_ON = "does not pass the paged cache on to its attention"
_OTHER_SIZES = "has keys and values whose sizes contradict its configuration"
UNPAGED = {
    **dict.fromkeys(("diffllama", "doge", "hrm_text", "nemotron"), _CACHE_NOT_PASSED_ON),
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified_text", "jetmoe", "mimo_v2_flash"), _OTHER_SIZES),
}


def version() -> str:
    """Return the version of the installed transformers."""
    return metadata.version("transformers")


def is_too_old() -> bool:
    """Return whether the installed transformers is older than `OLDEST`."""
    numbers = re.findall(r"\d+", version())
    return tuple(map(int, numbers[:2])) < OLDEST


def can_run(model_type: str) -> bool | None:
    """Return whether transformers can replace a model type's attention with a paged one; None if that is unknown."""
    source = transformers_source.modeling(model_type)
    return None if source is None else "_supports_attention_backend = True" in source


def unpaged(config: Mapping[str, Any]) -> str | None:
    """Return why a model with replaceable attention still cannot use the paged cache; None if it can.

    Args:
        config: the configuration of the language model.
    """
    kind = str(config.get("model_type"))
    if config.get("kv_lora_rank"):
        return (
            "the paged cache has one width for keys and values, but multi-head latent attention has a different width "
            "for each."
        )
    if reason := UNPAGED.get(kind):
        return f"a {kind} model {reason}."
    return None


@dataclass(frozen=True)
class _Room:
    """The lengths that the engine is sized for: the longest request and the longest prompt, in tokens."""

    longest: int
    longest_prompt: int

    def holds(self, other: _Room) -> bool:
        return self.longest >= other.longest and self.longest_prompt >= other.longest_prompt


@dataclass
class _Request(Request):
    """A request, its name in the engine, the logits processors for its text, and its random number generator."""

    name: str = ""
    own_rules: Any = None
    generator: Any = None


class Continuous(Session[_Request]):
    """Runs prompts continuously: each prompt that finishes is replaced by the next one."""

    cache = "paged"
    graphs_compiled = 0

    def __init__(self, experiment: Experiment, model: Any, watch: ForwardWatch, end_tokens: frozenset[int]) -> None:
        """Check that the model can be batched continuously.

        Raises:
            RunError: the model cannot be batched continuously.
        """
        super().__init__(experiment)
        self._model, self._watch = model, watch
        self.noticed = Noticed()
        self._end_tokens = sorted(end_tokens)
        self._room: _Room | None = None
        self._manager: Any = None
        self._names = itertools.count()
        if is_too_old():
            raise RunError(f"Continuous batching needs transformers {'.'.join(map(str, OLDEST))} or newer.")
        if not getattr(type(model), "_supports_attention_backend", False):
            name = type(model).__name__
            raise RunError(f"transformers cannot replace the attention implementation of {name}; use static batching.")

    # -------------------------------------------------------------- the engine
    def make_room(self, prompts: Sequence[Encoded]) -> None:
        """Allocate the cache for the prompts, unless they fit into the existing cache.

        Raises:
            RunError: there is too little memory, or the model has layers that cannot be cached in pages.
        """
        longest_prompt = max((len(p.token_ids) for p in prompts), default=0)
        wanted = _Room(longest_prompt + self.experiment.max_output_tokens, longest_prompt)
        if not prompts or (self._room is not None and self._room.holds(wanted)):
            return
        self.close()
        try:
            self._manager = self._make_manager(wanted)
        except (MemoryError, RuntimeError) as error:
            raise RunError(
                f"Too little memory for a key/value cache for {self._places} requests of {wanted.longest} tokens: "
                f"{reason_of(error)} Lower batching.batch_size, max_input_tokens or max_output_tokens."
            ) from error
        except ValueError as error:
            raise RunError(f"transformers cannot batch this model continuously: {reason_of(error)}") from error
        self._room = wanted

    @property
    def _places(self) -> int:
        return self.experiment.batching.batch_size

    def _make_manager(self, room: _Room) -> Any:
        import transformers
        from transformers.generation.continuous_batching.cb_logits_processors import (
            ContinuousBatchingLogitsProcessorList,
        )

        # If there is no end token, transformers expects -1.
        ends = self._end_tokens or -1
        greedy = transformers.GenerationConfig(
            max_new_tokens=self.experiment.max_output_tokens, do_sample=False, eos_token_id=ends
        )
        manager = self._model.init_continuous_batching(
            generation_config=greedy, continuous_batching_config=self._configuration(transformers, room)
        )
        if self._chooses:
            manager.logit_processor = ContinuousBatchingLogitsProcessorList(
                transformers.LogitsProcessorList(
                    [_Chooser(self._rows, self._shared_rules(), self.experiment.decoder.do_sample)]
                )
            )
        manager.warmup()  # only creates the processor; without graphs or compilation, nothing is warmed up
        return manager

    def _configuration(self, transformers: Any, room: _Room) -> Any:
        with_flash = "flash" in self._model.config._attn_implementation
        page = FLASH_PAGE if with_flash else PAGE
        taken_in = min(FLASH_STEP_TOKENS if with_flash else STEP_TOKENS, self._places * room.longest_prompt)
        return transformers.ContinuousBatchingConfig(
            page_size=page,
            num_blocks=self._places * -(-room.longest // page) + SPARE_PAGES,
            max_batch_tokens=self._places + taken_in,
            max_requests_per_batch=self._places,
            # A measured prompt must not benefit from earlier prompts.
            allow_block_sharing=False,
            # The cache has room for every request that can run, so none has to be held back.
            safety_margin=0.0,
            # A step can be timed only if it has ended when the call returns.
            use_async_batching=False,
            use_cuda_graph=False,
            # Keep the kernel that was requested.
            auto_switch_to_flash=False,
            disable_nccl_graph_mixing=False,
            seed=self.experiment.seed,
        )

    def kv_cache_bytes(self) -> int | None:
        """Return the size of the allocated cache in bytes; None before it is allocated."""
        return None if self._manager is None else int(self._manager.batch_processor.cache.cache_tensor.nbytes)

    def forget_cache(self) -> None:
        """Do nothing: the size of this cache is fixed when it is allocated, so there is no largest size to forget."""

    def settings(self) -> dict[str, str]:
        """Return the engine's settings that affect the measurements."""
        if self._manager is None:
            return {}
        cache = self._manager.batch_processor.cache
        page = self._manager.continuous_batching_config.page_size
        return {
            "kv_cache_tokens": str(cache.num_blocks * page),
            "kv_cache_page_tokens": str(page),
            "max_step_tokens": str(cache.max_batch_tokens),
            "max_running_requests": str(self._places),
        }

    # -------------------------------------------------------------- running
    def generate(self, prompts: Sequence[Encoded]) -> Iterator[Sequence[Generation]]:
        """Run prompts that are all available from the start, and yield the outputs of each step together."""
        self.make_room(prompts)
        yield from self.fill_places(prompts)

    def tokens_so_far(self, request: _Request) -> int | None:
        """Return how many tokens have been generated for an unfinished request; 0 if the engine has not begun it."""
        state = self._manager.batch_processor.scheduler.active_requests.get(request.name)
        return 0 if state is None else len(state.generated_tokens)

    def begin(self, key: int, prompt: Encoded, batch: int, arrived_ns: int) -> None:
        """Give the engine a request under a new name, because an earlier request may have had the same `key`."""
        key = next(self._names)
        rules, generator = self._own_rules(prompt), self._generator(prompt)
        request = _Request(prompt, batch, arrived_ns, name=str(key), own_rules=rules, generator=generator)
        self.running[key] = request
        self._manager.add_request(list(prompt.token_ids), request_id=request.name, record_timestamps=True)

    def advance(self, next_ns: int | None = None) -> Mapping[int, Generation]:
        """Let the engine take one step, however long it takes, and return the outputs that it has finished, by key."""
        processor = self._manager.batch_processor
        if not processor.prepare_next_batch():
            raise RunError("transformers' continuous batching stopped before all requests were finished.")
        processor._generation_step(self._model)
        processor.update_batch()
        done = {}
        while (output := self._manager.get_result()) is not None:
            key = int(output.request_id)
            done[key] = self._generation(output, self.running.pop(key))
        if done:
            self.noticed.not_finite += min(not_finite(self._watch.take()), len(done))
        return done

    def cancel(self) -> None:
        """Cancel the requests in the engine."""
        for key in self.running:
            self._manager.cancel_request(str(key))
        self._manager.batch_processor.prepare_next_batch()

    def _generation(self, output: Any, request: _Request) -> Generation:
        tokens, index = tuple(output.generated_tokens), request.prompt.index
        if output.error is not None:
            raise RunError(f"transformers failed for prompt {index}: {sentence(str(output.error))}")
        times_ns = [round(at_s * NS_PER_S) for at_s in output.timestamps]
        if len(times_ns) != len(tokens):
            raise RunError(f"transformers ran out of cache space, so it preempted and recomputed prompt {index}.")
        return Generation(
            index,
            batch=0,
            token_ids=tokens,
            finish_reason="stop" if tokens[-1] in self._end_tokens else "length",
            start_ns=round(output.lifespan[0] * NS_PER_S),
            end_ns=times_ns[-1],
            prefill_end_ns=times_ns[0],
            chunks=tuple(Chunk(at_ns, 1) for at_ns in times_ns) if self.streams else (),
            arrived_ns=request.arrived_ns,
        )

    # -------------------------------------------------------------- choosing the next token
    @property
    def _chooses(self) -> bool:
        """Whether choosing a token involves more than taking the most likely one."""
        decoder = self.experiment.decoder
        return bool(
            decoder.do_sample
            or decoder.repetition_penalty != 1
            or decoder.no_repeat_ngram_size
            or (self.experiment.min_output_tokens and self._end_tokens)
        )

    def _own_rules(self, prompt: Encoded) -> Any:
        """Return the logits processors that depend on a request's own text, in the order that `generate` uses."""
        import transformers

        wanted, decoder = self.experiment, self.experiment.decoder
        rules = transformers.LogitsProcessorList()
        if decoder.repetition_penalty != 1:
            rules.append(transformers.RepetitionPenaltyLogitsProcessor(decoder.repetition_penalty))
        if wanted.min_output_tokens and self._end_tokens:
            rules.append(
                transformers.MinNewTokensLengthLogitsProcessor(
                    len(prompt.token_ids), wanted.min_output_tokens, self._end_tokens, device=self._model.device
                )
            )
        if decoder.no_repeat_ngram_size:
            rules.append(transformers.NoRepeatNGramLogitsProcessor(decoder.no_repeat_ngram_size))
        return rules

    def _shared_rules(self) -> Any:
        """Return the logits processors that are the same for all requests, in the order that `generate` uses."""
        import transformers

        decoder = self.experiment.decoder
        rules = transformers.LogitsProcessorList()
        if not decoder.do_sample:
            return rules
        if decoder.temperature != 1:
            rules.append(transformers.TemperatureLogitsWarper(decoder.temperature))
        if decoder.top_k:
            rules.append(transformers.TopKLogitsWarper(decoder.top_k))
        if decoder.top_p < 1:
            rules.append(transformers.TopPLogitsWarper(decoder.top_p))
        if decoder.min_p:
            rules.append(transformers.MinPLogitsWarper(decoder.min_p))
        return rules

    def _generator(self, prompt: Encoded) -> Any:
        """Return a prompt's own random number generator, so that its tokens do not depend on other prompts.

        The result is None if tokens are not sampled.
        """
        if not self.experiment.decoder.do_sample:
            return None
        import torch

        # This is the seed of a batch that contains only this prompt.
        return torch.Generator(self._model.device).manual_seed(self.experiment.seed + prompt.index)

    def _rows(self) -> list[tuple[Any, _Request]]:
        """Return the requests that get a token in this step, in the order of their rows in the tensor of scores."""
        in_step = self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        return [(each.state, self.running[int(each.state.request_id)]) for each in in_step if each.has_new_token]

    # -------------------------------------------------------------- the end
    def close(self) -> None:
        """Free the cache, and restore the model's own attention."""
        manager, self._manager, self._room = self._manager, None, None
        self.running.clear()
        if manager is None:
            return
        manager.batch_processor = None
        original = getattr(manager, "_original_attn_impl", None)
        if original is not None:
            self._model.set_attn_implementation(original)
        manager.destroy()


class _Chooser:
    """Applies the logits processors and, if tokens are sampled, samples them. Replaces transformers' own processor.

    The engine always takes the token with the highest score. A sampled token is therefore the only one whose score is
    finite.
    """

    supports_continuous_batching = True

    def __init__(self, rows: Callable[[], Sequence[tuple[Any, _Request]]], shared_rules: Any, samples: bool) -> None:
        self._rows = rows
        self._shared_rules = shared_rules
        self._samples = samples

    def __call__(self, _ids: Any, scores: Any) -> Any:
        import torch

        rows = self._rows()
        for row, (state, request) in enumerate(rows):
            if request.own_rules:
                text = torch.tensor([state.initial_tokens + state.generated_tokens], device=scores.device)
                scores[row : row + 1] = request.own_rules(text, scores[row : row + 1])
        scores = self._shared_rules(None, scores)
        if not self._samples:
            return scores
        weights = scores.softmax(dim=-1)
        chosen = torch.full_like(scores, float("-inf"))
        for row, (_, request) in enumerate(rows):
            chosen[row, torch.multinomial(weights[row : row + 1], 1, generator=request.generator)[0]] = 0.0
        return chosen
