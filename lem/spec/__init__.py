"""The configuration of an experiment: its schema, the rules that it may break, and conflicts between options."""
