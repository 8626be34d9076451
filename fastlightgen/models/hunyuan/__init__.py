"""HunyuanVideo: network, blocks, layers, key table, cost."""
