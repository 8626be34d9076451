"""Metrics, one file per kind. None needs downloaded weights."""
