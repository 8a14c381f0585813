"""What can be asked for: the schema of an experiment, its rules and conflicts."""
