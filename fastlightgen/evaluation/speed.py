"""Times whole clips by part, of our sampler and of stock diffusers: text and picture, the network, the VAE.

The stock pipeline gets the very tensors of our network and the same encoders, so that only the code differs. What is
counted (operations of the blocks) stands apart from what the clock says, with the reason for the difference.
"""

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

from fastlightgen.config import UserError
from fastlightgen.files.border import picture
from fastlightgen.models.base import Cond, VideoDiT
from fastlightgen.models.experts import Model, TwoExperts, networks_of, predictor
from fastlightgen.models.folder.experts import PIPELINE_PARTS
from fastlightgen.models.sample import Wish, num_evaluations, per_step, sample
from fastlightgen.pipelines.world import ENCODERS, Pipeline

PARTS = ("prompt", "network", "decode", "other")  # of a clip; prompt: text and picture


@dataclass
class Clip:
    """Seconds of one clip."""

    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    steps: list[float] = field(default_factory=list)

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def adds(self, part: str) -> Callable[[float], None]:
        """A function that adds seconds to a part."""

        def add(seconds: float) -> None:
            self.parts[part] += seconds

        return add


@dataclass
class Subject:
    """A model with its pipeline and plan; the stock pipeline is timed if it names diffusers' networks."""

    name: str
    net: Model
    world: Pipeline
    plan: dict[str, Any]
    stock: dict[str, Any] | None = None  # diffusers' networks with the same tensors, by their part of the pipeline
    clips: list[Clip] = field(default_factory=list)

    @property
    def each(self) -> int:
        """Network evaluations per step."""
        return per_step(self.plan, self.net.embeds_guidance)

    @property
    def evaluations(self) -> int:
        """Network evaluations per clip."""
        return num_evaluations(self.plan, self.net.embeds_guidance)

    def operations(self, shape: Sequence[int], cond: Cond) -> int:
        """Operations of the blocks per clip: of the network of each step."""
        x_t = torch.empty(shape, device="meta")
        per_step = {net: sum(net.block_flops(x_t, cond)) for net in networks_of(self.net)}
        return self.each * sum(per_step[predictor(self.net, t)] for t in self.plan["times"])


def now(device: torch.device) -> float:
    """The clock, when the GPU has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def own_clip(subject: Subject, prompt: str, negative: str, image: str, seed: int) -> Clip:
    """Time a clip of our sampler."""
    world, clip = subject.world, Clip()
    device = next(subject.net.parameters()).device
    world.nulls.clear()  # a stock pipeline encodes the null prompt anew, too
    start = now(device)
    wish = world.wish(prompt, negative if subject.plan["guidance"] != 1.0 else None, image, 1).to(device)
    clip.parts["prompt"] = now(device) - start
    ends = [now(device)]
    with ExitStack() as clocks:
        for net in networks_of(subject.net):
            clocks.enter_context(clocked(net, "_walk", device, clip.adds("network")))
        noise, tick = wish.start(seed, device), lambda: ends.append(now(device))
        x0 = sample(subject.net, wish.cond, wish.null, noise, **subject.plan, seed=seed, tick=tick)
    clip.steps = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    decoding = now(device)
    world.frames(x0)
    end = now(device)
    clip.parts["decode"] = end - decoding
    clip.parts["other"] = end - start - clip.total
    return clip


def stock_networks(model: Model) -> dict[str, Any]:
    """diffusers' networks with the tensors of ours, by their part of the pipeline."""
    return {part: stock_network(net) for part, net in zip(PIPELINE_PARTS, networks_of(model), strict=False)}


def stock_network(net: VideoDiT) -> Any:
    """diffusers' network with the tensors of ours, which are not copied."""
    import diffusers
    from accelerate import init_empty_weights

    config = {key: value for key, value in net.config.items() if not key.startswith("_")}
    with init_empty_weights(include_buffers=False):
        stock = getattr(diffusers, net.config_class)(**config)
    stock.load_state_dict(net.state_dict(), assign=True)
    return stock.to(next(net.parameters()).device).eval()


@contextmanager
def clocked(owner: Any, name: str, device: torch.device, note: Callable[[float], None]) -> Iterator[None]:
    """Time the calls of a method, if there is one."""
    if (call := getattr(owner, name, None)) is None:
        yield
        return

    def run(*args: Any, **keys: Any) -> Any:
        start = now(device)
        try:
            return call(*args, **keys)
        finally:
            note(now(device) - start)

    setattr(owner, name, run)
    try:
        yield
    finally:
        delattr(owner, name)  # the class's own method shows again


def stock_clip(subject: Subject, prompt: str, negative: str, image: str, seed: int) -> Clip:
    """Time a clip of diffusers' pipeline."""
    world, clip = subject.world, Clip()
    pipe, device = world.encoders.pipe, next(subject.net.parameters()).device
    stock = subject.stock or {}
    pipe.register_modules(**stock)
    if isinstance(subject.net, TwoExperts):
        pipe.register_to_config(boundary_ratio=subject.net.boundary)
    pipe.set_progress_bar_config(disable=True)
    height, width, frames = world.size
    call: dict[str, Any] = {"prompt": prompt, "height": height, "width": width, "num_frames": frames}
    call |= {"num_inference_steps": len(subject.plan["times"]), "generator": torch.Generator().manual_seed(seed)}
    call |= {"output_type": "np"}
    guidance = "guidance_scale" if subject.net.embeds_guidance else world.family.cfg_argument
    if world.family.guider:
        setattr(getattr(pipe, world.family.guider), guidance, subject.plan["guidance"])
    else:
        call[guidance] = subject.plan["guidance"]
    call |= {f"{guidance}_2": subject.plan["guidance_2"]} if "guidance_2" in subject.plan else {}
    if negative:
        call["negative_prompt"] = negative
    if image:
        call["image"] = picture(image).resize((width, height))

    ends: list[float] = []

    def step_ended(pipe: Any, step: int, t: Any, values: dict) -> dict:
        ends.append(now(device))
        return values

    start = now(device)
    with (
        torch.no_grad(),
        ExitStack() as clocks,
        clocked(pipe, "encode_prompt", device, clip.adds("prompt")),
        clocked(pipe, "encode_image", device, clip.adds("prompt")),
        clocked(pipe.vae, "encode", device, clip.adds("prompt")),
        clocked(pipe.vae, "decode", device, clip.adds("decode")),
    ):
        for net in stock.values():
            clocks.enter_context(clocked(net, "forward", device, clip.adds("network")))
        made = pipe(**accepted(pipe, call | {"callback_on_step_end": step_ended})).frames[0]
    total = now(device) - start
    if made.shape[1:3] != (height, width):
        raise UserError(
            f"size={height}x{width}x{frames}: {type(pipe).__name__} chose {made.shape[1]}x{made.shape[2]} for this "
            f"picture; give size={made.shape[1]}x{made.shape[2]}x{frames}"
        )
    # Its scheduler's own times may give a step to the other expert.
    subject.plan = subject.plan | {"times": [t / 1000 for t in pipe.scheduler.timesteps.tolist()]}
    clip.steps = [b - a for a, b in zip(ends, ends[1:], strict=False)]  # the first has no start
    clip.parts["other"] = total - clip.total
    return clip


def accepted(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a pipeline takes: some have no callback, or let the picture decide the size."""
    known = signature(pipe.__call__).parameters
    return {name: value for name, value in call.items() if name in known}


def timed(subjects: Sequence[Subject], turns: int, run: Callable[[Subject], Clip], tick: Callable[[], object]) -> None:
    """Time `turns` clips of every subject in turn, after one that does not count; every second turn goes backwards."""
    for subject in subjects:
        run(subject)
        tick()
    for turn in range(turns):
        for subject in subjects if turn % 2 == 0 else reversed(subjects):
            subject.clips.append(run(subject))
            tick()


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "low": min(values), "high": max(values)}


def measured(subject: Subject, wish: Wish) -> dict[str, Any]:
    """The record of a subject: seconds, parameters, counted operations."""
    # Stock pipelines compute the padding of the text as well; ours leave it out where the network allows that.
    cond = wish.cond if subject.stock is None else replace(wish.cond, text_len=None)
    parts = {part: spread([clip.parts[part] for clip in subject.clips]) for part in PARTS}
    operations = subject.operations(wish.shape, cond)
    return {
        "name": subject.name,
        "seconds": spread([clip.total for clip in subject.clips]),
        "parts": parts,
        "step": spread([s for clip in subject.clips for s in clip.steps or [clip.parts["network"]]]),
        "steps": len(subject.plan["times"]),
        "guidance": subject.plan["guidance"],
        "evaluations": subject.evaluations,
        "blocks": subject.net.num_blocks,
        "block_operations": operations,
        "operations_per_second": operations / parts["network"]["median"],
        "parameters": parameters(subject),
    }


def parameters(subject: Subject) -> dict[str, int]:
    """The number of parameters of each part."""
    pipe = subject.world.encoders.pipe
    found = {"network": sum(p.numel() for p in subject.net.parameters())}
    for name in (*ENCODERS, "vae"):
        if (part := getattr(pipe, name, None)) is not None:
            found[name] = sum(p.numel() for p in part.parameters())
    return found


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Bytes, and of what."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "of the GPU, all networks loaded"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "of the process, all networks loaded"


def compared(slow: dict[str, Any], fast: dict[str, Any]) -> dict[str, Any]:
    """The speedup of one record over another: counted, of the network, of a clip, and why the last is not the first."""
    counted = slow["block_operations"] / fast["block_operations"]
    network = slow["parts"]["network"]["median"] / fast["parts"]["network"]["median"]
    clip = slow["seconds"]["median"] / fast["seconds"]["median"]
    own, theirs = (sum(r["parts"][p]["median"] for p in PARTS if p != "network") for r in (fast, slow))
    # What the counted ratio gives for a clip if all else takes as long as it did (Amdahl's law).
    possible = (slow["parts"]["network"]["median"] + theirs) / (slow["parts"]["network"]["median"] / counted + own)
    share = own / (own + fast["parts"]["network"]["median"])
    rates = [r["operations_per_second"] / 1e9 for r in (slow, fast)]
    reason = (
        f"counted {counted:.1f}x, a clip {clip:.1f}x: {own:.3g} s of {fast['seconds']['median']:.3g} s ({share:.0%}) "
        f"are text, picture, VAE and the rest, which stay as they are, so that the count gives {possible:.1f}x; "
        f"the network alone was {network:.1f}x faster, at {rates[1]:.3g} against {rates[0]:.3g} GFLOP/s in its blocks"
    )
    return {"counted": counted, "network": network, "clip": clip, "possible": possible, "reason": reason}


def table(records: Sequence[dict[str, Any]]) -> list[str]:
    """The lines that are printed of the records. M params: the network's, in millions; all M: with encoders and VAE."""
    titles = ("", "clip s", "range", "step s", *(f"{part} s" for part in PARTS), "TFLOP", "M params", "all M")
    rows = []
    for r in records:
        clip, sizes = r["seconds"], (r["parameters"]["network"], sum(r["parameters"].values()))
        numbers = [f"{r['parts'][part]['median']:.3g}" for part in PARTS]
        rows.append(
            (r["name"], f"{clip['median']:.3g}", f"{clip['low']:.3g}-{clip['high']:.3g}", f"{r['step']['median']:.3g}",
             *numbers, f"{r['block_operations'] / 1e12:.3g}", *(f"{count / 1e6:.4g}" for count in sizes))
        )  # fmt: skip
    widths = [max(len(row[i]) for row in (titles, *rows)) for i in range(len(titles))]
    cells = [[cell.rjust(w) for cell, w in zip(row, widths, strict=True)] for row in (titles, *rows)]
    return ["  ".join([row[0].strip().ljust(widths[0]), *row[1:]]) for row in cells]


def random_picture(folder: Path, height: int, width: int) -> str:
    """Write a picture to start from: its content does not change the time."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (height, width, 3), generator=draw, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(folder / "first.png")
    return str(folder / "first.png")
