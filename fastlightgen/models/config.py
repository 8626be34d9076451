"""The properties that every family's network configuration has, however its config.json names the keys."""

from dataclasses import asdict, dataclass
from typing import Any

KEPT_HEADS = "kept_attention_heads"  # field with the number of heads that width pruning left; None: all


@dataclass(frozen=True)
class NetworkConfig:
    """Base of the families' configurations. A subclass has the keys of diffusers' config.json as its fields."""

    @property
    def dim(self) -> int:
        """Width D of the hidden states."""
        raise NotImplementedError

    @property
    def heads(self) -> int:
        """Number of heads of each attention in the blocks."""
        return int(vars(self)["num_attention_heads"])

    @property
    def ffn_width(self) -> int:
        """Width of the feed-forward inside the blocks."""
        raise ValueError(f"{type(self).__name__}: width pruning does not know this family; use another method")

    def narrowed(self, heads: int, ffn_width: int) -> "NetworkConfig":
        """The configuration of the same network with fewer heads in its blocks, and a narrower feed-forward.

        A family that can be pruned in width has this, `ffn_width`, and `Block.prunable`.
        """
        raise ValueError(f"{type(self).__name__}: width pruning does not know this family; use another method")

    def record(self) -> dict[str, Any]:
        """Contents of config.json; the key of pruned heads, which diffusers' class does not know, only if it is set."""
        return {key: value for key, value in asdict(self).items() if key != KEPT_HEADS or value is not None}

    @property
    def text_width(self) -> int:
        """Width of the text embedding that the network reads."""
        raise NotImplementedError

    @property
    def released(self) -> dict[str, float]:
        """Sampling settings of the family's released weights: `steps`, `guidance` and `shift`."""
        raise NotImplementedError

    @property
    def is_stock(self) -> bool:
        """True if diffusers' class can hold the network."""
        return getattr(self, KEPT_HEADS, None) is None

    @property
    def embeds_guidance(self) -> bool:
        """True if the network reads Cond.guidance, so that a single prediction is already guided."""
        return False

    @property
    def pictured(self) -> bool | None:
        """True if clips must have a first frame, False if they may not; None if the channels tell, or both are fine."""
        return None

    @property
    def given_frames(self) -> int:
        """Number of latent frames at the start of a clip that the condition gives; predictions for them are unused."""
        return 0


def check_heads(title: str, kept: int | None, heads: int) -> None:
    """Raise unless `kept` is a number of heads that width pruning can leave."""
    if kept is not None and not (type(kept) is int and 1 <= kept < heads):
        raise ValueError(
            f"{title} config: {KEPT_HEADS} is {kept!r}; wanted null or a whole number from 1 to {heads - 1}"
        )
