"""Wan2.1: network, blocks, keys, cost, encoders; `family.py` is the record that describes them."""
