"""Rules about the arms of campaigns."""

from __future__ import annotations

from tests.spec.examples.example import Example, asks

EXAMPLES = [
    Example(
        "primary_without_ttft",
        "streaming.enabled",
        asks(primary="ttft_mean_s"),
        asks("streaming.enabled=true", primary="ttft_mean_s"),
    ),
    *(
        Example("primary_without_energy", "energy.name", asks("energy=none", primary=measure), not_by)
        for measure, not_by in (
            ("energy_per_output_token_j", asks(primary="energy_per_output_token_j")),
            ("energy_per_request_j", asks(primary="energy_per_request_j")),
            ("average_power_w", asks(primary="average_power_w")),
            ("average_power_w", asks("energy=none", primary="output_tokens_per_s")),
        )
    ),
]
