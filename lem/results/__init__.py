"""Stores records, aggregates them into tables, and shows them."""
