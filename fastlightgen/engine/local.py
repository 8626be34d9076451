"""The one-process engine. It places the networks, owns their optimizers and averages, and takes the steps."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fastlightgen.engine import checkpoint
from fastlightgen.engine.ema import Ema
from fastlightgen.engine.roles import Role, Stage, Update, named, title
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.folder.weights import save_model
from fastlightgen.parallel.clock import clock
from fastlightgen.parallel.log import count, size
from fastlightgen.parallel.ranks import accumulation
from fastlightgen.rng import share


def pick_device(name: str) -> torch.device:
    """Return the device. `auto` picks a GPU if torch sees one; each process of one machine gets its own GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch sees no GPU; use device=cpu or device=auto")
    if torch.cuda.is_available() and name != "cpu" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def schedule(role: Role, count: int, step: int, iters: int) -> float:
    """Return the factor of the learning rate: a warm-up times a constant or a cosine.

    The warm-up is linear in the role's updates (`count`), the cosine runs over the steps of the run.
    """
    warm = min(1.0, (count + 1) / role.warmup) if role.warmup else 1.0
    return warm * (0.5 + 0.5 * math.cos(math.pi * step / iters) if role.cosine else 1.0)


def require_finite(value: float, what: str, role: str, step: int) -> None:
    """Raise if a loss or a gradient norm is not finite."""
    if not math.isfinite(value):
        raise ValueError(
            f"step {step}, {role}: {what} is {value}; stopped before the optimizer, the last checkpoint is "
            "intact; lower lr or clip, or look at the data of this step"
        )


class LocalEngine:
    """Trains float32 weights. With dtype=bfloat16 the forward and backward pass run under autocast."""

    name = "local"

    def __init__(self, device: torch.device, dtype: str, batch: int = 1, micro_batch: int = 0):
        self.device, self.dtype, self.micro_batches = device, dtype, accumulation(batch, micro_batch, 1)

    def autocast(self):
        """Return the context in which networks are called."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")

    def prepare(self, stage: Stage) -> None:
        """Place the trained networks and create an optimizer and an average for each role."""
        self.iters, self.roles = stage.iters, stage.roles
        self.count = dict.fromkeys(self.roles, 0)
        self.optimizers, self.emas = {}, {}
        for name, role in self.roles.items():
            role.net.to(self.device)
            params = [p for p in role.net.parameters() if p.requires_grad]
            beta1, beta2 = role.betas
            self.optimizers[name] = torch.optim.AdamW(
                params, lr=role.lr, betas=(beta1, beta2), weight_decay=role.weight_decay
            )
            if role.ema:
                self.emas[name] = Ema(role.net, role.ema, role.ema_start)

    def place(self, net: VideoDiT) -> None:
        """Place a network that only predicts."""
        net.to(self.device)

    def estimate(self) -> str:
        """Describe the memory of training, in one line.

        Per trained number: 4 bytes each of weight, gradient, two AdamW moments and, if there is one, the average.
        """
        if not self.roles:
            return "trains nothing"
        parts, total, saved = [], 0, 0
        for name, role in self.roles.items():
            trained = sum(p.numel() for p in role.net.parameters() if p.requires_grad)
            total += trained * 4 * (4 + (name in self.emas))
            stored = sum(p.numel() for net in (role.net, role.carried) if net is not None for p in net.parameters())
            saved += 4 * (stored + trained * (2 + (name in self.emas)))
            parts.append(f"{title(name, self.roles)} {count(trained)} parameters")
        return (
            f"trains {', '.join(parts)}; {size(total)} for weights, gradients and AdamW, plus activations; "
            f"while a checkpoint is written a copy of it, {size(saved)}, waits in host memory"
        )

    def apply(self, update: Update, step: int) -> dict[str, float]:
        """Compute loss and gradient, clip, take one optimizer step, update the average; return the numbers to log.

        A loss or gradient norm that is not finite raises before the optimizer step.
        """
        role, optimizer = self.roles[update.role], self.optimizers[update.role]
        loss = 0.0
        record: dict[str, float] = {}
        for k in range(self.micro_batches):
            with clock.part("forward"), share(k, self.micro_batches), self.autocast():
                part, numbers = update.loss()
                value = part.item()
            require_finite(value, "loss", title(update.role, self.roles), step + 1)
            with clock.part("backward"):
                (part / self.micro_batches).backward()
            loss += value / self.micro_batches
            record = {key: record.get(key, 0.0) + v / self.micro_batches for key, v in numbers.items()}
        params = optimizer.param_groups[0]["params"]
        with clock.part("backward"):
            norm = torch.nn.utils.clip_grad_norm_(params, role.clip).item()
        require_finite(norm, "gradient norm", title(update.role, self.roles), step + 1)
        lr = role.lr * schedule(role, self.count[update.role], step, self.iters)
        optimizer.param_groups[0]["lr"] = lr
        with clock.part("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
            self.count[update.role] += 1
            if update.role in self.emas:
                self.emas[update.role].update(role.net)
        record = {"loss": loss, "grad_norm": norm, "lr": lr} | record
        return named(record, update.role, self.roles)

    def measures(self) -> dict[str, float]:
        """Nothing: the weights are float32, so that no movement is lost."""
        return {}

    # A checkpoint holds per role: the network, its AdamW state, its average, and the network that it carries.

    def save(self, folder: Path, step: int, keep: int, every: int, good: int = 0) -> checkpoint.Saving:
        """Copy the state to host memory and start writing the checkpoint of `step`."""
        files = {name: {k: checkpoint.host_copy(v) for k, v in part.items()} for name, part in self.state().items()}
        return checkpoint.save(folder, step, files, {"count": dict(self.count), "engine": self.name}, keep, every, good)

    def load(self, folder: Path) -> int:
        """Load the newest checkpoint and return its step; 0 if there is none."""
        step, meta, files = checkpoint.latest(folder, self.name)
        if step:
            held = checkpoint.reading(folder, step, lambda: checkpoint.load(files))
            found = {f"{role}/{k}": v.shape for role in meta["count"] for k, v in held.get(role, {}).items()}
            wanted = {f"{n}/{k}": v.shape for n, role in self.roles.items() for k, v in role.net.state_dict().items()}
            checkpoint.require_same(folder, step, found, wanted)
            self.load_state(held, meta["count"])
        return step

    def save_model(self, net: VideoDiT, folder: Path, dtype: torch.dtype | None = None, **card) -> None:
        """Write a model folder."""
        save_model(net, folder, dtype, **card)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of a checkpoint, file -> name -> tensor; not copied."""
        files = {}
        for name, role in self.roles.items():
            files[name] = dict(role.net.state_dict())
            names = [n for n, p in role.net.named_parameters() if p.requires_grad]
            states = self.optimizers[name].state_dict()["state"]
            files[f"{name}-optimizer"] = {f"{names[i]}/{k}": v for i, s in states.items() for k, v in s.items()}
            if name in self.emas:
                files[f"{name}-ema"] = self.emas[name].shadow
            if role.carried is not None:
                files[f"{name}-carried"] = dict(role.carried.state_dict())
        return files

    def load_state(self, files: dict[str, dict[str, Tensor]], count: dict[str, int]) -> None:
        """Load the tensors of `state` and the number of updates of each role."""
        self.count = dict(count)
        for name, role in self.roles.items():
            role.net.load_state_dict(files[name])
            names = [n for n, p in role.net.named_parameters() if p.requires_grad]
            states: dict[int, dict[str, Tensor]] = {}
            for key, value in files[f"{name}-optimizer"].items():
                param, _, field = key.rpartition("/")
                states.setdefault(names.index(param), {})[field] = value
            groups = self.optimizers[name].state_dict()["param_groups"]
            self.optimizers[name].load_state_dict({"state": states, "param_groups": groups})
            if role.carried is not None:
                role.carried.load_state_dict(files[f"{name}-carried"])
            if name in self.emas:
                ema = self.emas[name]
                ema.count = count[name]
                ema.shadow = {k: v.to(self.device) for k, v in files[f"{name}-ema"].items()}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the roles that keep an average have it in place of their weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, ema in self.emas.items():
            ema.swap(self.roles[name].net)

    def finish(self) -> None:
        """Replace the weights by their average, in roles that keep one."""
        for name, ema in self.emas.items():
            ema.copy_to(self.roles[name].net)
