"""Rows as columns: reads columns from objects, and computes columns from other columns.

Quotients of two columns are computed here, both for cycles and for experiments, so that J = W·t, J/token = W/(tokens/s)
and other identities hold in every row. This module knows nothing about records.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from lem.quantities import J_PER_KWH, J_PER_WH

# Columns by name, all of the same length.
Columns = dict[str, list[Any]]
Values = Sequence[float | None]

# If more than this share of a window's work was done twice, no rate is shown.
REPEATED_MOST_SHARE = 0.02
# A smaller idle share comes only from the edges of the window, as in traffic with a fixed concurrency.
IDLE_LEAST_SHARE = 0.001


def of_each(objects: Sequence[Any], name: str) -> list[Any]:
    """Return an attribute of each object; an object that is None gives None."""
    value = attrgetter(name)
    try:
        return list(map(value, objects))  # takes half the time of the loop below
    except AttributeError:  # an object is missing
        return [None if each is None else value(each) for each in objects]


def quotients(of: Columns, complete: Sequence[bool]) -> Columns:
    """Return the columns that are derived from other columns.

    The window's throughput and its energy per token or request are null if the run was incomplete, because part of the
    time and energy was spent on requests that did not finish. They are also null if too much of the time may have been
    spent on requests that had to be run again. The average power is kept in both cases.
    """
    is_once = [(share or 0.0) <= REPEATED_MOST_SHARE for share in of["repeated_share"]]
    complete = [done and once for done, once in zip(complete, is_once, strict=True)]
    energy_j, duration_s, tokens, requests = (
        of[name] for name in ("energy_j", "duration_s", "output_tokens", "requests_completed")
    )
    complete_j, complete_s = where(complete, energy_j), where(complete, duration_s)
    all_tokens = [one + other for one, other in zip(of["input_tokens"], tokens, strict=True)]
    flops_per_s = ratios(of["flops"], complete_s)
    energy_kwh = [None if value is None else value / J_PER_KWH for value in energy_j]
    return {
        "output_tokens_per_s": ratios(tokens, complete_s),
        "requests_per_s": ratios(requests, complete_s),
        "energy_wh": [None if value is None else value / J_PER_WH for value in energy_j],
        "average_power_w": ratios(energy_j, duration_s),
        "energy_per_output_token_j": ratios(complete_j, tokens),
        "energy_per_request_j": ratios(complete_j, requests),
        "energy_idle_adjusted_j": _differences(energy_j, _products(of["idle_power_loaded_w"], duration_s)),
        "co2e_g": _products(energy_kwh, of["carbon_intensity_g_per_kwh"]),
        "decode_duration_s": where(
            is_once,
            _differences(
                _differences(duration_s, of["prefill_duration_s"]), _idle_durations_s(of["idle_share"], duration_s)
            ),
        ),
        "decode_energy_j": where(
            [once and (idle or 0.0) <= IDLE_LEAST_SHARE for once, idle in zip(is_once, of["idle_share"], strict=True)],
            _differences(energy_j, of["prefill_energy_j"]),
        ),
        "steady_output_tokens_per_s": ratios(of["steady_output_tokens"], of["steady_duration_s"]),
        "steady_average_power_w": ratios(of["steady_energy_j"], of["steady_duration_s"]),
        "steady_energy_per_output_token_j": ratios(of["steady_energy_j"], of["steady_output_tokens"]),
        "error_rate": ratios(
            of["requests_failed"],
            [None if n is None else n + done for n, done in zip(of["requests_failed"], requests, strict=True)],
        ),
        "flops_per_token": ratios(of["flops"], all_tokens),
        "flops_per_s": flops_per_s,
        "mfu": ratios(flops_per_s, of["peak_flops_per_s"]),
    }


def where(shown: Sequence[bool], values: Values) -> list[float | None]:
    """Return the values, with None in place of those that should not be shown."""
    return [value if is_shown else None for is_shown, value in zip(shown, values, strict=True)]


def _idle_durations_s(shares: Values, durations_s: Values) -> list[float]:
    """Return for how long no request was present in each window; 0 if its idle share or its length is unknown."""
    return [max(share or 0.0, 0.0) * (duration or 0.0) for share, duration in zip(shares, durations_s, strict=True)]


def _products(ones: Values, others: Values) -> list[float | None]:
    return [None if a is None or b is None else a * b for a, b in zip(ones, others, strict=True)]


def _differences(ones: Values, others: Values) -> list[float | None]:
    return [None if a is None or b is None else a - b for a, b in zip(ones, others, strict=True)]


def ratios(values: Values, by: Values) -> list[float | None]:
    """Return the quotients; None where the dividend or the divisor is unknown, or the divisor is 0."""
    return [None if a is None or not b else a / b for a, b in zip(values, by, strict=True)]
