"""Wan: network, layers, key table, cost."""
