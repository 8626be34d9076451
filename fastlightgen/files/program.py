"""TorchScript files. They are programs: nothing else of this package runs code of a file, and only a key starts it."""

import warnings
from pathlib import Path
from typing import Any

import torch

from fastlightgen.files.border import opened, shorter, unread


def load_program(path: str | Path, key: str, device: torch.device) -> Any:
    """Load the TorchScript program that the user named with `key`. Calling it runs its operators."""
    try:
        with opened(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # newer versions of torch prefer torch.export
            return torch.jit.load(file, map_location=device).eval()
    except OSError as err:
        raise ValueError(f"{key}={path}: {unread(err)}") from None
    except RuntimeError as err:
        raise ValueError(
            f"{key}={path}: is no TorchScript program ({shorter(err)}); save it with torch.jit.save"
        ) from None
