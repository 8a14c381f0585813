"""The backend for servers that speak OpenAI's protocol, whether lem starts the server or it is already running.

By default, prompts are sent to the completions endpoint as token ids, so that the tokenizer, end tokens and seeds are
the same for every backend. The client measures the times from sending a request to the arrival of its tokens. A server
does not report when it began working on a request, when prefill ended, or how much GPU memory it uses, so these values
are None.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lem.backends.base import Backend, Begun, Encoded, Generation, needed
from lem.backends.checkpoint import encode
from lem.backends.engine import counter_warnings, prompt_settings, weights_warnings
from lem.backends.openai_options import Address, address_of, gpus_for, may_use_gpu, objections, runs_here, wants_gpu
from lem.backends.server import free_port
from lem.errors import ConfigError, RunError
from lem.machine.gpu import Gpu, computing, installed
from lem.machine.host import Host, cpu_model
from lem.machine.processes import listening_at, peak_memory_bytes
from lem.record import CodedWarning, EngineInfo, Memory, ModelInfo
from lem.spec.engines import OpenaiBackend
from lem.spec.experiment import Experiment
from lem.warning_codes import warning
from lem.workload.flops import Architecture
from lem.workload.traffic import Arrivals

if TYPE_CHECKING:
    from lem.backends.openai_session import Loaded, OpenaiSession


class Openai(Backend):
    """The backend for OpenAI-compatible servers; the module docstring describes it."""

    reports = frozenset(["tokens", "flops", "counters"])

    def __init__(self, experiment: Experiment) -> None:
        assert isinstance(experiment.backend, OpenaiBackend)
        self._experiment = experiment
        self._options = experiment.backend
        self._gpus: Sequence[Gpu] = ()
        # The reason why the metered GPUs may not be exactly those on which the server runs; None if there is none.
        self._doubt: str | None = None
        self._address: Address | None = None
        self._ending = ExitStack()
        self._loaded: Loaded | None = None
        self._session: OpenaiSession | None = None
        # At the last `forget`: the server's counters, and whether the server emptied its prefix cache.
        self._totals_before: Mapping[str, float] = {}
        self._is_reset: bool | None = None
        # The counters since `forget`, as last read, and the server's peak memory when its processes were last seen.
        self._counters: dict[str, float] | None = None
        self._peak: Memory | None = None

    # -------------------------------------------------------------- before the run
    objections = staticmethod(objections)

    @classmethod
    def wants_gpu(cls, experiment: Experiment, host: Host) -> bool:
        """Return whether the server is assumed to use this machine's GPUs."""
        assert isinstance(experiment.backend, OpenaiBackend)
        return wants_gpu(experiment.backend, host)

    def gpus_in_use(self, host: Host) -> Sequence[Gpu]:
        """Return the GPUs that the user has named or, by default, those on which the server runs or may run."""
        self._gpus = gpus_for(self._experiment, host)
        if self._options.command is None and may_use_gpu(self._options):
            self._gpus, self._doubt = self._of_the_server(self._gpus)
        return self._gpus

    def _of_the_server(self, visible: Sequence[Gpu]) -> tuple[Sequence[Gpu], str | None]:
        """Return the GPUs to meter for a running server, and a warning if the server may use different GPUs.

        If the user has named GPUs, exactly those are metered. Otherwise, lem meters the GPUs on which the driver lists
        processes of the server, even if CUDA_VISIBLE_DEVICES hides these GPUs from lem. If the driver lists no process
        of the server, lem meters all visible GPUs.
        """
        pids = {process.pid for process in self._processes()}
        hidden = [gpu for gpu in installed() if gpu.uuid not in {each.uuid for each in visible}]
        listed = {gpu: computing(gpu) for gpu in (*visible, *hidden)}
        found = [gpu for gpu in visible if pids & (listed[gpu] or frozenset())]
        beside = [gpu for gpu in hidden if pids & (listed[gpu] or frozenset())]
        is_chosen = self._experiment.gpus is not None
        if not is_chosen and (found or beside):
            return [*found, *beside], None
        kind = "named" if is_chosen else "visible"
        of_all = f"all {len(visible)} {kind} GPUs are metered, including idle ones"
        of_all = of_all if len(visible) > 1 else f"the only {kind} GPU is metered, even if it is idle"
        if found or beside:
            indices = sorted(gpu.index for gpu in (*found, *beside))
            where = f"GPU{'s' * (len(indices) > 1)} {', '.join(map(str, indices))}"
            if beside:
                return visible, f"the server computes on {where}, but only the named GPUs are metered."
            is_exact = len(found) == len(visible)
            return visible, None if is_exact else f"the server computes only on {where}, but {of_all}."
        if not visible and (not hidden or (pids and None not in listed.values())):
            return visible, None  # there is no GPU, or the server computes on the CPU
        why = "the driver lists none of the server's processes" if pids else "its processes cannot be seen"
        why = "the driver does not list processes" if None in listed.values() else why
        of_all = of_all if visible else "no GPU is metered, because none is visible"
        return visible, f"it is unknown which GPUs the server runs on: {why}; {of_all}."

    def tolerated_failures(self, requests: int) -> int:
        """Return how many requests may fail; a `backend.max_errors` below 1 is a share of all requests."""
        most = self._options.max_errors
        return int(most * requests if most < 1 else most)

    def runs_elsewhere(self) -> bool:
        """Return whether the server runs on another machine."""
        return not runs_here(self._options)

    # -------------------------------------------------------------- loading
    def start(self) -> None:
        """Import the HTTP client, and determine the server's address."""
        from lem.backends import openai_session  # noqa: F401

        try:
            self._address = address_of(self._options)
        except ConfigError as error:
            raise RunError(f"backend.url: {error}") from None
        if self._address.port is None:
            self._address = replace(self._address, port=free_port())

    def load(self) -> None:
        """Load the tokenizer, start the server if requested, and send a test request."""
        from lem.backends import openai_session

        address, log_folder = needed(self._address), self.log_folder or Path.cwd()
        self._loaded = openai_session.load(self._experiment, address, self._gpus, log_folder, self._ending)

    def close(self) -> None:
        """Close the connections, and stop the server if lem started it."""
        self._ending.close()

    # -------------------------------------------------------------- running
    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokenize each text separately, with the model's own special tokens."""
        loaded = needed(self._loaded)
        prompts = encode(loaded.checkpoint.tokenizer, texts, self._experiment, loaded.positions)
        if self._options.prompts == "text":
            for prompt in prompts:
                loaded.text_of(prompt)  # computed and cached now, not in the window
        return prompts

    def forget(self) -> None:
        """Have the server empty its prefix cache, if it can, and reset the counters."""
        loaded = needed(self._loaded)
        self._is_reset, self._totals_before = loaded.reset_prefix_cache(), loaded.totals()
        self._session = self._counters = None

    def generate(self, prompts: Sequence[Encoded]) -> Iterator[Sequence[Generation]]:
        """Send one batch after another or, with continuous batching, keep `batch_size` requests in flight."""
        yield from self._begun().generate(prompts)

    def serve(self, arrivals: Arrivals[Encoded], at_most: int) -> Iterator[Sequence[Generation]]:
        """Send each prompt as soon as it arrives, without waiting for answers, because the server queues requests."""
        yield from self._begun().serve(arrivals)

    def under_way(self) -> Sequence[Begun]:
        """Return the requests that have been sent to the server but not yet answered."""
        return () if self._session is None else self._session.under_way()

    def _begun(self) -> OpenaiSession:
        from lem.backends.openai_session import OpenaiSession

        self._session = self._session or OpenaiSession(self._experiment, needed(self._loaded))
        self._counters = None
        return self._session

    # -------------------------------------------------------------- reporting
    def counters(self) -> dict[str, float] | None:
        """Return the server's own counters since `forget`; None if it has none that lem recognizes."""
        session = self._session
        if session is not None and self._counters is None and not session.is_broken:
            now = needed(self._loaded).totals()
            self._counters = {name: total - self._totals_before.get(name, 0.0) for name, total in now.items()} or None
        return self._counters

    def server_pids(self) -> Sequence[int]:
        """Return the ids of the server's processes on this machine; none if lem started the server."""
        is_own = self._loaded is not None and self._loaded.server is not None
        return [] if is_own else [process.pid for process in self._processes()]

    def _processes(self) -> list[Any]:
        if self._loaded is not None and self._loaded.server is not None:
            return self._loaded.server.processes()
        port = None if self._address is None else self._address.port
        return [] if self.runs_elsewhere() or port is None else listening_at(port)

    def peak_memory(self) -> Memory:
        """Return the peak main memory of the server's processes; None if the server uses GPUs or runs elsewhere."""
        processes = self._processes()
        if self._gpus:
            return Memory(None, "a server does not report its GPU memory")
        if processes or self._peak is None:
            several = "1 process" if len(processes) == 1 else f"{len(processes)} processes"
            here = f"server's {several}, since start"
            scope = "unknown: the server runs elsewhere" if self.runs_elsewhere() else here
            self._peak = Memory(peak_memory_bytes(process.pid for process in processes), scope)
        return self._peak

    def model_info(self) -> ModelInfo | None:
        """Describe the model as its files describe it, because the server does not report how it loaded them."""
        model, hollow = needed(self._loaded).checkpoint.model, needed(self._loaded).checkpoint.hollow
        is_passed_on = "{dtype}" in (self._options.command or "") and self._experiment.fp_precision != "auto"
        return ModelInfo(
            name=model.name,
            revision=model.revision,
            architecture=", ".join(model.config.get("architectures") or ["unknown"]),
            parameters=None if hollow is None else hollow.num_parameters(),
            random_weights=model.random_weights,
            weights_bytes=None,
            dtype=self._experiment.fp_precision if is_passed_on else None,
            quantization=model.quantization_config.get("quant_method"),
        )

    def engine_info(self) -> EngineInfo:
        """Describe the server, as far as it reports its settings."""
        loaded = needed(self._loaded)
        here = ", ".join(f"cuda:{i}" for i in range(len(self._gpus))) if self._gpus else "cpu"
        name = self._gpus[0].computing_name if self._gpus else cpu_model()
        by_server = {"end_token_ids": "the server's own"} if self._options.dialect == "openai" else {}
        return EngineInfo(
            backend="openai",
            version=f"{loaded.told('owned_by') or 'server'} {loaded.version or 'of an unknown version'}",
            device="remote" if self.runs_elsewhere() else here,
            device_name="another machine" if self.runs_elsewhere() else name,
            settings={
                "address": loaded.address.base,
                "started_by_lem": "on" if self._options.command else "off",
                "dialect": self._options.dialect,
                "served_model": loaded.told("id") or "unknown",
                "served_model_root": loaded.told("root") or "unknown",
                "max_model_len": loaded.told("max_model_len") or "unknown",
                "output_tokens_counted_by": self._counted_by(loaded),
                "prompts_sent_as": self._options.prompts,
                "prefix_cache_reset": {True: "on", False: "off", None: "unknown"}[self._is_reset],
                **prompt_settings(self._experiment, loaded.checkpoint.end_tokens),
                **by_server,
                **({"extra_body": json.dumps(self._options.extra_body)} if self._options.extra_body else {}),
            },
        )

    def _counted_by(self, loaded: Loaded) -> str:
        if self._options.count == "tokenizer":
            return "the tokenizer"
        return "ids" if loaded.sends_ids else "the server's usage"

    def architecture(self) -> Architecture:
        """Return the sizes of the model, determined from its config in the same way as in the pytorch backend."""
        return needed(self._loaded).checkpoint.architecture()

    def warnings(self) -> list[CodedWarning]:
        """Warn about values that cannot be measured on a server, and about anomalies in the server's counters."""
        loaded, session, counters = needed(self._loaded), self._session, self.counters() or {}
        model = loaded.checkpoint.model
        found = []
        if self.runs_elsewhere():
            text = f"the server at {loaded.address.base} runs on another machine, so its energy cannot be metered here."
            found.append(warning("server_elsewhere", text))
        if self._doubt is not None:
            found.append(warning("server_gpus_unknown", self._doubt))
        found += weights_warnings(model.name, model.random_weights)
        if session is not None and not self._is_reset and counters.get("prefix_cache_hit_tokens") != 0:
            text = "lem could not make the server drop the prefixes that it cached in the warm-up or for other clients."
            found.append(warning("prefix_cache_kept", text))
        found += [] if session is None else self._about(session)
        others = 0 if session is None else counters.get("generation_tokens", 0) - session.output_tokens
        # This comparison is impossible after a failed request, because the number of its tokens is unknown.
        if session is not None and others > 0 and not session.is_broken and not session.failed:
            found.append(
                warning("server_shared", f"in the window, the server generated {others:.0f} tokens for other clients.")
            )
        return [*found, *counter_warnings(counters)]

    def _about(self, session: OpenaiSession) -> Iterator[CodedWarning]:
        """Warn about peculiarities of the server's answers to the window's requests."""
        if self._options.count == "tokenizer" and session.output_tokens:
            text = "lem counted the output tokens by tokenizing the text again (backend.count=tokenizer)."
            yield warning("tokens_by_tokenizer", text)
        if session.retries:
            text = f"the server was busy and asked lem to send requests again (retries: {session.retries})."
            yield warning("requests_retried", text)
        if session.ignores_stream:
            text = "the server answered in one piece although it was asked to stream, so token times are null."
            yield warning("stream_ignored", text)
        if not session.tokens_are_timed:
            how = "lem spread the tokens evenly from the first event to the last."
            text = f"the number of tokens in each event is unknown; {how}"
            yield warning("tokens_not_timed", text)
