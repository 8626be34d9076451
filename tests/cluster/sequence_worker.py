"""Compare walks whose tokens are shared by groups of ranks with walks of one process; rank 0 writes the results.

python -m torch.distributed.run --nproc-per-node 4 sequence_worker.py RESULTS.json
"""

import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import NETWORK, counted

from fastlightgen.config import preset
from fastlightgen.models.base import Stream, VideoDiT
from fastlightgen.models.folder.weights import build
from fastlightgen.parallel import ranks

HEADS = {"num_attention_heads": 4, "attention_head_dim": 8}
WAN = NETWORK | HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 4}
HUNYUAN = preset("tiny-hunyuan")["network"] | HEADS | {"rope_axes_dim": [4, 2, 2]}
HUNYUAN |= {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2}
HUNYUAN15 = preset("tiny-hunyuan15")["network"] | HEADS | {"rope_axes_dim": [4, 2, 2]}
HUNYUAN15 |= {"in_channels": 9, "out_channels": 4, "num_layers": 4}
NETWORKS = {
    "wan t2v": WAN,
    "wan i2v": WAN | {"in_channels": 9, "image_dim": 16, "added_kv_proj_dim": 32},
    "wan ti2v": WAN | {"expand_timesteps": True},
    "hunyuan t2v": HUNYUAN | {"image_condition_type": None},
    "hunyuan token replace": HUNYUAN | {"image_condition_type": "token_replace"},
    "hunyuan15 i2v": HUNYUAN15 | {"task_type": "i2v"},
}
# name -> ranks per group, latent (F, H, W), batch, dtype, checkpointing, blocks that keep their attention
CASES = {
    "two ranks": (2, (2, 6, 10), 1, "float32", False, 0),  # 3 x 5 patches: 3 + 2 columns
    "four ranks, checkpointing": (4, (2, 12, 10), 2, "float32", True, 2),  # 6 x 5 patches: 2 + 2 + 1 + 1 rows
    "four ranks, float64": (4, (2, 6, 10), 1, "float64", False, 0),  # 2 + 1 + 1 + 1 columns
    "two ranks, checkpointing, float64": (2, (2, 10, 6), 2, "float64", True, 0),  # 3 + 2 rows
}


def streams(cond, null) -> list[Stream]:
    """Return streams with different blocks, with and without gradient; some share a prefix of blocks."""
    return [
        Stream(cond, [0, 3], grad=True),
        Stream(null, [0, 1, 3]),
        Stream(cond, None, grad=True),
        Stream(null, [1, 2, 3], grad=True),
    ]


def inputs(net: VideoDiT, batch: int, seed: int, size: tuple[int, int, int], dtype: torch.dtype):
    """Return the inputs of one group. HunyuanVideo's texts differ in length, so that a batch of two needs a mask."""
    x_t, t, cond, null = net.example_inputs(batch, seed, size)

    def to(v: Tensor) -> Tensor:
        return v.to(dtype) if v.is_floating_point() else v

    cond = cond.map(to)
    # One image for both prompts, so that Wan shares the walk up to the text.
    return to(x_t), t, cond, replace(null.map(to), image=cond.image)


def run(net: VideoDiT, given: list) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return v of every stream and input, and the gradients of the mean loss over the inputs."""
    net.zero_grad()
    out = []
    for x_t, t, cond, null in given:
        made = net.walk(x_t, t, streams(cond, null))
        weights = torch.randn(made[0].shape, generator=torch.Generator().manual_seed(5)).to(x_t)
        (sum((weights * v).sum() for v in made if v.requires_grad) / len(given)).backward()
        with torch.no_grad():
            out += [*(v.detach() for v in made), net(x_t, t, cond, [1, 2])]
    return out, {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in net.named_parameters()}


@contextmanager
def exchanges(note):
    """Inside this context, call `note` with the result of every exchange and the rows received from each rank."""
    real = dist.all_to_all_single

    def noting(out, x, received, sent, group):
        note(out, received)
        return real(out, x, received, sent, group=group)

    dist.all_to_all_single = noting
    yield
    dist.all_to_all_single = real


def apart(a: Tensor, b: Tensor, scale: float) -> float:
    return float((a - b).abs().max() / scale)


def compare(name: str, case: tuple) -> dict:
    """Return the largest differences of v and of the gradients, relative to the largest entry."""
    size, latent, batch, dtype, checkpointing, kept = case
    dtype, group = getattr(torch, dtype), ranks.sequence_group(size, 900.0)
    net = build(NETWORKS[name], seed=0).to(dtype)
    net.checkpointing, net.keep_attention = checkpointing, kept
    index, count = ranks.shares(size)
    given = [inputs(net, batch, seed, latent, dtype) for seed in range(count)]

    group.attach(net)
    net.block_calls, order = 0, []
    with exchanges(lambda out, _: order.append(tuple(out.shape[1:]))):
        parts, grads = run(net, given[index : index + 1])
    calls, net.sequence = net.block_calls, None
    orders = ranks.gathered(ranks.digest(order))
    alike = ranks.gathered(ranks.digest([v.tolist() for v in parts]))
    for grad in grads.values():
        dist.all_reduce(grad)
        grad /= ranks.size()
    grads = {k: g.clone() for k, g in grads.items()}

    if ranks.rank():
        return {}
    net.block_calls = 0
    whole, wanted = run(net, given)
    largest = max(float(g.abs().max()) for g in wanted.values())
    own = {k: apart(grads[k], g, float(g.abs().max())) for k, g in wanted.items() if float(g.abs().max()) > 1e-6}
    return {
        "v": max(apart(a, b, float(b.abs().max())) for a, b in zip(parts, whole[: len(parts)], strict=True)),
        "predictions": len(set(alike)),
        "orders": len(set(orders)),
        "exchanges": len(order),
        "gradients": max(apart(grads[k], g, largest) for k, g in wanted.items()),
        "own": max(own.values()),
        "worst": max(own, key=own.get),
        "tensors": len(wanted),
        "left": [key for key in wanted if key not in own],
        "calls": calls / (net.block_calls / count),
    }


def received(name: str) -> list[int]:
    """Return how many numbers each of four ranks receives from the others in one block, without gradient."""
    net, group = build(NETWORKS[name], seed=0), ranks.sequence_group(4, 900.0)
    group.attach(net)
    got: list[int] = []
    x_t, t, cond, _ = inputs(net, 1, 0, (2, 12, 10), torch.float32)

    def others(out: Tensor, received: list[int]) -> None:
        got.append(out[0].numel() * (sum(received) - received[ranks.rank()]))

    with torch.no_grad(), exchanges(others):
        net.walk(x_t, t, [Stream(cond, [3])])
    return ranks.gathered(sum(got[:2]))  # the third exchange joins the prediction


def operations(name: str) -> list[int]:
    """Return the operations of a forward and backward pass on each of four ranks; two have twice as many tokens."""
    net, group = build(NETWORKS[name], seed=0), ranks.sequence_group(4, 900.0)
    group.attach(net)
    x_t, t, cond, _ = inputs(net, 1, 0, (2, 12, 10), torch.float32)
    return ranks.gathered(counted(lambda: net(x_t, t, cond).sum().backward()))


def main(results: Path) -> None:
    torch.set_num_threads(1)
    ranks.join(torch.device("cpu"), 900)
    done = {f"{name}, {case}": compare(name, CASES[case]) for name in NETWORKS for case in CASES}
    done["wire"] = {name: received(name) for name in ("wan t2v", "hunyuan t2v")}
    done["operations"] = {name: operations(name) for name in ("wan i2v", "hunyuan t2v")}
    if ranks.rank() == 0:
        results.write_text(json.dumps(done))
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
