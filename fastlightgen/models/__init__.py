"""Networks: the walk over blocks (base), Wan (wan), sampling (sample), LoRA (lora); weights on disk in weights, with
files (mapping, writing), keys (tables between formats) and original (the original repositories' folders)."""
