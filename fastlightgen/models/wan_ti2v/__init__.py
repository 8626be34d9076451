"""Wan2.2 TI2V: Wan's transformer with a time per token; the tokens of a given first frame have t = 0."""
