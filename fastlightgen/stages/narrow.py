"""The width-pruned network that a method trains: measured on clips, cut out of the teacher's files.

Shapes: x_t [B, C, F, H, W]; t [B].
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fastlightgen.config import Checked, field
from fastlightgen.config.limits import MOST_CLIPS
from fastlightgen.data.source import Batch
from fastlightgen.engine import checkpoint
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.config import NetworkConfig
from fastlightgen.models.families import family_of, narrowed
from fastlightgen.models.folder.narrow import save_narrowed
from fastlightgen.models.folder.networks import config_of
from fastlightgen.models.width import Saliency, watched
from fastlightgen.parallel import ranks
from fastlightgen.parallel.log import say
from fastlightgen.parallel.shares import divisors
from fastlightgen.stages.build import Builder
from fastlightgen.stages.teacher import noised

DRAWS = 25  # the purpose of this file's random draws


@dataclass(kw_only=True)
class WidthKeys(Checked):
    """Keys of width pruning."""

    prune_ffn: float = field(
        0.5, "share of the feed-forward's neurons to drop, the same number in every block", lo=0, below=1, everyday=True
    )
    prune_heads: int = field(
        2,
        "heads to drop in every attention; stock diffusers then no longer loads the network",
        lo=0,
        everyday=True,
    )
    clips: int = field(64, "clips on which saliency is measured, rounded up to whole batches", lo=1, hi=MOST_CLIPS)
    start_model: str = field(
        "", "model folder of a pruned network to go on with, in place of pruning the teacher", everyday=True
    )


class Keys(Protocol):
    """The keys that this file reads."""

    run: str
    seed: int
    batch: int
    dtype: str
    engine: str
    allow_pt: bool
    sequence_parallel: int
    prune_ffn: float
    prune_heads: int
    clips: int
    start_model: str


def widths_left(cfg: Keys, network: NetworkConfig) -> tuple[int, int]:
    """Return the heads and the feed-forward's neurons that each block keeps."""
    heads, ffn = network.heads - cfg.prune_heads, round(network.ffn_width * (1 - cfg.prune_ffn))
    if heads < 1:
        raise ValueError(
            f"prune_heads={cfg.prune_heads}: the network has {network.heads} heads; "
            f"wanted at most {network.heads - 1}, or prune_heads=0 to keep them all"
        )
    if ffn < 1:
        raise ValueError(f"prune_ffn={cfg.prune_ffn}: leaves none of {network.ffn_width} neurons; give a smaller share")
    if heads % cfg.sequence_parallel:
        raise ValueError(
            f"prune_heads={cfg.prune_heads}: leaves {heads} heads, which sequence_parallel={cfg.sequence_parallel} "
            f"does not divide; drop another number, or give sequence_parallel one of {divisors(heads)}"
        )
    return heads, ffn


def student_config(cfg: Keys, teacher: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json of the student, whose depth may still be the teacher's."""
    if cfg.start_model:
        return config_of(cfg.start_model)
    return narrowed(teacher, *widths_left(cfg, family_of(teacher).settings(teacher)))


def narrow_folder(cfg: Keys, with_: Builder, net: VideoDiT, source: Path, keep: Sequence[int]) -> Path:
    """Return the folder of the pruned network; measure and write it, unless a checkpoint goes on from it."""
    heads, ffn = widths_left(cfg, net.cfg)
    stage = Path(cfg.run) / "stage2"
    out = stage / "start"
    made = (out / "config.json").is_file() and bool(checkpoint.steps(stage / "checkpoints"))
    if ranks.from_first(made):
        return out
    if with_.place is not None:
        with_.place(net)
    saliency = measured(cfg, net, with_.batches, keep)
    if ranks.rank() == 0:
        say(f"pruned: {heads} of {net.cfg.heads} heads, {ffn} of {net.cfg.ffn_width} neurons per block: {out}")
        card = with_.card(source=str(source), kept_blocks=list(keep))
        save_narrowed(source, out, keep, saliency, heads, ffn, cfg.allow_pt, **card)
    ranks.from_first(None)  # the others wait for the files
    return out


@torch.no_grad()
def measured(cfg: Any, net: VideoDiT, batches: Callable[[int], Batch], keep: Sequence[int]) -> Saliency:
    """Return the saliency of the network with the blocks `keep` alone, under its names, summed over all ranks.

    The inputs are those of training: noised clips with their prompts, one at a time.
    """
    # Every rank walks its clips alone. Ranks that share tokens hold the same clips, which scales all sums alike.
    sequence, net.sequence = net.sequence, None
    bfloat16 = cfg.engine == "local" and cfg.dtype == "bfloat16"
    with watched(net) as found, torch.autocast(net.device.type, torch.bfloat16, enabled=bfloat16):
        for step in range(math.ceil(cfg.clips / cfg.batch)):
            x_t, t, _, cond = noised(batches(step), cfg, cfg.seed, DRAWS, step)
            for i in range(len(t)):
                one = cond.map(lambda x, i=i: x[i : i + 1] if len(x) > 1 else x)  # type: ignore[misc]  # i is an int
                net(x_t[i : i + 1], t[i : i + 1], one, keep)
    net.sequence = sequence
    names = new_names(net, keep)
    return {names[name]: ranks.summed(value) for name, value in found.items()}


def new_names(net: VideoDiT, keep: Sequence[int]) -> dict[str, str]:
    """Map the names of the linear layers in the blocks `keep` to their names in a network with these blocks alone."""
    counts: dict[str, int] = {}
    names = {module: name for name, module in net.named_modules()}
    out: dict[str, str] = {}
    for index in sorted(keep):
        old = names[net.blocks[index]]
        group = old.rpartition(".")[0]  # one list of blocks of several
        new = f"{group}.{counts.get(group, 0)}"
        counts[group] = counts.get(group, 0) + 1
        out |= {name: new + name[len(old) :] for name in names.values() if name.startswith(f"{old}.")}
    return out
