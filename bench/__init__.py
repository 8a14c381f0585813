"""Benchmarks of lem itself: its cost and its accuracy. Run them through nox."""
