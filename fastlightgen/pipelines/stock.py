"""Compare an export with stock diffusers before it counts as done: weights, one prediction, sampling times."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlightgen.models.base import VideoDiT
from fastlightgen.models.families import family_of
from fastlightgen.models.family import Family
from fastlightgen.models.folder.networks import config_of
from fastlightgen.models.folder.weights import load_model, read_json
from fastlightgen.parallel.log import say
from fastlightgen.pipelines.export import NETWORK, NETWORKS, parts_of
from fastlightgen.pipelines.scheduler import TOLERANCE

LARGEST = 1e-5  # float32: limit of the largest difference; the two networks sum in different orders
SCALARS = ("guidance",)  # an input up to 6000 that stays float32: bfloat16 would round its sinusoids' angles
# bfloat16: limit of the RMS difference relative to the output. It rounds every activation to 2^-9 relative. About 10
# roundings in each of 60 blocks add up like a random walk, to sqrt(600) 2^-9 = 5%. A misplaced block or a wrong scale
# changes the output by about 100%.
RELATIVE_BF16 = 0.05


def need_diffusers():
    """Import diffusers, or raise a ValueError that says how to install it."""
    try:
        import diffusers
        import transformers
    except ImportError as err:
        raise ValueError(f"{err.name} is not installed: pip install 'fastlightgen[video]'") from None
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    return diffusers


def is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@torch.no_grad()
def compare(model: VideoDiT, card: dict, folder: Path, part: str = NETWORK) -> dict:
    """Load the export strictly with stock diffusers, and compare its weights, one prediction and its scheduler.

    Returns the largest difference of the prediction and, for a student, the sampling times and their largest error.
    Raises ValueError that names the first thing that differs.
    """
    diffusers = need_diffusers()
    family, dtype = family_of(model.config), next(model.parameters()).dtype
    x_t, t, cond, _ = model.eval().example_inputs(batch=1, seed=0)
    t = (1000 * t).to(dtype).float() / 1000  # stock pipelines round 1000 t to the network's type; ours do not
    inputs = family.stock_inputs(model.cfg, x_t, t, cond)
    v = model(x_t, t, cond).float()
    stock, found = getattr(diffusers, model.config_class).from_pretrained(
        folder / part, torch_dtype=dtype, output_loading_info=True, local_files_only=True
    )
    if wrong := {k: list(v)[:3] for k, v in found.items() if v}:
        raise ValueError(f"{folder}: stock diffusers does not load the weights unchanged: {wrong}; please report this")
    for name, tensor in stock.state_dict().items():
        if not torch.equal(tensor.to(dtype), model.get_parameter(name).detach().to(tensor.device)):
            raise ValueError(f"{folder}: {name} differs from the model's; the disk may be failing, export again")
    inputs = {k: x.to(dtype) if k not in SCALARS and is_float(x) else x for k, x in inputs.items()}
    v_stock = stock.eval()(**inputs, return_dict=False)[0].float()
    given = model.cfg.given_frames  # predictions for them are unused
    v, v_stock = v[:, :, given:], v_stock[:, :, given:]
    worst = (v - v_stock).abs().max().item()
    limit = LARGEST if dtype == torch.float32 else RELATIVE_BF16 * v.square().mean().sqrt().item()
    measured = worst if dtype == torch.float32 else (v - v_stock).square().mean().sqrt().item()
    if not measured <= limit:
        raise ValueError(
            f"{folder}: the prediction of stock diffusers differs by {measured:.2g} (limit {limit:.2g}); "
            "the export is not usable, please report this"
        )
    # Load tokenizers, processors and scheduler through the pipeline class, without the large encoders.
    parts = parts_of(folder)
    own: dict[str, Any] = {n: None for n in parts if n in NETWORKS or "encoder" in n}
    own |= {n: hollow(folder / n, kind) for n, kind in parts.items() if n == "vae"} | {part: stock}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **own, local_files_only=True)
    return {"difference": worst} | compare_times(pipe.scheduler, card, family, folder)


def hollow(folder: Path, kind: str) -> Any:
    """A part without its weights: pipelines read its configuration. None for a class of another library."""
    found = getattr(need_diffusers(), kind, None)
    if found is None:
        return None
    with torch.device("meta"):
        return found.from_config(found.load_config(folder))


def say_not_stock(folder: Path) -> bool:
    """Return whether stock diffusers can load the network of a model folder; if it cannot, say so."""
    config = config_of(folder)
    settings = family_of(config).settings(config)
    if not settings.is_stock:
        say(
            f"warning: {folder}: has {settings.heads} of {config['num_attention_heads']} heads per attention, which "
            "stock diffusers cannot load; the export is for this package (fastlightgen.load_model, "
            "fastlightgen.generate). Feed-forward pruning alone (prune_heads=0) stays loadable"
        )
    return settings.is_stock


@torch.no_grad()
def compare_own(model: VideoDiT, card: dict, folder: Path, part: str = NETWORK) -> dict:
    """`compare` for a network that stock diffusers cannot load: this package loads the export back."""
    diffusers = need_diffusers()
    again = load_model(folder / part, dtype=next(model.parameters()).dtype)
    for name, value in again.named_parameters():
        if not torch.equal(value, model.get_parameter(name).detach().to(value.device)):
            raise ValueError(f"{folder}: {name} differs from the model's; the disk may be failing, export again")
    x_t, t, cond, _ = model.eval().example_inputs(batch=1, seed=0)
    report = {"difference": (model(x_t, t, cond) - again(x_t, t, cond)).abs().max().item()}
    if not card.get("ladder"):
        return report
    kind = read_json(folder / "model_index.json")["scheduler"][1]
    scheduler = getattr(diffusers, kind).from_pretrained(folder / "scheduler", local_files_only=True)
    return report | compare_times(scheduler, card, family_of(model.config), folder)


def compare_times(scheduler, card: dict, family: Family, folder: Path) -> dict:
    """The sampling times of a student's scheduler and their largest error; {} for other models."""
    if not card.get("ladder"):
        return {}
    sigmas = sigmas_of(scheduler, family, len(card["ladder"]))
    error = max(abs(a - b) for a, b in zip(sigmas, card["ladder"], strict=True))
    if error > TOLERANCE:
        raise ValueError(f"{folder}: the scheduler steps at {sigmas}, the model at {card['ladder']}")
    return {"sigmas": sigmas, "ladder_error": error}


def sigmas_of(scheduler, family: Family, steps: int) -> list[float]:
    """The sampling times that this family's stock pipelines make the scheduler use for `steps` steps."""
    if family.sets_sigmas:
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    else:
        scheduler.set_timesteps(steps)
    return scheduler.sigmas[:-1].tolist()
