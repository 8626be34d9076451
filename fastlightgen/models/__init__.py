"""Networks: the walk over blocks (base), a folder per model family, sampling, LoRA adapters, model folders on disk."""
