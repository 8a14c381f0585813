"""What is run: prompts, models, batching and traffic."""
