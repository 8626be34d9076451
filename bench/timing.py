"""Wall-clock seconds of one call, with an empty GPU queue before and after."""

import time
from collections.abc import Callable

import torch


def seconds(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
