"""Smaller decoders for a pipeline's VAE: pruning, losses of the fine-tuning, folders, tiny decoders of others."""
