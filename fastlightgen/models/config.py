"""The properties that every family's network configuration has, however its config.json names the keys."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NetworkConfig:
    """Base of the families' configurations. A subclass has the keys of diffusers' config.json as its fields."""

    @property
    def dim(self) -> int:
        """Width D of the hidden states."""
        raise NotImplementedError

    @property
    def text_width(self) -> int:
        """Width of the text embedding that the network reads."""
        raise NotImplementedError

    @property
    def released(self) -> dict[str, float]:
        """Sampling settings of the family's released weights: `steps`, `guidance` and `shift`."""
        raise NotImplementedError

    @property
    def embeds_guidance(self) -> bool:
        """True if the network reads Cond.guidance, so that a single prediction is already guided."""
        return False

    @property
    def given_frames(self) -> int:
        """Number of latent frames at the start of a clip that the condition gives; predictions for them are unused."""
        return 0
