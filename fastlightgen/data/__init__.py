"""Data: the built-in world, its exact codec and latent caches."""
