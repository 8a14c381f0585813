"""The catalog of warnings, with meanings and remedies, and the checks that derive warnings from records and rows.

The catalog is the single source of the codes: a warning with any other code cannot be created, and
`docs/reference/warnings.md` is generated from it. This module knows records and rows, but not how they were measured.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from operator import attrgetter
from typing import Any

from lem.record import (
    ENERGY_OWNER,
    CodedWarning,
    DeviceState,
    DeviceWindow,
    EnergyReading,
    ProcessRecord,
    RequestRecord,
)

SHORT_WINDOW_S = 5.0
FEW_TICKS = 50
TRACE_TOLERANCE = 0.05
TRACE_LEAST_S = 2.0
TEMPERATURE_DRIFT_C = 10
BUSY_SHARE = 0.10
HIGH_CV = 0.2
CV_LEAST_BATCHES = 5
IDENTITY_TOLERANCE = 0.01
# A busy machine may delay a process at the barrier where its window opens.
TIMES_TOLERANCE_S = 0.05
# Without traffic, a request should always be running; idle time that exceeds both limits is suspicious.
UNFILLED_SHARE = 0.1
UNFILLED_LEAST_S = 0.2
# Because of sensor error, a GPU's average power may appear to exceed its limit by up to this share.
POWER_TOLERANCE = 0.05
POWER_LEAST_S = 2.0
LEAST_CYCLES = 2
# The percentiles of latencies that rows report.
PERCENTILES = (50, 95, 99)
# A sample is large enough for a percentile if its largest value reaches the true percentile with this probability or
# more.
PERCENTILE_CERTAINTY = 0.95
# Even in a good run, the counter and the power trace differ by up to this share, so smaller differences are ignored.
IDLE_TOLERANCE = 0.01
# A counter's energy is uncertain by up to one tick at each edge of a window.
EDGE_TICKS = 2
# Throttling for less than this share of the window is ignored.
THROTTLED_LEAST = 0.01
# Throttle reasons, mapped to the driver policies that have time counters for them.
COUNTED_AS = {
    "sw_power_cap": "power",
    "sw_thermal_slowdown": "thermal",
    "hw_thermal_slowdown": "thermal",
}
# Limits set by the user or the operator are not throttling.
NOT_THROTTLING = frozenset({"applications_clocks_setting", "sync_boost"})


@dataclass(frozen=True)
class WarningKind:
    """The meaning and the remedy of one kind of warning."""

    meaning: str
    remedy: str


WARNINGS: dict[str, WarningKind] = {
    "short_window": WarningKind(
        f"The measured window was shorter than {SHORT_WINDOW_S:g} s, so one-time costs and the sensor's limited "
        "resolution may have a large effect on the numbers.",
        "Run more prompts, or generate longer outputs; 30 s or more is better.",
    ),
    "short_steady_state": WarningKind(
        f"The window was long enough, but all slots of the batch were taken for less than {SHORT_WINDOW_S:g} s of it. "
        "The steady state's energy is therefore based on few readings, each of which may be up to one tick old.",
        "Run more prompts, so that all slots are taken for most of the window.",
    ),
    "few_ticks": WarningKind(
        f"The energy counter advanced fewer than {FEW_TICKS} times in the window.",
        "Run more prompts, or generate longer outputs, so that the error at the window's edges becomes negligible.",
    ),
    "counter_trace_mismatch": WarningKind(
        f"The energy counter and the integral of the power trace differ by more than {TRACE_TOLERANCE:.0%} plus an "
        "allowance for the window's edges. The allowance is the maximum age of a power sample divided by the window's "
        "length; the maximum age is 0.2 s (1.2 s if the driver averages power) plus one sampling period.",
        "Check whether the trace shows a changing load, and repeat the run. On a module (GH200), the counter and the "
        "trace may cover different components.",
    ),
    "throttled": WarningKind(
        f"The driver held a GPU's clocks down for at least {THROTTLED_LEAST:.0%} of the measured window, according to "
        "its own counters or to samples taken during the window. Without such data, the warning means that the clocks "
        "were held down just before or just after the window.",
        "Cool the machine, raise the power limit, or lock the clocks at a lower frequency.",
    ),
    "foreign_process": WarningKind(
        "Another process used a GPU of this run, so the energy may include that process's work.",
        "Wait for that process to end, or use another GPU.",
    ),
    "temperature_drift": WarningKind(
        f"A GPU's temperature changed by more than {TEMPERATURE_DRIFT_C} °C over the run, and its leakage power "
        "changed with the temperature.",
        "Warm up longer (warmup.until_cv), or cool down first (cooldown.to_c).",
    ),
    "busy_host": WarningKind(
        f"Other processes kept more than {BUSY_SHARE:.0%} of the machine's CPU threads busy during the window.",
        "Measure on an idle machine: other processes slow the run down, and whole-machine energy includes their work.",
    ),
    "high_variation": WarningKind(
        f"The time per output token varied between batches by more than {HIGH_CV:.0%} (coefficient of variation). "
        "Prefill time is excluded if known.",
        "Warm up longer, look for other load on the machine, and repeat the run.",
    ),
    "warmup_not_steady": WarningKind(
        "The warm-up reached its limit before latencies were steady, or before the requested number of prompts had "
        "run.",
        "Raise warmup.max_prompts or warmup.max_s, or accept a larger warmup.until_cv.",
    ),
    "compiled_in_window": WarningKind(
        "Code was compiled inside the measured window, so the window includes the time and energy of compiling.",
        "Warm up on more prompts (warmup.prompts), so that the code for every prompt length is compiled before the "
        "window opens, or turn compilation off.",
    ),
    "not_cooled_down": WarningKind(
        "A GPU was still warmer than cooldown.to_c when the run started.",
        "Raise cooldown.max_s or cooldown.to_c.",
    ),
    "few_cycles": WarningKind(
        f"Fewer than {LEAST_CYCLES} cycles finished, and a single measurement has no confidence interval.",
        "Measure several cycles (--cycles). A confidence interval needs at least two cycles; five or more make it "
        "usefully narrow.",
    ),
    "few_samples": WarningKind(
        "A percentile rests on too few values. The probability that all of n independent values lie below the true "
        "percentile p is pⁿ. If pⁿ exceeds 5%, even the largest value is not an upper bound for the percentile at "
        "95% confidence (Wilks 1941). The number of values needed is about 3/(1 - p): 5 for the median, 59 for p95, "
        "and 299 for p99.",
        "Run more prompts, or report a lower percentile or the mean.",
    ),
    "window_cut": WarningKind(
        "The run was interrupted inside the measured window. If one process runs all prompts, the window ends at its "
        "last finished request, and the message states how long the run continued after that request, unless the "
        "process was killed. If several processes share the prompts, all their windows end at the same time.",
        "No action is needed if the lost time is short compared with the window; otherwise measure again (--fresh).",
    ),
    "resumed": WarningKind(
        "The run was interrupted and resumed. Its windows were measured at different times, each after a warm-up.",
        "If small differences matter, compare with an uninterrupted run.",
    ),
    "machine_changed": WarningKind(
        "Parts of a resumed run were measured on different machines, on different devices or with different versions "
        "of the engine, and its numbers combine these parts. MFU and idle-adjusted energy are null if the device "
        "changed.",
        "Measure again on one machine (--fresh).",
    ),
    "work_repeated": WarningKind(
        "Requests were in flight when a window was interrupted, and were run again later. The row also includes the "
        "time and energy spent on them before the interruption. The message gives an upper bound for this time, also "
        "as a share of the window (`repeated_share`). If the share exceeds 2%, rates and energies per token and per "
        "request are null.",
        "If the numbers matter, measure again (--fresh).",
    ),
    "queue_lost": WarningKind(
        "The requests of a resumed cycle did not queue as they would have without the interruption, so latency, time "
        "to first token, queueing time, idle share and goodput are null.",
        "Measure again (--fresh).",
    ),
    "ranks_apart": WarningKind(
        "The measured windows of processes that should have run together do not overlap, so the processes did not run "
        "in parallel.",
        "Measure again (--fresh). If this happens again, look at the logs of the processes.",
    ),
    "mixed_backends": WarningKind(
        "The processes ran on different backends (--allow-mixed-backends), so the row combines different engines.",
        "Do not compare this row with others; use one backend for all processes.",
    ),
    "shared_hardware": WarningKind(
        "Other experiments ran on this machine at the same time. Simultaneous experiments slow each other down, and "
        "energy that is not read per GPU includes the energy of the other experiments.",
        "For numbers that matter, run the experiments one after another (without --parallel).",
    ),
    "energy_estimated": WarningKind(
        "The energy of some components is an estimate, not a measurement.",
        "Measure on a machine with an NVIDIA GPU or readable RAPL counters. Do not compare estimates between machines.",
    ),
    "energy_simulated": WarningKind(
        "The energy was not measured: it is a constant power (energy.power_w) times the simulated backend's time.",
        "Use a real backend and a real meter for real numbers.",
    ),
    "energy_missing": WarningKind(
        "Some energy values are null; the message gives the reason.", "Fix the cause given in the message."
    ),
    "energy_without_gpu": WarningKind(
        "A GPU ran the model, but the meter did not read that GPU. The energy covers only the components named in the "
        "message.",
        "Use energy=nvml or energy=auto; both read the GPUs in use.",
    ),
    "energy_partial": WarningKind(
        "Energy was read for only part of the measured window, for example because the meter changed between two "
        "attempts or a process was killed. The row's energy is null and left out of sums and means; the record "
        "holds the partial reading.",
        "Measure again (--fresh) with one meter for the whole window.",
    ),
    "energy_mixed": WarningKind(
        "The energies of the cycles are of different kinds: some are measured and some estimated, or their components "
        "or scopes differ. Their mean is null; the cycles table holds the individual values.",
        "Measure all cycles with the same meter (--fresh).",
    ),
    "energy_shared": WarningKind(
        "A MIG instance has no energy counter, so the energy covers the whole GPU.",
        "Leave the other instances idle, or turn MIG off.",
    ),
    "energy_integrated": WarningKind(
        "A GPU has no energy counter, so its energy is integrated from sampled power. The samples lag behind the "
        "actual power by up to the delay given in the message. The error of the energy is at most this delay times the "
        "difference between the power just before the window and the power at its end.",
        "Use windows many times as long as the delay, and expect more uncertainty under rapidly changing load.",
    ),
    "idle_adjusted_negative": WarningKind(
        "The window's energy is lower than idle power times the window's length. The difference exceeds both "
        f"{IDLE_TOLERANCE:.0%} of the energy and the uncertainty at the window's edges (idle power times {EDGE_TICKS} "
        "counter ticks).",
        "Something else was probably running while idle power was measured; repeat on a quiet machine.",
    ),
    "decode_negative": WarningKind(
        "Decode energy (the window's energy minus the prefill energy) is negative.",
        "Run more prompts, or generate longer outputs: the window is too short for the power trace.",
    ),
    "identity_violated": WarningKind(
        "Numbers that must agree do not. For example, J = W·t is violated, or a token count differs from the sum over "
        "requests.",
        "This is a bug in lem, or the files are damaged; please report it with the raw record.",
    ),
    "times_disagree": WarningKind(
        "A request began before the measured window opened, or ended after the window closed. The window's length is "
        "wrong by the amount given in the message, so every rate computed from the length is wrong as well.",
        "Look at the processes' logs and at the machine's load, and measure again (--fresh).",
    ),
    "window_unfilled": WarningKind(
        f"For more than {UNFILLED_SHARE:.0%} of the window, no request was running. Without traffic, a request should "
        "always be running, so part of the window's time and energy was not spent on requests.",
        "Check whether the machine was suspended or overloaded or has a slow disk. Generate longer outputs, or use "
        "larger batches.",
    ),
    "power_implausible": WarningKind(
        f"A GPU's average power over the window exceeds its power limit by more than {POWER_TOLERANCE:.0%}, which "
        "sensor error cannot explain. Either the energy or the window's length is wrong.",
        "Compare the energy with the power trace. If this happens again, report it with the raw record.",
    ),
    "tokens_disagree": WarningKind(
        "The token counts in the request rows disagree with the engine's counters or with the number of token times.",
        "Report this with the raw record, and disregard all per-token numbers of this run.",
    ),
    "random_weights": WarningKind(
        "Some or all of the model's weights are random, so the generated text is meaningless.",
        "No action is needed if random weights are intended.",
    ),
    "unused_weights": WarningKind(
        "The model's files contain weights that were not used. They may belong to another model, or config.json may "
        "specify too few layers.",
        "Make sure that config.json and the weights belong together.",
    ),
    "not_finite": WarningKind(
        "Some logits are infinite or NaN, for example because weights are NaN, so the generated tokens are "
        "meaningless.",
        "Check the checkpoint; if the run used float16, try bfloat16 or float32.",
    ),
    "padding_changed_tokens": WarningKind(
        "Prompts of different lengths ran in one batch, but the model does not mask padding. The shorter prompts may "
        "have produced different tokens than they would have alone.",
        "Use batching.batch_size=1.",
    ),
    "simulated": WarningKind("No model ran: the backend is simulated.", "Use another backend for real numbers."),
    "gpu_unused": WarningKind(
        "A GPU is visible, but the engine was built without CUDA and ran on the CPU.",
        "Install the engine's CUDA build, or set backend.device=cpu.",
    ),
    "input_truncated": WarningKind(
        "Prompts were truncated to max_input_tokens.", "Raise max_input_tokens if the model's context is long enough."
    ),
    "flops_unknown": WarningKind(
        "The model's dimensions cannot be determined from its config and its code in transformers, so FLOPs and MFU "
        "are null. Typical causes are layers that keep a recurrent state, layers that attend only to selected "
        "positions, and code whose control flow depends on the values of tensors.",
        "Compare tokens and joules instead.",
    ),
    "prefix_cached": WarningKind(
        "In the window, the engine reused cached prefixes of earlier prompts instead of computing the prefixes again. "
        "FLOPs and tokens still include the reused prefixes.",
        "No action is needed if prefix caching is part of your study; otherwise turn it off with "
        "backend.enable_prefix_caching=false (vllm), backend.kv_cache.enable_block_reuse=false (tensorrt) or the "
        "server's own option (openai).",
    ),
    "preempted": WarningKind(
        "The engine's cache was too small for all running requests, so some requests were preempted and computed "
        "again.",
        "Lower batching.batch_size, or give the cache more memory.",
    ),
    "server_elsewhere": WarningKind(
        "The server that ran the model is on another machine. Energy is null, because no meter on this machine covers "
        "the server, and the record describes the client's machine.",
        "Measure on the machine where the server runs.",
    ),
    "server_shared": WarningKind(
        "The server generated more tokens in the window than this run's requests account for, so other clients were "
        "using it.",
        "Use a server without other clients (backend.command starts one).",
    ),
    "server_gpus_unknown": WarningKind(
        "The server was already running, and the metered GPUs may differ from those that it uses. If they do, the "
        "energy includes GPUs that the server does not use, or omits GPUs that it uses.",
        "Name the server's GPUs (gpus=[…]), run lem as the same user as the server and outside any container, or have "
        "lem start the server.",
    ),
    "requests_failed": WarningKind(
        "Some requests failed. The window's time and energy include them, but tokens, latencies and rates cover only "
        "the requests that succeeded. Goodput counts failed requests as not good.",
        "See the reasons in the column `error` of the requests table; lower the load, or repeat the run.",
    ),
    "requests_retried": WarningKind(
        "The server refused requests because it was busy, and said how long to wait (Retry-After); lem waited and sent "
        "them again. The latency of these requests includes the wait.",
        "Lower the number of requests in flight, unless the server's refusals are part of your study.",
    ),
    "stream_ignored": WarningKind(
        "Streaming was requested, but the server sent its response in one piece, so token times are null.",
        "Use a server that streams, or leave --streaming out.",
    ),
    "tokens_by_tokenizer": WarningKind(
        "With backend.count=tokenizer, lem counted output tokens by tokenizing the text again, and added one for the "
        "end token if the output ended with it. The count is wrong if the model split the text into different tokens, "
        "or if the server dropped part of the text.",
        "Use a server that reports token ids or usage, or expect a few percent more uncertainty in rates per token.",
    ),
    "prefix_cache_kept": WarningKind(
        "lem could not make the server drop its cached prefixes, so prompts may have benefited from prefixes cached "
        "during the warm-up, during an earlier cycle, or for other clients.",
        "Turn the server's prefix cache off, or start vLLM with VLLM_SERVER_DEV_MODE=1 and bind it to a local address.",
    ),
    "tokens_not_timed": WarningKind(
        "The server does not report how many tokens each event carries. The time to first token is measured, but the "
        "gaps between a request's tokens are all set to their mean.",
        "Use a server that reports token ids or usage with each event (backend.dialect=vllm), or disregard percentiles "
        "of inter-token latency.",
    ),
    "compare_board": WarningKind(
        "The two sides of a comparison ran on different machines or devices, whose sensors may differ by several "
        "percent.",
        "Measure both sides on one machine and one GPU.",
    ),
    "compare_driver": WarningKind(
        "The two sides used different GPU drivers, so the clocks and the sensors may have behaved differently.",
        "Measure both sides with one driver or, if you are comparing drivers, accept the difference (--allow driver).",
    ),
    "compare_engine": WarningKind(
        "The two sides ran on different engines, or on different versions of an engine.",
        "Use one engine and version or, if you are comparing engines, accept the difference (--allow engine).",
    ),
    "compare_prompts": WarningKind(
        "The two sides did not run the same prompts.", "Set the same dataset, sample size and seed for both."
    ),
    "compare_lengths": WarningKind(
        "The mean number of output tokens of a request differs between the two sides by more than 1%.",
        "Compare the energy per request as well, or fix the output length (min_output_tokens = max_output_tokens).",
    ),
    "compare_window": WarningKind(
        "The measured windows of the two sides are of different kinds: only one side's requests arrive over time, or "
        "only one side has windows that were interrupted.",
        "Measure both sides with the same traffic, without an interruption.",
    ),
    "compare_throttled": WarningKind(
        "On one side of a comparison only, the driver held a GPU's clocks down.",
        "Cool the machine or lock the clocks, and measure that side again.",
    ),
    "compare_shared": WarningKind(
        "On one side of a comparison only, other work used the GPU, the machine or the server.",
        "Measure that side again on a machine without other work.",
    ),
    "compare_meter": WarningKind(
        "The energies of the two sides differ in source, scope or components.", "Set one meter for both (energy=…)."
    ),
    "compare_estimate": WarningKind(
        "The energy of one side is estimated or simulated, while the energy of the other side is measured.",
        "Measure both sides with a sensor.",
    ),
    "compare_estimated": WarningKind(
        "The energies of both sides are estimated or simulated, so their ratio is not a measurement.",
        "Measure on a machine with a GPU energy counter or readable RAPL counters.",
    ),
    "compare_within_run": WarningKind(
        "Each side of a comparison is a single experiment, whose cycles share one process and one loaded model. An "
        "interval that is computed from these cycles is too narrow for a claim about other runs.",
        "Repeat both sides (--fresh) and compare results directories, or measure a campaign.",
    ),
    "compare_warned": WarningKind(
        "Some of the compared experiments have warnings.", "Read the warnings of these experiments (lem results show)."
    ),
    "campaign_fixed_order": WarningKind(
        "The arms of a campaign were measured in the same order in each cycle (interleaved) or one after another "
        "(grouped). Machine drift can then look like a difference between arms, and confidence intervals contain the "
        "true value less often than stated.",
        "Use --structure shuffled or latin.",
    ),
    "campaign_unbalanced": WarningKind(
        "A latin campaign does not consist of complete Latin squares, so positions and predecessors are not balanced "
        "across the arms.",
        "Use one of the numbers of cycles that the message suggests.",
    ),
    "campaign_cells_missing": WarningKind(
        "Some cells of a campaign have no result: they failed, were interrupted, or have not run.",
        "Run the same command again to measure the missing cells.",
    ),
    "campaign_limit_reached": WarningKind(
        "An adaptive campaign (--until-ci) reached its maximum number of cycles before its intervals were narrow "
        "enough. The intervals are valid nevertheless.",
        "Reduce the noise (longer runs, a warm-up, pauses), or start another campaign with a larger --max-cycles or a "
        "wider --until-ci.",
    ),
    "campaign_boards_differ": WarningKind(
        "The cells of a campaign ran on different machines or devices, whose sensors may differ by several percent.",
        "Measure all cells on the same machine and GPU (gpus). On a Slurm cluster, set hydra.launcher.gpu_type, "
        "constraint or nodelist, or compare across boards on purpose (--across-nodes).",
    ),
    "campaign_cycle_moved": WarningKind(
        "On a Slurm cluster, some cells did not run on the same node and board as the baseline's cell of their cycle, "
        "for example because the job was requeued. The ratios of these cells would compare nodes, not arms, so the "
        "pairs that contain them are left out.",
        "Measure more cycles, or keep jobs from being requeued (a longer hydra.launcher.timeout_min, another "
        "partition).",
    ),
    "campaign_nodes_interact": WarningKind(
        "The ratio of two arms differs between the nodes or boards of a cluster by more than the noise explains. The "
        "answer is a mean over the nodes or boards that happened to run the cycles.",
        "Read the ratios for each board, and run a separate campaign on each board that matters "
        "(hydra.launcher.gpu_type, constraint or nodelist).",
    ),
    "campaign_meters_differ": WarningKind(
        "The cells of a campaign differ in the source, scope or components of their energy, so their energy is not "
        "comparable.",
        "Set one meter for all arms (energy=…), and find out why a cell used a different meter.",
    ),
    "campaign_estimate": WarningKind(
        "The energy that a campaign compares is estimated or simulated, not measured.",
        "Measure on a machine with a GPU energy counter or readable RAPL counters.",
    ),
    "campaign_engines_differ": WarningKind(
        "Cells of a campaign ran on different engines, or on different versions of an engine.",
        "If you are comparing engines, make everything else the same: precision, batching, lengths. Otherwise, set the "
        "same backend for all arms, and use the same version throughout.",
    ),
    "campaign_prompts_differ": WarningKind(
        "The arms of a campaign did not run the same prompts.",
        "Set the same dataset, sample size and seed for all arms.",
    ),
    "campaign_lengths_differ": WarningKind(
        "The mean number of output tokens of a cell differs between the arms of a campaign by more than 1%.",
        "Compare the energy per request as well, or fix the output length (min_output_tokens = max_output_tokens).",
    ),
    "campaign_trend": WarningKind(
        "The metric changed over the course of the campaign, independently of the arm: the machine drifts.",
        "Warm up longer, wait between cells (--config-gap), or cool down before each cell (--cool-to).",
    ),
    "campaign_position": WarningKind(
        "The metric depends on a cell's position within its cycle.",
        "Use --structure latin, which balances positions over the arms, and wait between cells (--config-gap).",
    ),
    "campaign_carry_over": WarningKind(
        "The metric depends on which arm ran just before (first-order carry-over). The dependence is estimated "
        "together with the effects of cycle, arm and position. Without any carry-over, one campaign in twenty still "
        "gives this warning. No arm follows itself within a cycle, so part of the effect remains in the comparison "
        "even if the order is balanced.",
        "Wait between cells (--config-gap), warm up longer (--warmup-prompts), or cool down before each cell "
        "(--cool-to).",
    ),
    "campaign_cells_warn": WarningKind(
        "Some cells of the campaign have warnings.",
        "List the cells with lem results list --campaign NAME, and show a cell's warnings with lem results show ID.",
    ),
    "carbon_unknown": WarningKind(
        "CO2e is null because the carbon intensity during the measurement is unknown: the file set as "
        "energy.carbon_trace does not cover this time or could no longer be read, or the process was killed before it "
        "could compute the mean. An intensity is never extrapolated.",
        "Keep the file up to date while you measure; each run reads it anew.",
    ),
    "schedule_runs_missing": WarningKind(
        "Some runs of a schedule failed, were skipped or missed, or were interrupted. No mean includes these "
        "runs, except for the completed cells of campaigns. "
        "If all of them were planned for the same time of day, the other runs may not show how that time differs from "
        "other times of day.",
        "lem results show SCHEDULE lists the runs with the reasons. A run is skipped if the previous run is still "
        "going.",
    ),
    "schedule_environment_changed": WarningKind(
        "The machine or its software, such as the driver or the engine's version, changed during a schedule. A change "
        "between two days has the same effect as drift from day to day, but a change within a day looks like a "
        "difference between times of day.",
        "Start a new schedule after an update, and keep the machine as it is until the schedule ends.",
    ),
    "schedule_meters_differ": WarningKind(
        "The runs of a schedule differ in the scope or components of their energy, or in whether it was measured or "
        "estimated, so there is no verdict on the energy.",
        "Set one meter (energy=…), and find out why a run used a different meter.",
    ),
    "schedule_estimate": WarningKind(
        "The energy of a schedule's runs is estimated or simulated, not measured.",
        "Measure on a machine with a GPU energy counter or readable RAPL counters.",
    ),
    "schedule_work_differs": WarningKind(
        "The runs of a schedule did not do the same work: their prompts differ, or their numbers of output tokens "
        "differ by more than 1%.",
        "Use a dataset that does not change, greedy decoding, and a fixed number of output tokens.",
    ),
    "schedule_runs_warn": WarningKind(
        "Some experiments of the schedule have warnings.",
        "List them with lem results list --schedule NAME, and show the warnings of one with lem results show ID.",
    ),
    "fewer_prompts": WarningKind(
        "The dataset has fewer prompts than were requested.", "Lower --sample-size, or choose a larger dataset."
    ),
}


def warning(code: str, text: str) -> CodedWarning:
    """Return a warning, or raise KeyError if the code is not in the catalog."""
    WARNINGS[code]
    return CodedWarning(code, text)


# ------------------------------------------------------------------ of one process
def of_record(record: ProcessRecord, requests: Sequence[RequestRecord]) -> list[CodedWarning]:
    """Return the warnings about the measured window of one process."""
    window = record.phase("measured")
    if window is None:
        return []
    return [
        *_of_window(window.duration_s, window.energy),
        # Only one process meters energy; for the others, missing energy is normal.
        *(_of_energy(window.energy, window.duration_s) if record.rank == ENERGY_OWNER else ()),
        *_of_the_gpu(record),
        *_of_power(record),
        *_of_counters(record),
        *_of_devices(record),
        *_of_host([record]),
        *_of_latencies(requests),
        *_of_warmup(record),
    ]


def _of_window(duration_s: float, readings: Sequence[EnergyReading]) -> Iterator[CodedWarning]:
    if duration_s < SHORT_WINDOW_S:
        yield warning("short_window", f"the window is {duration_s:.3g} s long, less than {SHORT_WINDOW_S:g} s.")
    ticks = [duration_s / r.resolution_s for r in readings if r.source == "counter" and r.resolution_s]
    if ticks and min(ticks) < FEW_TICKS:
        count = round(min(ticks))
        text = f"the energy counter advanced about {count} time{'' if count == 1 else 's'}, fewer than {FEW_TICKS}."
        yield warning("few_ticks", text)
    for r in readings:
        if r.source != "counter" or not r.energy_j or r.trace_energy_j is None or duration_s < TRACE_LEAST_S:
            continue
        ratio = r.trace_energy_j / r.energy_j
        # The trace may show a power step at the window's edge up to `trace_reach_s` late.
        if abs(ratio - 1) > TRACE_TOLERANCE + (r.trace_reach_s or 0.0) / duration_s:
            yield warning(
                "counter_trace_mismatch", f"{r.device}: the power trace gives {ratio:.3f} times the counter's energy."
            )


def _of_energy(readings: Sequence[EnergyReading], duration_s: float) -> Iterator[CodedWarning]:
    if not readings:
        yield warning("energy_missing", "no meter was used.")
    if simulated := next((r for r in readings if r.source == "simulated"), None):
        yield warning("energy_simulated", f"no energy was measured ({simulated.method}).")
    estimates = [r for r in readings if r.source == "estimate"]
    if estimates:
        names = " and ".join(dict.fromkeys(r.component for r in estimates))
        methods = "; ".join(dict.fromkeys(r.method for r in estimates))
        yield warning("energy_estimated", f"the {names} energy is an estimate, not a measurement ({methods}).")
    if any(r.scope == "shared_device" for r in readings):
        yield warning("energy_shared", "a MIG instance has no counter, so the energy covers the whole GPU.")
    for r in readings:
        if r.energy_j is None:
            yield warning("energy_missing", f"{r.component}: {r.reason}.")
        elif r.source == "integral":
            late = ""
            if r.trace_reach_s and duration_s:
                share = min(r.trace_reach_s / duration_s, 1.0)
                late = (
                    f"; the power samples lag behind the actual power by up to {r.trace_reach_s:.3g} s, "
                    f"which is {share:.0%} of the window"
                )
            yield warning("energy_integrated", f"{r.device}: {r.method}{late}.")


def lacks_gpu(record: ProcessRecord) -> bool:
    """Return whether a GPU ran the model but the window has no energy reading for any GPU."""
    window = record.phase("measured")
    readings = window.energy if window else ()
    environment, engine = record.environment, record.engine
    uses_gpu = bool(environment and environment.devices_before) or bool(engine and engine.device.startswith("cuda"))
    return uses_gpu and bool(readings) and {"gpu", "module"}.isdisjoint([r.component for r in readings])


def _of_the_gpu(record: ProcessRecord) -> Iterator[CodedWarning]:
    if record.rank == ENERGY_OWNER and lacks_gpu(record):
        window = record.phase("measured")
        names = " and ".join(dict.fromkeys(r.component for r in (window.energy if window else ())))
        yield warning(
            "energy_without_gpu", f"the energy covers only {names}; the meter did not read the GPU that ran the model."
        )


def _of_power(record: ProcessRecord) -> Iterator[CodedWarning]:
    """Yield a warning for each GPU whose average power exceeds its limit by more than sensor error can explain."""
    window, environment = record.phase("measured"), record.environment
    if window is None or environment is None or window.duration_s < POWER_LEAST_S:
        return
    limits_w = {state.uuid: state.power_limit_w for state in environment.devices_before}
    for r in window.energy:
        limit_w, covered_s = limits_w.get(r.device), r.seconds_of(window.duration_s)
        if r.component != "gpu" or r.energy_j is None or not limit_w or not covered_s:
            continue
        power_w = r.energy_j / covered_s
        if power_w > limit_w * (1 + POWER_TOLERANCE):
            text = f"{r.device}: the average power of {power_w:.4g} W exceeds the limit of {limit_w:.4g} W."
            yield warning("power_implausible", text)


def _of_counters(record: ProcessRecord) -> Iterator[CodedWarning]:
    """Yield a warning if the engine's token counts differ from those of the request rows.

    Only the engine counts the tokens of interrupted requests, tokens that it computed again after a preemption, and the
    tokens of other clients. In these cases, a higher count by the engine is not a contradiction.
    """
    counters = record.counters or {}
    more_is_wrong = record.status == "completed" and not counters.get("preemptions") and record.backend != "openai"
    counted = {"prompt_tokens": ("input", record.input_tokens), "generation_tokens": ("output", record.output_tokens)}
    for name, (kind, tokens) in counted.items():
        engines = counters.get(name)
        if engines is None or not tokens:
            continue
        tolerance = IDENTITY_TOLERANCE * tokens
        if engines < tokens - tolerance or (more_is_wrong and engines > tokens + tolerance):
            yield warning(
                "tokens_disagree",
                f"the request rows have {tokens} {kind} tokens, but the engine counted {engines:.0f}.",
            )


def _of_devices(record: ProcessRecord) -> Iterator[CodedWarning]:
    here = record.environment
    before, after = (here.devices_before, here.devices_after) if here is not None else ((), ())
    # Rank 0 watches the GPUs of all processes throughout the window; the other ranks look only before and after it.
    yield from _of_throttling(record.devices_during, (*before, *after) if record.rank == ENERGY_OWNER else ())
    yield from _of_strangers((*before, *record.devices_during, *after))
    for first, last in zip(before, after, strict=False):
        if first.temperature_c is None or last.temperature_c is None:
            continue
        drift = last.temperature_c - first.temperature_c
        if abs(drift) > TEMPERATURE_DRIFT_C:
            text = f"{last.uuid}: {first.temperature_c} °C before the run, {last.temperature_c} °C after it."
            yield warning("temperature_drift", text)


def _of_throttling(during: Sequence[DeviceWindow], outside: Sequence[DeviceState]) -> Iterator[CodedWarning]:
    """Yield a warning for each GPU that was throttled.

    If a GPU was watched during the window, only the window counts. Otherwise, the GPU's states before and after the
    window count.
    """
    for window in during:
        if held := _held_down(window):
            yield warning("throttled", f"{window.uuid}: clocks held down by {', '.join(held)} of the window.")
    watched = {window.uuid for window in during if window.throttled_s is not None or window.reasons is not None}
    for state in outside:
        reasons = [reason for reason in state.throttle_reasons or () if reason not in NOT_THROTTLING]
        if reasons and state.uuid not in watched:
            text = f"{state.uuid}: clocks held down by {', '.join(reasons)} before or after the window."
            yield warning("throttled", text)


def _of_strangers(devices: Sequence[DeviceState | DeviceWindow]) -> Iterator[CodedWarning]:
    """Yield one warning for each process that was seen on a GPU but does not belong to this run."""
    names: dict[tuple[str, int], str | None] = {}
    for device in devices:
        for process in device.foreign_processes or ():
            names.setdefault((device.uuid, process.pid), process.name)
    for (uuid, pid), name in names.items():
        yield warning("foreign_process", f"{uuid}: used by process {pid} ({name or 'unnamed'}).")


def _held_down(window: DeviceWindow) -> list[str]:
    """Return the reasons why a GPU's clocks were held down, each with its share of the window."""
    counted_s = window.throttled_s
    shares = {} if counted_s is None else {name: min(s / window.duration_s, 1.0) for name, s in counted_s.items()}
    for reason, share in (window.reasons or {}).items():
        if reason not in NOT_THROTTLING and (counted_s is None or reason not in COUNTED_AS):
            shares[reason] = share
    return [f"{name} for {share:.0%}" for name, share in shares.items() if share >= THROTTLED_LEAST]


def _of_host(records: Sequence[ProcessRecord]) -> Iterator[CodedWarning]:
    """Yield a warning if other processes kept the machine busy; nothing if the CPU load of any rank is unknown."""
    loads = [record.cpu_load for record in records if record.cpu_load is not None]
    here = records[0].environment
    if not loads or len(loads) < records[0].world_size or here is None or not here.cpu_threads:
        return
    foreign = loads[0].machine_cores - sum(load.process_cores for load in loads)
    if foreign > BUSY_SHARE * here.cpu_threads:
        used = f"other processes used {foreign:.1f} of {here.cpu_threads} CPU threads during the window"
        yield warning("busy_host", f"{used}.")


def _of_latencies(requests: Sequence[RequestRecord]) -> Iterator[CodedWarning]:
    longest: dict[int, RequestRecord] = {}
    for request in requests:
        if request.error is not None:
            continue
        of_batch = longest.get(request.batch)
        if of_batch is None or (request.output_tokens or 0) > (of_batch.output_tokens or 0):
            longest[request.batch] = request
    per_token_s = _per_token_s(list(longest.values()))
    if len(per_token_s) < CV_LEAST_BATCHES or statistics.fmean(per_token_s) == 0:
        return
    cv = statistics.stdev(per_token_s) / statistics.fmean(per_token_s)
    if cv > HIGH_CV:
        yield warning("high_variation", f"the time per output token varied by {cv:.0%} between batches.")


def _per_token_s(requests: Sequence[RequestRecord]) -> list[float]:
    """Return the time per output token of each request.

    If at least `CV_LEAST_BATCHES` requests with two or more output tokens report their prefill time, only these
    requests are used, and their prefill time is excluded. Otherwise, all requests with output tokens are used, and
    prefill time is included.
    """
    decode_s = [
        (r.end_s - r.start_s - r.prefill_s) / (r.output_tokens - 1)
        for r in requests
        if r.prefill_s is not None and r.output_tokens and r.output_tokens > 1
    ]
    if len(decode_s) >= CV_LEAST_BATCHES:
        return decode_s
    return [(r.end_s - r.start_s) / r.output_tokens for r in requests if r.output_tokens]


def _of_warmup(record: ProcessRecord) -> Iterator[CodedWarning]:
    if record.warmup is not None and record.warmup.ended in ("max_prompts", "max_s"):
        cv = "" if record.warmup.cv is None else f", with a coefficient of variation of {record.warmup.cv:.3f}"
        prompts = f"{record.warmup.prompts} prompt{'' if record.warmup.prompts == 1 else 's'}"
        yield warning("warmup_not_steady", f"the warm-up reached warmup.{record.warmup.ended} after {prompts}{cv}.")


# ------------------------------------------------------------------ of a row
ByColumn = Mapping[str, Sequence[Any]]


def of_rows(rows: ByColumn, records: Sequence[Sequence[ProcessRecord]]) -> list[list[CodedWarning]]:
    """Return, for each row, the warnings about its derived numbers, such as violated identities.

    Args:
        rows: cycle rows, by column.
        records: the records that each row was computed from.
    """
    found = [list(_of_host(of_row)) if len(of_row) > 1 else [] for of_row in records]
    for about, of_row, share in zip(found, records, rows["repeated_share"], strict=True):
        about += [*_partial(of_row), *_of_repeated(of_row, share)]
    for place, violation in (*_identities(rows, records), *_negatives(rows), *_steady(rows)):
        found[place].append(violation)
    return found


def of_failures(requests: Sequence[RequestRecord]) -> Iterator[CodedWarning]:
    """If any requests of a cycle failed, yield a warning with the most frequent reason."""
    errors = [r.error for r in requests if r.error is not None]
    if errors:
        (reason, times), failed = Counter(errors).most_common(1)[0], len(errors)
        often = "" if failed == 1 else " (once)" if times == 1 else f" ({times} times)"
        yield warning("requests_failed", f"{failed} of {len(requests)} requests failed: {reason}{often}")


def _of_repeated(records: Sequence[ProcessRecord], share: float | None) -> Iterator[CodedWarning]:
    """Yield a warning about requests that were run again because they were in flight when a window was interrupted."""
    parts = [record.cut.under_way for record in records if record.cut is not None]
    requests = sum([part.requests for part in parts])
    if not requests:
        return
    tokens = [part.output_tokens for part in parts if part.requests]
    with_tokens = "" if None in tokens else f" with {sum(filter(None, tokens))} output tokens"
    longest_s = max(part.longest_s for part in parts)
    of_window = "" if share is None else f" ({share:.1%} of the window)"
    yield warning(
        "work_repeated",
        f"requests that were in flight at an interruption and ran again: {requests}{with_tokens}. Up to "
        f"{longest_s:.3g} s{of_window}, and the energy used in that time, were spent twice.",
    )


def of_experiment(cycles_completed: int, resumed: int, kinds: Sequence[str] = ()) -> Iterator[CodedWarning]:
    """Yield the warnings about an experiment as a whole; `kinds` lists the distinct kinds of energy in its cycles."""
    if len(kinds) > 1:
        text = f"the cycles differ in their kind of energy ({'; '.join(kinds)}), so the mean energy is null."
        yield warning("energy_mixed", text)
    if cycles_completed < LEAST_CYCLES:
        cycles = f"{cycles_completed} cycle{'' if cycles_completed == 1 else 's'}"
        yield warning("few_cycles", f"{cycles} finished; a confidence interval needs at least {LEAST_CYCLES}.")
    if resumed:
        yield warning("resumed", f"the run was interrupted and resumed {resumed} time{'s' if resumed > 1 else ''}.")


def of_places(places: Mapping[str, Sequence[str]]) -> Iterator[CodedWarning]:
    """Yield a warning if parts of a run were measured in different places.

    `places` maps `host`, `device` and `engine` to the hosts, devices and engine versions with which parts of the run
    were measured.
    """
    parts = [f"{what} {' and then '.join(found)}" for what, found in places.items() if len(found) > 1]
    if parts:
        yield warning(
            "machine_changed", f"parts of the run were measured under different conditions: {'; '.join(parts)}."
        )


def _steady(rows: ByColumn) -> Iterator[tuple[int, CodedWarning]]:
    """Yield a warning for each steady state that is too short, unless the whole window is too short."""
    for place, (steady_s, duration_s) in enumerate(zip(rows["steady_duration_s"], rows["duration_s"], strict=True)):
        if steady_s is not None and steady_s < SHORT_WINDOW_S <= (duration_s or 0.0):
            text = f"all slots were taken for {steady_s:.3g} s, less than {SHORT_WINDOW_S:g} s."
            yield place, warning("short_steady_state", text)


def _partial(records: Sequence[ProcessRecord]) -> Iterator[CodedWarning]:
    """Yield a warning for each kind of energy that was read for only part of the window."""
    window = records[0].phase("measured") if records and records[0].rank == ENERGY_OWNER else None
    if window is None:
        return
    parts = [r for r in window.energy if not window.is_covered_by(r)]
    for r in {(r.component, r.source): r for r in parts}.values():
        covered_s = r.seconds_of(window.duration_s)
        text = (
            f"the {r.component} energy ({r.source}) covers {covered_s:.3g} of {window.duration_s:.3g} s, so it is null."
        )
        yield warning("energy_partial", text)


@cache
def samples_needed(percent: float) -> int:
    """Return how many values are needed for the largest to reach the true percentile with 95% probability or more.

    S. S. Wilks, "Determination of sample sizes for setting tolerance limits", Ann. Math. Statist. 12 (1941).
    """
    return math.ceil(math.log(1 - PERCENTILE_CERTAINTY) / math.log(percent / 100))


def of_samples(counts: Mapping[str, int]) -> Sequence[CodedWarning]:
    """Return a warning if percentiles rest on too few values; `counts` maps each metric to its number of values."""
    return _of_samples(tuple(counts.items()))


# Cached, because many experiments have the same numbers of requests.
@lru_cache(1024)
def _of_samples(counts: Sequence[tuple[str, int]]) -> Sequence[CodedWarning]:
    of_count: dict[int, list[str]] = {}
    for name, count in counts:
        of_count.setdefault(count, []).append(name)
    parts = [
        f"{', '.join(stems)}: {count} value{'' if count == 1 else 's'}, but {lacking}"
        for count, stems in of_count.items()
        if (lacking := _percentiles_lacking(count))
    ]
    return [warning("few_samples", f"{'; '.join(parts)}.")] if parts else []


@cache
def _percentiles_lacking(count: int) -> str:
    """Return, as text, which percentiles need more than `count` values, and how many values each of them needs."""
    needed = {percent: samples_needed(percent) for percent in PERCENTILES}
    return ", ".join(f"p{percent} needs {least}" for percent, least in needed.items() if count < least)


def of_times(
    duration_s: float, first_s: float, last_s: float, busy_s: float, attempts: int, *, filled: bool
) -> Iterator[CodedWarning]:
    """Yield warnings if a window's length contradicts the times of its requests.

    Args:
        duration_s: the length of the window, or the sum of the attempts' windows.
        first_s: the earliest start of a request, counted from the opening of its window.
        last_s: the latest end of a request, counted from the opening of its window; with several attempts, the sum
            of their latest ends.
        busy_s: the time during which at least one request was running.
        attempts: the number of attempts.
        filled: whether at least one request should always have been running, because requests were always waiting.
    """
    tolerance_s = max(IDENTITY_TOLERANCE * duration_s, TIMES_TOLERANCE_S * attempts)
    if first_s < -tolerance_s:
        yield warning("times_disagree", f"a request began {-first_s:.3g} s before its window opened.")
    if last_s > duration_s + tolerance_s:
        text = f"requests ended {last_s - duration_s:.3g} s after their window, which was {duration_s:.3g} s long."
        yield warning("times_disagree", text)
    unfilled_s = duration_s - busy_s
    if filled and unfilled_s > max(UNFILLED_SHARE * duration_s, UNFILLED_LEAST_S):
        yield warning("window_unfilled", f"no request was running for {unfilled_s:.3g} of {duration_s:.3g} s.")


def of_timed_tokens(requests: Sequence[RequestRecord]) -> Iterator[CodedWarning]:
    """Yield a warning if the number of token times differs from the number of counted tokens."""
    wrong = [
        r for r in requests if r.ttft_s is not None and r.itl_s is not None and len(r.itl_s) + 1 != r.output_tokens
    ]
    if wrong:
        first = wrong[0]
        times = len(first.itl_s or ()) + 1
        text = f"request {first.request} has {first.output_tokens} output tokens but {times} token times"
        others = f"{len(wrong) - 1} other request{'s' if len(wrong) > 2 else ''}"
        more = f"; the numbers also differ in {others}" if len(wrong) > 1 else ""
        yield warning("tokens_disagree", f"{text}{more}.")


def _identities(rows: ByColumn, records: Sequence[Sequence[ProcessRecord]]) -> Iterator[tuple[int, CodedWarning]]:
    """Yield a warning for each identity that a row violates, with the row's index."""

    def totals(field: str) -> list[int]:
        of_record = attrgetter(field)
        return [sum(map(of_record, of_row)) for of_row in records]

    pairs = {
        "J = W·t": (rows["energy_j"], map(_product, rows["average_power_w"], rows["duration_s"])),
        "J/token = W/(tokens/s)": (
            rows["energy_per_output_token_j"],
            map(_quotient, rows["average_power_w"], rows["output_tokens_per_s"]),
        ),
        "J = Σ J/request": (rows["energy_j"], map(_product, rows["energy_per_request_j"], rows["requests_completed"])),
        "Wh = J/3600": (rows["energy_wh"], [None if value is None else value / 3600.0 for value in rows["energy_j"]]),
        "output tokens = Σ over requests": (totals("output_tokens"), rows["output_tokens"]),
        "input tokens = Σ over requests": (totals("input_tokens"), rows["input_tokens"]),
        "requests = Σ over processes": (totals("requests_completed"), rows["requests_completed"]),
        "prefill + decode + idle = window": (
            rows["duration_s"],
            map(
                _sum,
                map(_sum, rows["prefill_duration_s"], rows["decode_duration_s"]),
                [_product(share or 0.0, s) for share, s in zip(rows["idle_share"], rows["duration_s"], strict=True)],
            ),
        ),
    }
    for name, (ones, others) in pairs.items():
        for place, (one, other) in enumerate(zip(ones, others, strict=True)):
            if one == other or one is None or other is None:
                continue
            if abs(one - other) > IDENTITY_TOLERANCE * max(abs(one), abs(other)):
                yield place, warning("identity_violated", f"{name} does not hold: {one:.6g} is not {other:.6g}.")


def _negatives(rows: ByColumn) -> Iterator[tuple[int, CodedWarning]]:
    for place, left_j in enumerate(rows["energy_idle_adjusted_j"]):
        if left_j is not None and left_j < 0 and left_j < -_idle_tolerance_j(rows, place):
            yield place, warning("idle_adjusted_negative", f"subtracting the idle energy leaves {left_j:.4g} J.")
    for place, decode_j in enumerate(rows["decode_energy_j"]):
        if decode_j is not None and decode_j < 0:
            yield place, warning("decode_negative", f"the decode energy is {decode_j:.4g} J.")


def _idle_tolerance_j(rows: ByColumn, place: int) -> float:
    power_w, tick_s, energy_j = (
        rows[name][place] or 0.0 for name in ("idle_power_loaded_w", "counter_tick_s", "energy_j")
    )
    return max(IDLE_TOLERANCE * energy_j, EDGE_TICKS * power_w * tick_s)


def _product(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one * other


def _quotient(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other
