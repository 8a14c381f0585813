"""What the files of a model say about it without its weights: tokenizer, end of a sequence, sizes.

For engines that load the weights by themselves, in this process or in another one. Works with transformers, which is
imported where it is used. Knows no engine.
"""

from __future__ import annotations

from typing import Any

from lem.models import Model


class ModelFiles:
    """The files of one model, read through transformers."""

    def __init__(self, model: Model, *, trust_remote_code: bool) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        self._transformers = transformers
        self._path = model.path
        self._source = {"revision": model.revision, "trust_remote_code": trust_remote_code}

    def tokenizer(self) -> Any:
        """Load the tokenizer."""
        return self._transformers.AutoTokenizer.from_pretrained(self._path, **self._source)

    def generation_config(self) -> Any:
        """Return what the model says about the end of a sequence, as transformers would take it."""
        generation = self._transformers.GenerationConfig
        try:
            return generation.from_pretrained(self._path, revision=self._source["revision"])
        except OSError:
            return generation.from_model_config(self._config())

    def hollow(self) -> Any:
        """Return the model without weights, of which its sizes are read; None where transformers does not know it."""
        import torch

        trusted = self._source["trust_remote_code"]
        try:
            config = self._config()
            with torch.device("meta"):
                return self._transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
        except (ValueError, KeyError, ImportError, NotImplementedError):
            return None

    def _config(self) -> Any:
        return self._transformers.AutoConfig.from_pretrained(self._path, **self._source)
