"""Tests run offline and on few threads, so that they time alike on a laptop and on a shared machine."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub

import torch

torch.set_num_threads(min(2, os.cpu_count() or 1))
