"""Faults under load, and what became of every request: `make chaos`."""
