"""The interface between stages and engines: trained networks (roles) and the losses of a step (updates)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from fastlightgen.config import TrainingKeys
from fastlightgen.models.base import VideoDiT

Loss = Callable[[], tuple[Tensor, dict[str, float]]]
Values = Callable[[], Iterator[tuple[str, Tensor]]]


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
    title: str = ""  # its name in sentences; empty: its name in files and logs
    ema: float = 0.0  # decay of the averaged weights; 0: none
    ema_start: int = 0  # update at which averaging starts
    carried: VideoDiT | None = None  # a network that changes without an optimizer; checkpoints contain it too
    host: VideoDiT | None = None  # the frozen network that `net` is a part of (adapters)
    # Reads (name, float32 value) of every parameter of `net` from its file, for an engine that holds `net` in bfloat16;
    # None: there is no file, the values in `net` are the start.
    file_values: Values | None = None

    @property
    def network(self) -> VideoDiT:
        """The network whose walks train this role: `net` itself, or the host of adapters."""
        network = self.host or self.net
        assert isinstance(network, VideoDiT)
        return network

    @classmethod
    def of(cls, net: nn.Module, cfg: TrainingKeys, lr: float | None = None, **more: Any) -> "Role":
        """Create a role with the optimizer settings of a configuration; `lr` replaces the configuration's."""
        cosine = cfg.lr_schedule == "cosine"
        return cls(net, cfg.lr if lr is None else lr, cfg.betas, cfg.weight_decay, cfg.clip, cfg.warmup, cosine, **more)


@dataclass
class Update:
    """One optimizer step of one role. The engine calls `loss`, which returns (loss, numbers to log)."""

    role: str
    loss: Loss


def named(record: dict[str, float], role: str, roles: dict[str, Role]) -> dict[str, float]:
    """Prefix the keys of a record with the role's name, if the stage has several roles."""
    return record if len(roles) == 1 else {f"{role}_{key}": value for key, value in record.items()}


def title(role: str, roles: dict[str, Role]) -> str:
    """The name of a role in sentences."""
    return roles[role].title or role


def in_words(key: str, roles: dict[str, Role]) -> str:
    """A key of the log with the role's name in sentences: critic_loss for fake_loss."""
    role, _, rest = key.partition("_")
    return f"{title(role, roles)}_{rest}" if role in roles else key


class Stage(Protocol):
    """The methods and fields that the loop uses. A stage never steps, places or saves anything itself."""

    number: int | str
    iters: int
    roles: dict[str, Role]
    frozen: Sequence[VideoDiT]  # networks that only predict
    teacher: VideoDiT | None  # checked against the data before the first step
    loss_key: str  # the logged loss that is watched for divergence
    drifts: bool  # True if the stage trains on clips of its own, whose look may drift; then it is watched

    def begin(self) -> None:
        """Measure the networks before training. Called after they are placed, before a checkpoint is loaded."""

    def updates(self, step: int) -> list[Update]:
        """Return the optimizer steps of one iteration, in order."""

    def check(self, step: int) -> None:
        """Called after every step; raises ValueError to stop a run that has diverged."""

    def sampler(self) -> dict:
        """Return arguments of `models.sample.sample` that make clips with the network in training."""

    def save(self, folder: Path, write: Callable) -> None:
        """Write the stage's result as a model folder; `write` takes the arguments of `save_model`."""
