"""What the folders of `export to=onnx` and `to=executorch` share: the step, its settings and inputs, other files."""

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlightgen.atomic import claimed, naming, put, write_json, write_text
from fastlightgen.config import UserError
from fastlightgen.files.border import read_text
from fastlightgen.models.base import Cond, VideoDiT
from fastlightgen.models.families import family_of
from fastlightgen.models.folder.manifest import verify_files, write_manifest
from fastlightgen.pipelines.comfyui import shown_card
from fastlightgen.pipelines.step_readme import readme
from fastlightgen.pipelines.world import read_size
from fastlightgen.world.builtin import BuiltIn
from fastlightgen.world.captions import TOKENS, WORDS
from fastlightgen.world.codec import LOW_MEAN, SCALE, Codec
from fastlightgen.world.shapes import WORLD

MOST_FLOPS = 4e12  # of a step that is run for a comparison: minutes on a few cores


class Step(nn.Module):
    """One evaluation of a network, as a function of tensors alone."""

    def __init__(self, model: VideoDiT, names: list[str], guidance: float):
        super().__init__()
        self.model, self.names, self.guidance = model, names, guidance

    def forward(self, x_t: Tensor, t: Tensor, *given: Tensor) -> Tensor:
        cond = family_of(self.model.config).cond(**dict(zip(self.names, given, strict=True)))
        if self.model.embeds_guidance:
            cond = replace(cond, guidance=t.new_full((1,), self.guidance))
        out = self.model(x_t, t, cond)
        assert isinstance(out, Tensor)
        return out


def settings_of(model: VideoDiT, card: dict, size: str, world: bool, to: str = "onnx") -> dict[str, Any]:
    """fastlightgen.json of the folder, without its inputs; raise for a student that a step alone cannot sample."""
    if not card.get("ladder"):
        raise UserError(f"to={to}: wanted a student of Stage III, whose few steps generate.py takes")
    guidance = float(card.get("guidance") or 1.0)
    if guidance != 1.0 and not model.embeds_guidance:
        raise UserError(
            f"to={to}: this student takes guidance {guidance:g}, two predictions per step, and generate.py makes one; "
            "use to=comfyui or to=diffusers"
        )
    out = shown_card(model, card) | {"guidance": guidance, "sampler": card.get("sampler", "ode")}
    if world:
        shapes = BuiltIn(size).shapes
        out |= {"fps": BuiltIn.fps, "size": f"{shapes.size}x{shapes.size}x{shapes.frames}"}
        latent = [1, Codec.channels, shapes.frames, *2 * [shapes.size // Codec.stride]]
        language = {"words": list(WORDS), "tokens": TOKENS, "low_mean": LOW_MEAN, "scale": SCALE}
        return out | {"latent": latent, "world": language | {"version": WORLD, "enlarge": BuiltIn.scale}}
    family = family_of(model.config)
    clips = family.clips.of(card)
    height, width, frames = read_size(size or clips.size, family.geometry)
    latent = [1, family.geometry.channels, *family.geometry.latent(height, width, frames)]
    return out | {"fps": round(clips.fps), "size": f"{height}x{width}x{frames}", "latent": latent}


def example(model: VideoDiT, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Random inputs of the step, by name, in the shapes that it will take."""
    family = family_of(model.config)
    frames, height, width = settings["latent"][2:]
    x_t, t, cond, _ = model.example_inputs(batch=1, seed=0, size=(frames, height, width))
    given = {name: value for name, value in vars(replace(cond, guidance=None)).items() if value is not None}
    if "world" in settings:  # its conditions have no fields of a family's own
        known = {f.name for f in fields(Cond)}
        given, tokens = {name: value for name, value in given.items() if name in known}, {"text": TOKENS}
    else:
        tokens = family.encoding(Path(), None, model.cfg, cond.image is not None, torch.device("cpu")).tokens
    g = torch.Generator().manual_seed(0)
    given |= {name: torch.randn(1, n, given[name].shape[2], generator=g) for name, n in tokens.items() if name in given}
    return {"x_t": x_t, "t": t} | given


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' own notes."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into; it gets a manifest and becomes OUT where no error ends the context."""
    out.parent.mkdir(parents=True, exist_ok=True)
    made = out.with_name(f".{out.name}.tmp")
    with claimed(out.with_name(f".{out.name}.lock"), wait=False), naming(made):
        shutil.rmtree(made, ignore_errors=True)  # of a process that was killed
        made.mkdir()
        try:
            yield made
            write_manifest(made, {})
            verify_files(made)
            put(made, out)
        finally:
            shutil.rmtree(made, ignore_errors=True)


def finish(made: Path, settings: dict[str, Any], stored: int, attention: int = 0, executorch: str = "") -> None:
    """Write the files beside the step; `stored`: its bytes; the rest: see `readme`."""
    write_json(made / "fastlightgen.json", settings)
    write_text(made / "generate.py", read_text(Path(__file__).with_name("step_generate.py")))
    write_text(made / "README.md", readme(settings, stored, attention, executorch))
