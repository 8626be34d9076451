"""How the processes of a sequence group share the tokens of a clip. Arithmetic only."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """What one of `ranks` GPUs that share a clip's tokens has: `share` of the image tokens, all tokens of its heads."""

    share: float = 1.0
    ranks: int = 1


WHOLE = Part()


def token_shares(grid: tuple[int, int, int], size: int) -> tuple[int, list[int]]:
    """How `size` GPUs share a grid of patches (F, H, W): the axis that is cut, H or W, and each one's patches along it.

    The axis is the one where the largest share is the smaller part of the whole.
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
    """Of all the numbers at once, as a list to choose from."""
    return ", ".join(str(n) for n in range(1, min(numbers) + 1) if not any(m % n for m in numbers))
