"""Watches the forward passes of the pytorch backend's model, and counts requests whose logits are infinite or NaN."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# The fields in which the output of a forward pass can hold the cache.
CACHES = ("past_key_values", "cache_params", "state", "mems")


@dataclass
class Noticed:
    """How many requests since `Backend.forget` had infinite or NaN logits, and how many had unmasked padding."""

    not_finite: int = 0
    padded: int = 0


class ForwardWatch:
    """Keeps the output of a model's latest forward pass, and calls back after a pass.

    The model's `forward` is wrapped, because a module with forward hooks is called in a slower way: on the CPU of
    docs/performance.md, two hooks took 4.5 µs in each pass, and the wrapper takes 0.4 µs.
    """

    def __init__(self, model: Any) -> None:
        self._latest: Any = None
        # Called after each pass, as soon as it has been launched.
        self.when_launched: Callable[[], None] | None = None
        # Called once, after the next pass and after `when_launched`.
        self.once: Callable[[], None] | None = None
        forward = model.forward

        @functools.wraps(forward)
        def watched(*args: Any, **options: Any) -> Any:
            self._latest = output = forward(*args, **options)
            if self.when_launched is not None:
                self.when_launched()
            if self.once is not None:
                once, self.once = self.once, None
                once()
            return output

        model.forward = watched

    def take(self) -> Any:
        """Return the latest output, and keep it no longer."""
        latest, self._latest = self._latest, None
        return latest


def cache_in(output: Any) -> Any:
    """Return the cache in a model's output, or None."""
    return next((held for name in CACHES if (held := getattr(output, name, None)) is not None), None)


def not_finite(output: Any) -> int:
    """Return the number of rows of a model's output whose last logits are not finite.

    A NaN stays in the key/value cache of its request, so one check after the request has finished is enough. A logit of
    minus infinity is accepted, because some models use it to rule a token out.
    """
    logits = getattr(output, "logits", None)
    if logits is None:
        return 0
    # The maximum of a row is NaN if any value is NaN. Unlike a check of all values, this needs no extra memory.
    largest = logits.amax(dim=-1)
    largest = largest[:, -1] if largest.ndim == 2 and largest.shape[0] > 1 else largest
    return int((~largest.isfinite()).sum())
