"""Files, presets and overrides become an Experiment: the only room that knows Hydra."""
