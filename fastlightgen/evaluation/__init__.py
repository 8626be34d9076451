"""What the command evaluate measures beside the built-in world: videos, latent caches, VBench."""
