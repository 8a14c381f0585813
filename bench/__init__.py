"""Measurements of lem itself: what it costs, and how far off it is. Run through nox."""
