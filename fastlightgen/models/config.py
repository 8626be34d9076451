"""The part of a network's configuration that every family has, whatever its keys are called."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NetworkConfig:
    """Base of the families' configurations. A subclass has the keys of diffusers' config.json as its fields."""

    @property
    def text_width(self) -> int:
        """Width of the text embedding that the network reads."""
        raise NotImplementedError

    @property
    def released(self) -> dict[str, float]:
        """`steps`, `guidance` and `shift` that the family's released weights are sampled with."""
        raise NotImplementedError

    @property
    def embeds_guidance(self) -> bool:
        """Does the network read Cond.guidance, so that one prediction is a guided one?"""
        return False

    @property
    def given_frames(self) -> int:
        """Latent frames at the start of a clip that the condition holds; no sampler uses a prediction for them."""
        return 0
