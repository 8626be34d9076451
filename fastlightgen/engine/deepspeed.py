"""The engine for many processes: DeepSpeed shards optimizer states (zero=1), gradients (2) and weights (3).

The networks keep their own walk, which calls each block once for all streams. Under zero=3 DeepSpeed treats a block as
a leaf: it gathers the block's weights once for that call and once more in the backward pass.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlightgen.config import StageConfig
from fastlightgen.engine import checkpoint, shards
from fastlightgen.engine.hang import HERE, keeps_of, note_walks
from fastlightgen.engine.local import require_finite, schedule
from fastlightgen.engine.movement import Movement, realised
from fastlightgen.engine.roles import Role, Stage, Update, Values, named, title
from fastlightgen.engine.sharded_state import ShardedState
from fastlightgen.models.base import Block, VideoDiT
from fastlightgen.parallel import ranks
from fastlightgen.parallel.clock import clock
from fastlightgen.parallel.log import count, say
from fastlightgen.rng import share

BUCKET = 5e8  # elements per gradient reduction; DeepSpeed's default


def check_walk(net: VideoDiT, args: tuple) -> None:
    """Raise on all ranks if the streams of this walk would run different blocks on some rank."""
    ranks.agree("the blocks of a walk", (net.num_blocks, keeps_of(args)))


def start_graph(block: Block, args: tuple) -> tuple | None:
    """Pre-hook of the blocks of a frozen network with trained adapters: make the hidden states require a gradient.

    DeepSpeed reduces a block's gradients and releases its weights when the gradient of its inputs arrives. If no input
    needs a gradient, DeepSpeed releases the block too early, and the adapters of that block get no gradient.
    """
    training = [job for job in args[0] if any(job.grads)]
    if not (training and torch.is_grad_enabled()) or any(a.requires_grad for a in args if isinstance(a, Tensor)):
        return None
    x = training[0].state.x
    return tuple(a.detach().requires_grad_() if a is x else a for a in args)


class Runner(nn.Module):
    """The model that DeepSpeed sees. Its forward calls a loss, which may walk `net` any number of times."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, loss: Callable) -> Tensor:
        return loss()


class DeepSpeedEngine:
    """Trains float32 weights, or bfloat16 weights with float32 master weights; the ranks divide the batch."""

    state: ShardedState

    def __init__(self, device: torch.device, cfg: StageConfig):
        try:
            import deepspeed
        except ImportError:
            raise ValueError("engine=deepspeed: not installed; pip install 'fastlightgen[cluster]'") from None
        self.deepspeed, self.cfg, self.device = deepspeed, cfg, device
        self.dtype = getattr(torch, cfg.dtype)
        self.zero3 = cfg.zero == 3
        self.placed: list[nn.Module] = []
        # DeepSpeed's engines of frozen networks. Keep them: a garbage-collected engine removes its gather hooks.
        self.sharding: list[nn.Module] = []
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # by default every rank prints every setting
        logging.getLogger("deepspeed").setLevel(logging.ERROR)
        # For CPU ranks DeepSpeed would compile shared-memory collectives at the first start; gloo is enough here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.comm.init_distributed(dist_init_required=False)
        self.sequence = ranks.sequence_group(cfg.sequence_parallel, cfg.timeout)
        self.share, self.shares = ranks.shares(cfg.sequence_parallel)  # index of this rank's share of a batch; count

    def autocast(self) -> AbstractContextManager[object]:
        """Return a context that does nothing: the networks cast their inputs to the dtype of their weights."""
        return nullcontext()

    def prepare(self, stage: Stage) -> None:
        """Place the networks of a stage and create a DeepSpeed engine and an average for each role."""
        cfg = self.cfg
        self.iters = stage.iters
        self.accumulation = ranks.accumulation(cfg.batch, cfg.micro_batch, ranks.size(), cfg.sequence_parallel)
        say(
            f"batch: {cfg.batch} = {ranks.workers(self.shares, cfg.sequence_parallel)} x {self.accumulation} "
            f"micro-batches x {cfg.batch // self.shares // self.accumulation} clips"
        )
        for role in stage.roles.values():
            if role.carried is not None and self.dtype != torch.float32:
                # The change per step, (1 - decay) x difference, is below bfloat16's resolution.
                raise ValueError(
                    "target=ema: an average does not move in bfloat16; use dtype=float32 or another target"
                )
        engines = {name: self._trained(role, title(name, stage.roles)) for name, role in stage.roles.items()}
        averages = {
            name: [m.detach().clone() for m in shards.masters(engines[name].optimizer)]
            for name, role in stage.roles.items()
            if role.ema
        }
        self.state = ShardedState(self.device, stage.roles, engines, averages, dict.fromkeys(stage.roles, 0))
        self.movements = {
            name: Movement(role.net, cfg.seed) for name, role in stage.roles.items() if self.dtype != torch.float32
        }
        for net in [*stage.frozen, *(r.carried for r in stage.roles.values() if r.carried is not None)]:
            self.place(net)

    def place(self, net: VideoDiT, name: str = "the frozen network") -> None:
        """Place a network that only predicts: sharded under zero=3, otherwise complete on every rank."""
        if net in self.placed:
            return
        self._share_tokens(net)
        self.placed.append(net)
        HERE.at(f"placing {name}")
        net.to(dtype=self.dtype)
        if self.zero3:
            config = self._config(1.0, 1, net)
            self.sharding.append(self.deepspeed.initialize(model=self._leaves(net), config=config)[0])
        else:
            net.to(self.device)
        self._watch(net, name)

    def _trained(self, role: Role, name: str):
        """Create the DeepSpeed engine of one role. `apply` sets the learning rate at every step."""
        HERE.at(f"placing {name}")
        net = role.network
        self._share_tokens(net)
        net.to(dtype=self.dtype)
        params = [p for p in role.net.parameters() if p.requires_grad]
        optimizer = self._adamw(params, role)
        config = self._config(role.clip, self.accumulation, net) | {"zero_allow_untested_optimizer": True}
        config["zero_optimization"]["reduce_bucket_size"] = int(
            min(BUCKET, sum(shards.shape(p).numel() for p in params))
        )
        if role.host is not None and self.zero3:
            for block in net.blocks:
                block.register_forward_pre_hook(start_graph, prepend=True)
        engine = self.deepspeed.initialize(model=Runner(self._leaves(net)), optimizer=optimizer, config=config)[0]
        if self.dtype != torch.float32 and role.file_values is not None:
            self._fill_masters(role.net, role.file_values)
        self._watch(net, name)
        return engine

    def _fill_masters(self, net: nn.Module, values: Values) -> None:
        """Put the float32 values of a network's file into its master weights, one tensor at a time.

        DeepSpeed starts the masters at the weights rounded to bfloat16. There the rounding of a small change returns
        the old weight, until the changes add up to half a step of bfloat16.
        """
        trained = {key: p for key, p in net.named_parameters() if p.requires_grad}
        for key, value in values():
            HERE.at("reading the float32 weights")
            if key in trained:
                shards.put(trained.pop(key), value.to(self.device))
        assert not trained, f"the file gave no value for {list(trained)[:3]}"

    def _share_tokens(self, net: VideoDiT) -> None:
        """With sequence_parallel > 1, let the ranks of this group walk the network together."""
        if self.sequence is not None:
            self.sequence.attach(net)

    def _adamw(self, params: list[nn.Parameter], role: Role) -> torch.optim.Optimizer:
        """Create AdamW with lr=0, because DeepSpeed may take an empty step to allocate its states."""
        beta1, beta2 = role.betas
        keys: dict[str, Any] = {"lr": 0.0, "betas": (beta1, beta2), "weight_decay": role.weight_decay}
        if self.cfg.offload != "none" and self.device.type == "cuda":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(params, adamw_mode=True, **keys)
        return torch.optim.AdamW(params, **keys)

    def _leaves(self, net: nn.Module) -> nn.Module:
        """Under zero=3, let DeepSpeed gather each block as a unit. Return the network."""
        if self.zero3:
            kinds = list({type(m) for m in net.modules() if isinstance(m, Block)})
            self.deepspeed.utils.set_z3_leaf_modules(net, kinds, raise_if_not_found=False)
        return net

    def _config(self, clip: float, accumulation: int, net: VideoDiT) -> dict[str, Any]:
        """Return DeepSpeed's configuration of one network."""
        return {
            "train_micro_batch_size_per_gpu": 1,  # required; the stage divides the batch itself
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clip,
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            "zero_optimization": shards.zero_config(self.cfg, net, self.device),
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }

    def _watch(self, net: nn.Module, name: str) -> None:
        """Before every walk, compare its blocks across ranks: ranks that differ would wait in a gather for ever."""
        if isinstance(net, VideoDiT) and ranks.size() > 1:
            net.register_forward_pre_hook(check_walk, prepend=True)
            note_walks(net, name)

    def estimate(self) -> str:
        """Describe the trained parameters and how they are sharded, in one line."""
        parts = []
        for name, role in self.state.roles.items():
            trained = sum(shards.shape(p).numel() for p in role.net.parameters() if p.requires_grad)
            parts.append(f"{title(name, self.state.roles)} {count(trained)} parameters")
        cfg, what = self.cfg, ", ".join(parts) or "nothing"
        return f"trains {what} with DeepSpeed, {ranks.size()} ranks, zero={cfg.zero}, offload={cfg.offload}"

    def apply(self, update: Update, step: int) -> dict[str, float]:
        """Compute loss and gradient of every micro-batch, then clip and take one optimizer step.

        A loss or gradient norm that is not finite raises before the weights are saved. Returns the numbers to log.
        """
        state, name = self.state, update.role
        role, engine, said = state.roles[name], state.engines[name], title(name, state.roles)
        records: list[dict[str, float]] = []
        losses: list[float] = []
        for k in range(self.accumulation):
            HERE.at("forward", role=said)
            with clock.part("forward"), share(k * self.shares + self.share, self.shares * self.accumulation):
                loss = engine(lambda: self._loss(update, records))
                HERE.at("mean of the loss")
                losses.append(loss.item())
            value = ranks.mean([losses[-1]])[0]
            require_finite(value, "loss", said, step + 1)
            HERE.at("backward")
            with clock.part("backward"):
                engine.backward(loss)
            HERE.at("optimizer")
            if k + 1 < self.accumulation:
                engine.step()
        lr = role.lr * schedule(role, state.count[name], step, self.iters)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        with clock.part("optimizer"):
            engine.step()
            shards.note_change(role.net)
            norm = engine.get_global_grad_norm()
        if getattr(engine.optimizer, "overflow", False):
            norm = float("inf")
        require_finite(float(norm), "gradient norm", said, step + 1)
        state.count[name] += 1
        if name in state.averages:
            state.average(name)
        HERE.at("means of the records")
        keys = list(records[0])
        means = ranks.mean([sum(losses), *(sum(r[k] for r in records) for k in keys)])
        loss, *rest = (m / self.accumulation for m in means)
        record = {"loss": loss, "grad_norm": float(norm), "lr": lr} | dict(zip(keys, rest, strict=True))
        return named(record, name, state.roles)

    def measures(self) -> dict[str, float]:
        """With dtype=bfloat16, return the realised share of the movement of each role; see `movement.realised`."""
        if not self.movements:
            return {}
        shares = realised(list(self.movements.values()))
        return {f"{name}_realised": s for name, s in zip(self.movements, shares, strict=True) if s is not None}

    @staticmethod
    def _loss(update: Update, records: list[dict]) -> Tensor:
        loss, record = update.loss()
        records.append(record)
        return loss

    def save(self, folder: Path, step: int, keep: int, every: int, good: int = 0) -> checkpoint.Saving:
        return self.state.save(folder, step, keep, every, good)

    def load(self, folder: Path) -> int:
        return self.state.load(folder)

    def finish(self) -> None:
        self.state.finish()

    def save_model(self, net: VideoDiT, folder: Path, dtype: torch.dtype | None = None, **card: Any) -> None:
        self.state.save_model(net, folder, dtype, **card)
