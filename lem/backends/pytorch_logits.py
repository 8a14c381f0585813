"""Counts requests of the pytorch backend whose logits are infinite or NaN, which makes their tokens meaningless."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Noticed:
    """How many requests since `Backend.forget` had infinite or NaN logits, and how many had unmasked padding."""

    not_finite: int = 0
    padded: int = 0


class LastLogits:
    """The logits of a model's latest forward pass.

    A NaN stays in the key/value cache of its request, so one check after the request has finished is enough.
    """

    def __init__(self, model: Any) -> None:
        self._logits: Any = None
        model.register_forward_hook(self._keep)

    def _keep(self, _model: Any, _inputs: Any, output: Any) -> None:
        self._logits = getattr(output, "logits", None)

    def not_finite(self) -> int:
        """Return the number of rows whose latest logits are not finite, and release the logits.

        A logit of minus infinity is accepted, because some models use it to rule a token out.
        """
        logits, self._logits = self._logits, None
        if logits is None:
            return 0
        # The maximum of a row is NaN if any value is NaN. Unlike a check of all values, this needs no extra memory.
        largest = logits.amax(dim=-1)
        largest = largest[:, -1] if largest.ndim == 2 and largest.shape[0] > 1 else largest
        return int((~largest.isfinite()).sum())
