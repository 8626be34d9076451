"""Networks: the walk over blocks (base), one folder per family (families), sampling, LoRA, model folders (folder)."""
