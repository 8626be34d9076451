"""Networks: the walk over blocks (base), Wan (wan), weights on disk (weights), sampling (sample), LoRA (lora)."""
