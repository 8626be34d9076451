"""Data: latent caches, the batches drawn from them, lists of videos, frames as files."""
