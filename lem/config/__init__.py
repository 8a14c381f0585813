"""Turns files, presets and overrides into an Experiment; no other room except `lem.cli.hydra_app` knows Hydra."""
