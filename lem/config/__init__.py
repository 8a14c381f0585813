"""Turns files, presets and overrides into an `Experiment`; only this package and `lem.cli.hydra_app` use Hydra."""
