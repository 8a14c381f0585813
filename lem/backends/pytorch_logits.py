"""What the pytorch backend notices about the tokens of a window, such as logits that are infinite or not a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Noticed:
    """Numbers of requests since `Backend.forget` whose tokens mean nothing, or are not those of the prompt alone."""

    not_finite: int = 0
    padded: int = 0


class LastLogits:
    """The logits of a model's latest forward pass.

    What is not a number stays in the key/value cache of its request, so looking once, when the request is finished, is
    enough.
    """

    def __init__(self, model: Any) -> None:
        self._logits: Any = None
        model.register_forward_hook(self._keep)

    def _keep(self, _model: Any, _inputs: Any, output: Any) -> None:
        self._logits = getattr(output, "logits", None)

    def not_finite(self) -> int:
        """Return in how many rows the last logits are not finite, and let go of them.

        A logit of minus infinity rules a token out, which some models do.
        """
        logits, self._logits = self._logits, None
        if logits is None:
            return 0
        # The largest of a row is not a number if any of them is not; unlike comparing all, this needs no memory.
        largest = logits.amax(dim=-1)
        largest = largest[:, -1] if largest.ndim == 2 and largest.shape[0] > 1 else largest
        return int((~largest.isfinite()).sum())
