"""The hidden states of the real networks, [samples, tokens, width], and a small one for machines without a GPU."""

SHAPES = {
    "wan-14b-480p": (1, 32760, 5120),
    "wan-14b-720p": (1, 75600, 5120),
    "wan-1.3b-480p": (1, 32760, 1536),
    "wan-1.3b-480p-b2": (2, 32760, 1536),
    "hunyuan-720p": (1, 119056, 3072),
}
CPU_SHAPES = {"small (no GPU)": (2, 12, 192)}
