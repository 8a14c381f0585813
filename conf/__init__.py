"""The configuration's options, one YAML each; installed as the package lem.conf, where Hydra finds it."""
