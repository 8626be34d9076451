"""Data: latent caches and their batches, lists of videos, video decoding, clip files."""
