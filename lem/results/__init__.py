"""Keeps records, puts them into tables and shows them."""
