"""Stage III's rollouts and times written out by hand, and stages in float64 to compare them with."""

import copy

import torch
from helpers import batches, config

from fastlightgen.models.lora import LoraLinear
from fastlightgen.rng import generator, normal_like
from fastlightgen.stages import distill
from fastlightgen.stages.build import Builder

DOUBLE = batches(2, torch.float64)
CPU = torch.device("cpu")


class DoubleSource:
    name, description = "test", {}

    def batch(self, step: int, size: int, rows=None):
        return batches(size, torch.float64)(step)


def built(cfg):
    """Build the stage as the train command does."""
    return distill.build(cfg, Builder(cfg, DoubleSource(), CPU))


def make(folders, *words: str, moved: float = 0.05):
    """Return a stage in float64 whose student and critic differ from the Stage II network."""
    stage = built(config(3, *folders, "lora_rank=3", *words))
    nets, gen = stage.nets, torch.Generator().manual_seed(1)
    for net in filter(None, (nets.student, nets.teacher, nets.fake_net, nets.original)):
        net.double()
    with torch.no_grad():
        for p in (*nets.student.parameters(), *nets.fake_trained.parameters()):
            p += moved * torch.randn(p.shape, generator=gen, dtype=p.dtype)
    return stage


def merged(nets):
    """Return the critic as a plain network: adapters multiplied into the weights, skipped blocks deleted."""
    net = copy.deepcopy(nets.fake_net)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoraLinear):
                child.base.weight.data += child.up.data @ child.down.data
                setattr(module, name, child.base)
    return net if nets.fake_keep is None else net.prune(nets.fake_keep)


def exit_rung(cfg, purpose, number, gen):
    if cfg.rungs == "random":
        return int(torch.randint(cfg.steps, (), generator=gen))
    order = torch.randperm(cfg.steps, generator=generator(0, 12, purpose, number // cfg.steps))
    return order.tolist()[number % cfg.steps]


def roll(stage, batch, gen, j):
    """Backward simulation by hand down to rung j; only the last network call carries gradient."""
    cfg, student = stage.cfg, stage.nets.student
    tau = [3 * u / (1 + 2 * u) for u in (1 - i / cfg.steps for i in range(cfg.steps))]
    noise = normal_like(batch.x0, gen)
    if cfg.rollout == "data":
        x = (1 - tau[j]) * batch.x0 + tau[j] * noise
    else:
        x = noise
        for i in range(j):
            v = student(x, tau[i], batch.cond).detach()
            if cfg.sampler == "ode":
                x = x + (tau[i + 1] - tau[i]) * v
            else:
                x = (1 - tau[i + 1]) * (x - tau[i] * v) + tau[i + 1] * normal_like(x, gen)
    return x - tau[j] * student(x, tau[j], batch.cond)


def source(cfg, c: int, number: int, gen):
    """Return the clips and the draws of a rollout: those of critic update c, or of the shared walk `number`."""
    return (DOUBLE(number), generator(0, 13, number)) if cfg.rollouts == "shared" else (DOUBLE(c), gen)


def times(stage, gen):
    u = torch.rand(2, generator=gen).clamp(1e-4, 1)
    shift = stage.cfg.score_shift or 3.0
    return (shift * u / (1 + (shift - 1) * u)).clamp(*stage.cfg.t_clamp)
