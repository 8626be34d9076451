"""Metrics: one file per family; nothing here needs downloaded weights."""
