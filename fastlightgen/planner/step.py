"""What one iteration of each stage runs and holds: the walks of `teacher`, `rank`, `prune` and `distill`, as costs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastlightgen.blocks import num_dropped
from fastlightgen.models.cost import Network
from fastlightgen.planner.walk import Path, WalkCost, walk


@dataclass(frozen=True)
class Pass:
    """One walk: of which network, and how often in an iteration, on the average."""

    net: str
    cost: WalkCost
    times: float = 1.0


@dataclass
class StepCost:
    """An iteration: its walks, the networks that it holds, and the optimizer steps that it takes."""

    net: Network  # the largest network: what one of its blocks needs bounds all of them
    passes: list[Pass] = field(default_factory=list)
    trained: dict[str, int] = field(default_factory=dict)  # parameters by role
    frozen: dict[str, int] = field(default_factory=dict)
    updates: dict[str, float] = field(default_factory=dict)  # optimizer steps in an iteration

    def total(self, key: str) -> float:
        """Sum over an iteration of one number of its walks."""
        return sum(p.times * getattr(p.cost, key) for p in self.passes)

    def activations(self, size: int) -> "Activations":
        """The largest of its walks, in bytes per sample; `size`: bytes of a number in the compute type."""
        grad = [p.cost for p in self.passes if p.cost.grad_calls]
        kept = max((cost.kept_bytes(size) for cost in grad), default=0.0)
        again = max(b.saved.bytes(size) for b in self.net.blocks) - self.net.last.bytes(size)
        block = max(b.gradients for b in self.net.blocks) * size if grad else 0.0
        if any(cost.boundaries for cost in grad):
            block += again
        forks = max((p.cost.forks for p in self.passes), default=0)
        states = 2 * forks * self.net.hidden * size  # x and y of a state, its sum left to the next block
        return Activations(kept, block, states, self.without_gradient(size) if len(grad) < len(self.passes) else 0.0)

    def without_gradient(self, size: int) -> float:
        """Bytes alive at the widest moment of a walk of one stream without gradient."""
        return max(b.working + b.prompt_saved.narrow for b in self.net.blocks) * size


@dataclass(frozen=True)
class Activations:
    """Bytes per sample: kept for a backward pass, one block in that pass, states of forks, one block without gradient.

    Backward passes follow each other, so the largest counts. A walk without gradient may run while tensors are kept.
    """

    kept: float
    block: float
    forks: float
    working: float


def dropped(blocks: int, ratio: float, prefix: int) -> list[int]:
    """The blocks that `ratio` drops: a band from `prefix` on (-1: in the middle, where the paper's Fig. 4 has it)."""
    count = num_dropped(blocks, ratio)
    start = (blocks - count) // 2 if prefix < 0 else prefix
    if start + count > blocks:
        raise ValueError(
            f"prefix={prefix}: {count} blocks are dropped from there, but the network has {blocks}; "
            f"wanted at most {blocks - count}"
        )
    return list(range(start, start + count))


def step_cost(stage: int, net: Network, drop: Sequence[int], cfg) -> StepCost:
    """The iteration of a stage; `cfg` holds the stage's own keys and the critic's as `critics`."""
    keep = [i for i in range(len(net.blocks)) if i not in drop]
    if stage == 0:
        return teacher(net, cfg)
    if stage == 1:
        return rank(net, cfg)
    return prune(net, keep, cfg) if stage == 2 else distill(net, keep, cfg)


def teacher(net: Network, cfg) -> StepCost:
    step = StepCost(net, trained={"teacher": net.params}, updates={"teacher": 1})
    step.passes = [Pass("teacher", grad_walk(net, [Path(grad=True)], cfg))]
    return step


def grad_walk(net: Network, paths: list[Path], cfg, rank: int = 0) -> WalkCost:
    return walk(net, paths, cfg.checkpointing, cfg.keep_attention, rank)


def rank(net: Network, cfg) -> StepCost:
    """One batch of clips at one time: every block skipped alone and none skipped, in groups of `memory` GiB."""
    n = len(net.blocks)
    size = 4 if cfg.engine == "local" or cfg.dtype == "float32" else 2  # of a weight
    group = max(1, int(cfg.memory * 2**30 / (2 * cfg.batch * net.hidden * size)))
    paths = [Path(keep=[j for j in range(n) if j != i]) for i in range(n)] + [Path()]
    step = StepCost(net, frozen={"model": net.params})
    step.passes = [Pass("model", walk(net, paths[i : i + group])) for i in range(0, n + 1, group)]
    return step


def prune(net: Network, keep: list[int], cfg) -> StepCost:
    """Stage II: the pruned and the unpruned path in one walk, and a fixed target unless it is the unpruned path."""
    own = cfg.target == "self"
    kappa = 0.0 if own else cfg.kappa_unpruned
    grad_u = kappa * cfg.alpha > 0 or cfg.alpha < 1
    still = cfg.alpha == 1 and kappa == 0  # then the dropped blocks do not train
    trained = net.prune(keep).params if still else net.params
    step = StepCost(net, trained={"student": trained}, updates={"student": 0})
    step.frozen = {"dropped blocks": net.params - trained} if still else {}
    coins = [(True, 1.0)] if cfg.estimator == "full" else [(True, cfg.p), (False, 1 - cfg.p)]
    for skip, share in coins:
        trains_u = grad_u and (cfg.estimator == "full" or not skip)
        if not skip and not grad_u:
            continue
        paths = [Path(keep=keep, grad=True)] * skip + [Path(grad=trains_u)] * (trains_u or own)
        step.passes.append(Pass("student", grad_walk(net, paths, cfg), share))
        step.updates["student"] += share
        if not own:
            step.passes.append(Pass("target", walk(net, [Path()]), share))
    if not own:
        step.frozen["target"] = net.params
    return step


def distill(net: Network, keep: list[int], cfg) -> StepCost:
    """Stage III: rollouts with early exit, the student under the well-guided teacher (Eq. 9), the critic."""
    student = net.prune(keep)
    fake_keep = keep if cfg.fake_arch == "pruned" else None
    lora = cfg.fake_mode == "lora"
    fake, fake_keep = (net, fake_keep) if lora or fake_keep is None else (student, None)
    generators, critics = (1 / cfg.critics, 1) if cfg.count == "outer" else (1, cfg.critics)
    early = (cfg.steps - 1) / 2 if cfg.rollout == "simulate" else 0  # steps before the exit, on the average

    step = StepCost(net, updates={"student": generators, "fake": critics})
    step.trained = {"student": student.params, "fake": fake.params}
    step.frozen = {"teacher": net.params} | ({"original": net.params} if cfg.strong == "original" else {})
    if lora:  # every block has adapters; those of blocks that the critic skips never train
        step.trained["fake"] = net.prune(fake_keep or range(len(net.blocks))).adapters(cfg.lora_rank)
        step.frozen["idle adapters"] = net.adapters(cfg.lora_rank) - step.trained["fake"]

    free = walk(student, [Path()])
    weak, strong = [Path(keep=keep), Path(1, keep, kept_text=True)], Path()
    real = [*weak, strong] if cfg.strong == "stage2" else weak
    adapters = cfg.lora_rank if lora else 0
    fake_free = walk(fake, [Path(keep=fake_keep)], rank=adapters)
    fake_grad = grad_walk(fake, [Path(keep=fake_keep, grad=True)], cfg, adapters)
    step.passes = [
        Pass("student", free, generators * early + critics * (early + 1)),
        Pass("student", grad_walk(student, [Path(grad=True)], cfg), generators),
        Pass("fake", fake_free, generators),
        Pass("teacher", walk(net, real), generators),
        Pass("fake", fake_grad, critics),
    ]
    if cfg.strong == "original":
        step.passes.append(Pass("original", walk(net, [strong]), generators))
    return step
