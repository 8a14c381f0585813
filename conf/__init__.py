"""The options of the configuration, one YAML file each. They are installed as lem.conf, where Hydra finds them."""
