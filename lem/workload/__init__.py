"""The workload of an experiment: prompts, models, batching and traffic."""
