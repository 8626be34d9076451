"""What a stage hands to an engine: the networks it trains (roles) and the losses of a step (updates)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from fastlightgen.config import TrainingKeys
from fastlightgen.models.base import VideoDiT

Loss = Callable[[], tuple[Tensor, dict[str, float]]]


@dataclass
class Role:
    """A trained network and how it is optimised (AdamW)."""

    net: nn.Module
    lr: float
    betas: Sequence[float]
    weight_decay: float
    clip: float
    warmup: int = 0
    cosine: bool = False  # decay the learning rate to 0 over the run
    ema: float = 0.0  # decay of the averaged weights; 0: none
    ema_start: int = 0  # update at which averaging starts
    carried: VideoDiT | None = None  # a network that moves without an optimizer; checkpoints hold it too
    host: VideoDiT | None = None  # the frozen network that `net` is a part of (adapters)

    @property
    def network(self) -> VideoDiT:
        """The network whose walks train this role: `net` itself, or the host of adapters."""
        network = self.host or self.net
        assert isinstance(network, VideoDiT)
        return network

    @classmethod
    def of(cls, net: nn.Module, cfg: TrainingKeys, lr: float | None = None, **more: Any) -> "Role":
        """A role with the optimizer's settings of a configuration; `lr` where it is not the configuration's."""
        cosine = cfg.lr_schedule == "cosine"
        return cls(net, cfg.lr if lr is None else lr, cfg.betas, cfg.weight_decay, cfg.clip, cfg.warmup, cosine, **more)


@dataclass
class Update:
    """One optimizer step of one role; `loss` is called when its turn comes and returns (loss, numbers to log)."""

    role: str
    loss: Loss


def named(record: dict[str, float], role: str, roles: dict[str, Role]) -> dict[str, float]:
    """The numbers of one role's update, under its name where there are several roles."""
    return record if len(roles) == 1 else {f"{role}_{key}": value for key, value in record.items()}


class Stage(Protocol):
    """What the loop needs of a stage. A stage never steps, places or saves anything itself."""

    number: int
    iters: int
    roles: dict[str, Role]
    frozen: Sequence[VideoDiT]  # networks that only predict
    teacher: VideoDiT | None  # the network whose knowledge of the data is checked before the first step
    loss_key: str  # the logged loss that tells of divergence when it grows
    drifts: bool  # may the clips leave the look of the data? Else the data themselves hold them there

    def begin(self) -> None:
        """Called once the networks are placed and before a checkpoint is read: the first look at them."""

    def updates(self, step: int) -> list[Update]: ...

    def check(self, step: int) -> None:
        """Called after every step; raises ValueError to stop a run that has gone wrong."""

    def sampler(self) -> dict:
        """How to make clips with what is being trained: arguments of `models.sample.sample`."""

    def save(self, folder: Path, write: Callable) -> None:
        """Write the result of the stage as a model folder; `write` takes the arguments of `save_model`."""
