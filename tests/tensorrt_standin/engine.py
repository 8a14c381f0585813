"""The engine in the stand-in for TensorRT-LLM: transformers on the CPU, one sequence after the other in each step.

Requests are accepted and answered as in the original: by results that can be awaited or iterated over, and whose token
ids grow. The model runs in a thread, or in a separate process. Greedy tokens are those of the model. For sampling,
each request has its own random generator, which in the original is so only for requests that run alone.

TENSORRT_STANDIN holds options as JSON: `process` (run the model in a separate process), `load_error` (the message of an
error at load), `changes` (arguments that the engine overrides), `die_after`, `error_after` and `hang_after` (the number
of tokens after which the process dies, an error is raised, or nothing more is returned), `no_metrics`, `keep_end_token`
(false: the engine's own end token is left out of the output), `step_s` (the minimum duration of a step, in seconds).
TENSORRT_STANDIN_LOG names a file to which each call appends a line.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

# Tests run the same prompts again and again.
KNOWN: dict[tuple, object] = {}
MOST_KNOWN = 5000


def controls() -> dict:
    return json.loads(os.environ.get("TENSORRT_STANDIN", "{}"))


# ------------------------------------------------------------------ the model's side
class Sequence:
    """A request that is running."""

    def __init__(self, number, ids, params, streaming, salt):
        self.number, self.ids, self.params, self.streaming, self.salt = number, list(ids), params, streaming, salt
        self.prompt, self.cache, self.generator, self.unsent, self.steps = len(ids), None, None, [], 0
        self.arrival = time.monotonic()
        self.scheduled = self.first = self.last = 0.0
        self.reused = self.blocks = 0

    @property
    def new(self):
        return len(self.ids) - self.prompt


class Runner:
    """Runs up to max_batch_size sequences, and hands out responses."""

    def __init__(self, settings, answer):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(1)
        dtype = "auto" if settings["dtype"] == "auto" else getattr(torch, settings["dtype"])
        self.model = transformers.AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype).eval()
        if settings["lora"]:
            import peft

            self.model = peft.PeftModel.from_pretrained(self.model, settings["lora"]).eval()
        self.settings, self.answer, self.controls = settings, answer, controls()
        self.waiting, self.running, self.seen, self.made, self.most = [], [], set(), 0, 0

    def add(self, *request):
        self.waiting.append(Sequence(*request))

    def abort(self, number):
        for sequence in [s for s in self.waiting + self.running if s.number == number]:
            (self.waiting if sequence in self.waiting else self.running).remove(sequence)
            self.report(sequence, "cancelled")

    def step(self):
        """Compute one token for each running sequence, or several with speculation."""
        import torch

        began = time.monotonic()
        while self.waiting and len(self.running) < self.settings["max_batch_size"]:
            self.running.append(self.begin(self.waiting.pop(0)))
            self.most = max(self.most, len(self.running))
        for sequence in list(self.running):
            sequence.steps += 1
            for _ in range(1 + self.settings["draft"]):
                with torch.inference_mode():
                    reason = self.extend(sequence)
                if reason:
                    self.running.remove(sequence)
                    break
            if reason or (sequence.streaming and sequence.steps % self.settings["stream_interval"] == 0):
                self.report(sequence, reason)
        time.sleep(max(0.0, self.controls.get("step_s", 0.0) - (time.monotonic() - began)))

    def begin(self, sequence):
        """Note when the request began, and which blocks of its prompt are already in the cache."""
        sequence.scheduled, size = time.monotonic(), self.settings["tokens_per_block"]
        keys = [(sequence.salt, tuple(sequence.ids[:end])) for end in range(size, sequence.prompt, size)]
        if self.settings["enable_block_reuse"]:
            sequence.reused = sum(1 for key in keys if key in self.seen)
            self.seen.update(keys)
        sequence.blocks = len(keys)
        return sequence

    def extend(self, sequence):
        """Add a token; return why the sequence is finished, or None."""
        token = self.choose(self.logits(sequence), sequence)
        sequence.ids.append(token)
        sequence.unsent.append(token)
        sequence.last = time.monotonic()
        sequence.first = sequence.first or sequence.last
        self.made += 1
        self.misbehave()
        params = sequence.params
        if token == params["end_id"] or token in (params["stop_token_ids"] or ()):
            if token == params["end_id"] and not self.controls.get("keep_end_token", True):
                sequence.unsent.pop()
            if token != params["end_id"] and not params["include_stop_str_in_output"]:
                sequence.unsent.pop()
            return "stop"
        return "length" if sequence.new >= params["max_tokens"] else None

    def logits(self, sequence):
        """Return the logits of the next token; logits that were computed before are reused."""
        import torch

        key = (self.settings["model"], self.settings["dtype"], self.settings["lora"], tuple(sequence.ids))
        if key not in KNOWN:
            done = 0 if sequence.cache is None else sequence.cache.get_seq_length()
            out = self.model(torch.tensor([sequence.ids[done:]]), past_key_values=sequence.cache, use_cache=True)
            sequence.cache = out.past_key_values
            if len(KNOWN) >= MOST_KNOWN:
                KNOWN.clear()
            KNOWN[key] = out.logits[0, -1].float()
        return KNOWN[key].clone()

    def misbehave(self):
        if self.made == self.controls.get("die_after"):
            os._exit(9)
        if self.made == self.controls.get("hang_after"):
            time.sleep(10**6)
        if self.made == self.controls.get("error_after"):
            raise RuntimeError("CUDA error: an illegal\nmemory access was encountered")

    def choose(self, logits, sequence):
        import torch

        params = sequence.params
        penalty = params["repetition_penalty"]
        if penalty not in (None, 1.0):
            present = torch.tensor(sorted(set(sequence.ids)))
            some = logits[present]
            logits[present] = torch.where(some < 0, some * penalty, some / penalty)
        if size := params["no_repeat_ngram_size"]:
            import transformers

            ban = transformers.NoRepeatNGramLogitsProcessor(size)
            logits = ban(torch.tensor([sequence.ids]), logits[None])[0]
        if sequence.new < (params["min_tokens"] or 0) and params["end_id"] >= 0:
            logits[params["end_id"]] = -torch.inf
        if params["temperature"] is None and params["top_p"] is None and params["top_k"] is None:
            return int(logits.argmax())
        shares = (logits / (params["temperature"] or 1.0)).softmax(-1)
        if params["min_p"]:
            shares[shares < params["min_p"] * shares.max()] = 0
        order = shares.argsort(descending=True)
        ranked = shares[order]
        ranked[params["top_k"] or len(ranked) :] = 0
        ranked[ranked.cumsum(-1) - ranked > (params["top_p"] or 1.0)] = 0
        sequence.generator = sequence.generator or torch.Generator().manual_seed(params["seed"] or 0)
        return int(order[torch.multinomial(ranked, 1, generator=sequence.generator)])

    def report(self, sequence, reason):
        times = {
            "arrival_time": sequence.arrival,
            "first_scheduled_time": sequence.scheduled,
            "first_token_time": sequence.first,
            "last_token_time": sequence.last,
        }
        answer = {"number": sequence.number, "ids": sequence.unsent, "reason": reason, "steps": sequence.steps}
        answer |= {"reused": sequence.reused, "missed": sequence.blocks - sequence.reused, "times": times}
        answer |= {"drafts": self.settings["draft"] * sequence.steps, "new": sequence.new, "most": self.most}
        sequence.unsent = []
        self.answer(answer)

    def serve(self, commands):
        """Execute commands until one is None."""
        while True:
            idle = not self.waiting and not self.running
            while idle or not commands.empty():
                command = commands.get()
                if command is None:
                    return
                getattr(self, command[0])(*command[1:])
                idle = False
            if self.waiting or self.running:
                try:
                    self.step()
                except Exception as error:
                    for sequence in self.waiting + self.running:
                        self.answer({"number": sequence.number, "error": str(error)})
                    self.waiting, self.running = [], []


def child():
    """Be the process that runs the model: commands come on standard input, responses go to standard output."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    commands = queue.Queue()

    def answer(message):
        pickle.dump(message, out)
        out.flush()

    def read():
        while True:
            try:
                commands.put(pickle.load(sys.stdin.buffer))
            except EOFError:
                os._exit(0)

    runner = Runner(pickle.load(sys.stdin.buffer), answer)
    threading.Thread(target=read, daemon=True).start()
    answer("ready")
    runner.serve(commands)


# ------------------------------------------------------------------ the user's side
class Result:
    """A request's result, which grows as responses arrive."""

    def __init__(self, engine, number):
        self.engine, self.number = engine, number
        self.outputs = [SimpleNamespace(token_ids=[], finish_reason=None, request_perf_metrics=None)]
        self.finished, self.cached_tokens, self.decoding_iter = False, 0, 0
        self.loop, self.answers = asyncio.get_running_loop(), asyncio.Queue()

    def put(self, answer):
        self.loop.call_soon_threadsafe(self.answers.put_nowait, answer)

    async def advance(self):
        answer = await self.answers.get()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        (output,) = self.outputs
        output.token_ids.extend(answer["ids"])
        self.decoding_iter = answer["steps"]
        self.cached_tokens = answer["reused"] * self.engine.settings["tokens_per_block"]
        if answer["reason"]:
            self.finished, output.finish_reason = True, answer["reason"]
            if not controls().get("no_metrics"):
                output.request_perf_metrics = metrics(answer)

    async def wait(self):
        while not self.finished:
            await self.advance()
        return self

    def __await__(self):
        return self.wait().__await__()

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self.finished:
            raise StopAsyncIteration
        await self.advance()
        return self

    def abort(self):
        self.engine.commands.put(("abort", self.number))


def metrics(answer):
    """Return the counterpart of the original's RequestPerfMetrics."""
    times = {name: timedelta(seconds=value) for name, value in answer["times"].items()}
    cache = {"num_reused_blocks": answer["reused"], "num_missed_blocks": answer["missed"]}
    drafts = {"total_draft_tokens": answer["drafts"], "total_accepted_draft_tokens": answer["new"] - answer["steps"]}
    return SimpleNamespace(
        timing_metrics=SimpleNamespace(**times),
        kv_cache_metrics=SimpleNamespace(**cache),
        speculative_decoding=SimpleNamespace(**drafts),
    )


class Engine:
    """The base class of the stand-in's LLM."""

    def __init__(self, **arguments):
        from tensorrt_llm.llmapi.llm_args import TorchLlmArgs

        self.log("LLM", arguments)
        self.args = TorchLlmArgs(**arguments)
        for name, value in controls().get("changes", {}).items():
            setattr(self.args, name, value)
        if text := controls().get("load_error"):
            raise RuntimeError(text)
        config = json.loads((self.args_path / "config.json").read_text())
        self.args.max_seq_len = self.args.max_seq_len or config.get("max_position_embeddings")
        cache, speculation, lora = self.args.kv_cache_config, self.args.speculative_config, self.args.lora_config
        self.settings = {
            "model": str(self.args_path),
            "dtype": self.args.dtype,
            "lora": lora.lora_dir[0] if lora else None,
            "max_batch_size": self.args.max_batch_size,
            "tokens_per_block": cache.tokens_per_block,
            "enable_block_reuse": cache.enable_block_reuse,
            "draft": speculation.max_draft_len if speculation else 0,
            "stream_interval": self.args.stream_interval,
        }
        self.results, self.commands, self.process, self.most_at_once = {}, queue.Queue(), None, 0
        self.begin_process() if controls().get("process") else self.begin_thread()

    @property
    def args_path(self):
        from pathlib import Path

        return Path(self.args.model)

    def begin_thread(self):
        runner = Runner(self.settings, self.deliver)
        threading.Thread(target=runner.serve, args=(self.commands,), daemon=True).start()

    def begin_process(self):
        command = [sys.executable, "-c", "from tensorrt_llm.engine import child; child()"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        pickle.dump(self.settings, self.process.stdin)
        self.process.stdin.flush()
        assert pickle.load(self.process.stdout) == "ready"
        threading.Thread(target=self.read, daemon=True).start()
        threading.Thread(target=self.write, daemon=True).start()

    def read(self):
        while True:
            try:
                self.deliver(pickle.load(self.process.stdout))
            except (EOFError, pickle.UnpicklingError):
                return  # like the original after one of its processes was killed, it says nothing

    def write(self):
        while (command := self.commands.get()) is not None:
            pickle.dump(command, self.process.stdin)
            self.process.stdin.flush()

    def deliver(self, answer):
        # The maximum number that ran at once; a test of the real engine would read it from iteration statistics.
        self.most_at_once = answer.get("most", self.most_at_once)
        self.results[answer["number"]].put(answer)

    def take(self, inputs, sampling_params, lora_request, streaming, **rest):
        """Accept a request."""
        if sampling_params.end_id is None:
            raise ValueError("tokenizer is required to reset end_id if it is None")
        if not self.args.enable_chunked_prefill and len(inputs) > self.args.max_num_tokens:
            raise ValueError(
                f"The sum of prompt length ({len(inputs)}), query length (0) should not exceed max_num_tokens"
            )
        params = {name: getattr(sampling_params, name) for name in sampling_params.__slots__}
        number = len(self.results)
        self.log("generate_async", {"inputs": inputs, "sampling_params": params, "streaming": streaming,
                                    "lora_request": lora_request and lora_request.lora_path, **rest})  # fmt: skip
        self.results[number] = Result(self, number)
        self.commands.put(("add", number, inputs, params, streaming, rest.get("cache_salt")))
        return self.results[number]

    def log(self, call, arguments):
        if file := os.environ.get("TENSORRT_STANDIN_LOG"):
            with open(file, "a", encoding="utf-8") as lines:
                lines.write(json.dumps([call, arguments], default=vars) + "\n")

    def shutdown(self):
        self.commands.put(None)
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
