"""Files, presets and overrides become an Experiment: the only room that knows Hydra, but for `lem.cli.hydra_app`."""
