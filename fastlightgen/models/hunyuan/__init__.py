"""HunyuanVideo: network, blocks, keys, cost, encoders; `family.py` is the record that describes them."""
