"""How many tokens of a clip each rank of a sequence group gets. Arithmetic only, without collectives."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One GPU's part of a clip in sequence parallelism; in attention it has all tokens of 1 / ranks of the heads."""

    share: float = 1.0  # its fraction of the image tokens
    ranks: int = 1  # GPUs that share the clip's tokens


WHOLE = Part()


def token_shares(grid: tuple[int, int, int], size: int) -> tuple[int, list[int]]:
    """Divide a grid of patches (F, H, W) among `size` GPUs: return the cut axis and each GPU's patches along it.

    The axis is 1 (H) or 2 (W): the one that leaves fewer tokens to the GPU with the most.
    """
    axes = [a for a in (2, 1) if grid[a] >= size]
    if not axes:
        raise ValueError(
            f"sequence_parallel={size}: the latent has {grid[1]} rows and {grid[2]} columns of patches, wanted {size} "
            f"of either; use larger clips or sequence_parallel={max(grid[1:])} or less"
        )
    axis = min(axes, key=lambda a: math.ceil(grid[a] / size) / grid[a])
    each, more = divmod(grid[axis], size)
    return axis, [each + (r < more) for r in range(size)]


def divisors(*numbers: int) -> str:
    """Return the common divisors of the numbers, as text for an error message."""
    return ", ".join(str(n) for n in range(1, min(numbers) + 1) if not any(m % n for m in numbers))
