"""The draft of a config file: the values that `lem config new` sets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from lem.config import inventory
from lem.config.compose import plain_values
from lem.config.options import Options
from lem.config.userfile import UserFile

WIDTH = 80
# This model and dataset work on any machine, without a network.
MODEL, DATASET, SAMPLE_SIZE = "tiny", "sample", 10
# The values that every new file sets, unless the preset sets them.
FIRST = ("fp_precision", "max_output_tokens", "batching.batch_size")


@dataclass(frozen=True)
class Draft:
    """The content of a new file: the option chosen in each group, and values by dotted path."""

    options: Options
    choices: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def effective(self) -> dict[str, Any]:
        """Return the whole configuration that this draft produces, as nested mappings."""
        return plain_values(UserFile(self.options), self.choices, self.values)

    def at(self, path: str) -> Any:
        """Return the value at a dotted path in the whole configuration."""
        value: Any = self.effective()
        for part in path.split("."):
            value = value[part]
        return value

    def preset_values(self) -> dict[str, Any]:
        """Return the values that the chosen preset sets, by dotted path."""
        name = self.choices.get("preset")
        return inventory.summary(self.options, "preset", name).values if name else {}

    def choose(self, group: str, option: str | None) -> Draft:
        """Return a draft with this option chosen for the group; None removes the group's choice."""
        rest = {key: value for key, value in self.choices.items() if key != group}
        return replace(self, choices=rest if option is None else {**rest, group: option})

    def set(self, path: str, value: Any) -> Draft:
        """Return a draft that sets this value."""
        return replace(self, values={**self.values, path: value})


def first_draft(options: Options, preset: str | None) -> Draft:
    """Return the draft that is written if no questions are asked."""
    draft = Draft(options).choose("preset", preset).choose("dataset", DATASET)
    draft = draft.set("model", MODEL).set("dataset.sample_size", SAMPLE_SIZE)
    for path in FIRST:
        if path not in draft.preset_values():
            draft = draft.set(path, draft.at(path))
    return draft
