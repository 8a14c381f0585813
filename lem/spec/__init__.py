"""The configuration of an experiment: its schema, the rules it can break, and conflicts between options."""
