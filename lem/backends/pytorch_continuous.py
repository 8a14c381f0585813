"""transformers' continuous batching, driven step by step in the worker's own thread.

transformers runs its loop in a thread beside, which hides errors, cannot be interrupted, and hands tokens over later
than they were there. Here its processor is asked for one step after another instead. Requests are given to it as places
become free, so that each step holds `batch_size` of them at most; its cache is sized for so many of the longest, no
larger. What it cannot do request by request (sampling with a seed for each prompt, the penalties and bans that look at
the whole text) is done here, with transformers' own processors. Knows neither devices nor files.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata, util
from pathlib import Path
from typing import Any

from lem.backends.base import Encoded, Generation
from lem.errors import RunError
from lem.spec.experiment import Experiment
from lem.units import NS_PER_S
from lem.workload.tokens import Chunk
from lem.workload.traffic import Arrivals, Arrived, as_places_become_free

# The oldest transformers whose steps can be driven from outside as they are here.
OLDEST = (5, 19)
# Tokens in a page of the cache. Flash attention reads pages of 256; the other kernels read token by token.
PAGE, FLASH_PAGE = 16, 256
# Input tokens that a step takes in beside one token of each running request. Without flash attention a mask of so many
# rows and of the whole cache's length is allocated.
STEP_TOKENS, FLASH_STEP_TOKENS = 512, 8192
# A cache of layers of several kinds is handed out in units larger than a page.
SPARE_PAGES = 4
LAYER_TYPES = frozenset(["full_attention", "sliding_attention"])


def version() -> str:
    """Return the version of the installed transformers."""
    return metadata.version("transformers")


def is_too_old() -> bool:
    """Tell whether the installed transformers is older than `OLDEST`."""
    numbers = re.findall(r"\d+", version())
    return tuple(map(int, numbers[:2])) < OLDEST


def can_run(model_type: str) -> bool | None:
    """Tell whether transformers' code of a type of model lets the attention be exchanged; None if it has none."""
    found = util.find_spec("transformers")
    module = model_type.replace("-", "_")
    if found is None or found.origin is None:
        return None
    file = Path(found.origin).parent / "models" / module / f"modeling_{module}.py"
    return "_supports_attention_backend = True" in file.read_text(encoding="utf-8") if file.is_file() else None


@dataclass(frozen=True)
class _Room:
    """What the engine is made for: the longest request and its prompt, in tokens."""

    longest: int
    longest_prompt: int

    def holds(self, other: _Room) -> bool:
        return self.longest >= other.longest and self.longest_prompt >= other.longest_prompt


@dataclass(frozen=True)
class _Request:
    """A prompt that the engine works on, the rules for its own text, and where its random numbers come from."""

    prompt: Encoded
    arrived_ns: int
    own_rules: Any
    generator: Any


class Continuous:
    """Runs prompts so that the next one takes the place of one that is finished."""

    def __init__(self, experiment: Experiment, model: Any, end_tokens: frozenset[int]) -> None:
        """Check that the model can be run in this way.

        Raises:
            RunError: it cannot.
        """
        self._experiment = experiment
        self._model = model
        self._end_tokens = sorted(end_tokens)
        self._room: _Room | None = None
        self._manager: Any = None
        self._running: dict[str, _Request] = {}
        self._count = 0
        if is_too_old():
            raise RunError(f"Continuous batching needs transformers {'.'.join(map(str, OLDEST))} or newer.")
        if not getattr(type(model), "_supports_attention_backend", False):
            raise RunError(f"{type(model).__name__} has no exchangeable attention; use static batching.")

    # -------------------------------------------------------------- the engine
    def make_room(self, prompts: Sequence[Encoded]) -> None:
        """Allocate the cache for prompts, unless there is one that they fit into.

        Raises:
            RunError: there is not enough memory, or the model has layers that cannot be cached in pages.
        """
        longest_prompt = max((len(p.token_ids) for p in prompts), default=0)
        wanted = _Room(longest_prompt + self._experiment.max_output_tokens, longest_prompt)
        if not prompts or (self._room is not None and self._room.holds(wanted)):
            return
        self.close()
        try:
            self._manager = self._make_manager(wanted)
        except (MemoryError, RuntimeError) as error:
            raise RunError(
                f"There is no memory for a key/value cache of {self._places} requests of {wanted.longest} tokens: "
                f"{_sentence(error)} Lower batching.batch_size, max_input_tokens or max_output_tokens."
            ) from error
        except ValueError as error:
            raise RunError(f"transformers cannot batch this model continuously: {_sentence(error)}") from error
        self._room = wanted

    @property
    def _places(self) -> int:
        return self._experiment.batching.batch_size

    def _make_manager(self, room: _Room) -> Any:
        import transformers
        from transformers.generation.continuous_batching.cb_logits_processors import (
            ContinuousBatchingLogitsProcessorList,
        )

        # Without an end token transformers wants -1.
        ends = self._end_tokens or -1
        greedy = transformers.GenerationConfig(
            max_new_tokens=self._experiment.max_output_tokens, do_sample=False, eos_token_id=ends
        )
        manager = self._model.init_continuous_batching(
            generation_config=greedy, continuous_batching_config=self._configuration(transformers, room)
        )
        if self._chooses:
            manager.logit_processor = ContinuousBatchingLogitsProcessorList(
                transformers.LogitsProcessorList(
                    [_Chooser(self._rows, self._shared_rules(), self._experiment.decoder.do_sample)]
                )
            )
        manager.warmup()  # makes the processor; with neither graphs nor compilation there is nothing to warm up
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
            # A measured prompt must not profit from those before it.
            allow_block_sharing=False,
            # All that can run fit: none has to be held back.
            safety_margin=0.0,
            # Times are those of a step only if it has ended when it returns.
            use_async_batching=False,
            use_cuda_graph=False,
            # The kernel is the one that was asked for.
            auto_switch_to_flash=False,
            disable_nccl_graph_mixing=False,
            seed=self._experiment.seed,
        )

    def kv_cache_bytes(self) -> int | None:
        """Return the size of the allocated cache; None when there is none yet."""
        return None if self._manager is None else int(self._manager.batch_processor.cache.cache_tensor.nbytes)

    def settings(self) -> dict[str, str]:
        """Return what the engine is set to, as far as it changes numbers."""
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
        """Run prompts that are all there, and yield those that finish in the same step."""
        self.make_room(prompts)
        arrivals = Arrivals(prompts, [0.0] * len(prompts), 1, time.perf_counter_ns())
        yield from self._run(arrivals, self._places)

    def serve(self, arrivals: Arrivals[Encoded], at_most: int) -> Iterator[Sequence[Generation]]:
        """Run prompts as they arrive, in the midst of the others, and yield those that finish in the same step."""
        for number, done in enumerate(self._run(arrivals, at_most)):
            yield [replace(generation, batch=number) for generation in done]

    def _run(self, arrivals: Arrivals[Encoded], at_most: int) -> Iterator[Sequence[Generation]]:
        try:
            yield from as_places_become_free(
                arrivals, at_most, running=lambda: len(self._running), begin=self._begin, advance=self._advance
            )
        except GeneratorExit:
            self._take_back()
            raise

    def _begin(self, arrived: Arrived[Encoded]) -> None:
        """Give a request to the engine."""
        prompt = arrived.request
        name = str(self._count)
        self._count += 1
        self._running[name] = _Request(prompt, arrived.at_ns, self._own_rules(prompt), self._generator(prompt))
        self._manager.add_request(list(prompt.token_ids), request_id=name, record_timestamps=True)

    def _advance(self) -> list[Generation]:
        """Let the engine take a step, and return what it has finished."""
        processor = self._manager.batch_processor
        if not processor.prepare_next_batch():
            raise RunError("transformers' continuous batching has stopped before all requests were finished.")
        processor._generation_step(self._model)
        processor.update_batch()
        done = []
        while (output := self._manager.get_result()) is not None:
            done.append(self._generation(output, self._running.pop(output.request_id)))
        return done

    def _take_back(self) -> None:
        """Take back from the engine what nobody waits for any more."""
        for name in self._running:
            self._manager.cancel_request(name)
        self._running.clear()
        self._manager.batch_processor.prepare_next_batch()

    def _generation(self, output: Any, request: _Request) -> Generation:
        tokens, index = tuple(output.generated_tokens), request.prompt.index
        if output.error is not None:
            raise RunError(f"transformers gave up prompt {index}: {output.error}.")
        times_ns = [round(at_s * NS_PER_S) for at_s in output.timestamps]
        if len(times_ns) != len(tokens):
            raise RunError(f"transformers put prompt {index} off for want of cache, and computed it anew.")
        return Generation(
            index,
            batch=0,
            token_ids=tokens,
            finish_reason="stop" if tokens[-1] in self._end_tokens else "length",
            start_ns=round(output.lifespan[0] * NS_PER_S),
            end_ns=times_ns[-1],
            prefill_end_ns=times_ns[0],
            chunks=tuple(Chunk(at_ns, 1) for at_ns in times_ns) if self._experiment.streaming.enabled else (),
            arrived_ns=request.arrived_ns,
        )

    # -------------------------------------------------------------- choosing the next token
    @property
    def _chooses(self) -> bool:
        """Whether there is more to choosing a token than to take the likeliest."""
        decoder = self._experiment.decoder
        return bool(
            decoder.do_sample
            or decoder.repetition_penalty != 1
            or decoder.no_repeat_ngram_size
            or (self._experiment.min_output_tokens and self._end_tokens)
        )

    def _own_rules(self, prompt: Encoded) -> Any:
        """Return the processors that look at a request's own text, in the order of `generate`."""
        import transformers

        wanted, decoder = self._experiment, self._experiment.decoder
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
        """Return the processors that are the same for all requests and look at no text, in the order of `generate`."""
        import transformers

        decoder = self._experiment.decoder
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
        """Return the source of a prompt's random numbers: its own, so that it does not matter what runs beside it."""
        if not self._experiment.decoder.do_sample:
            return None
        import torch

        # As for a batch of this prompt alone.
        return torch.Generator(self._model.device).manual_seed(self._experiment.seed + prompt.index)

    def _rows(self) -> list[tuple[Any, _Request]]:
        """Return the requests that get a token in this step, in the order of the rows of scores."""
        in_step = self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        return [(each.state, self._running[each.state.request_id]) for each in in_step if each.has_new_token]

    # -------------------------------------------------------------- the end
    def close(self) -> None:
        """Give the cache back and the model its own attention."""
        manager, self._manager, self._room = self._manager, None, None
        self._running.clear()
        if manager is None:
            return
        manager.batch_processor = None
        original = getattr(manager, "_original_attn_impl", None)
        if original is not None:
            self._model.set_attn_implementation(original)
        manager.destroy()


class _Chooser:
    """Chooses each request's next token from its scores; transformers' loop takes the likeliest of what is left.

    Takes the place of a logits processor.
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


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return text if text.endswith(".") else f"{text}."
