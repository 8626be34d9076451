"""Compare an export with stock diffusers before it counts as done: weights, one prediction, sampling times."""

from pathlib import Path

import torch
from torch import Tensor

from fastlightgen.models.base import VideoDiT
from fastlightgen.models.families import family_of
from fastlightgen.models.family import Family
from fastlightgen.pipelines.export import NETWORK, parts_of
from fastlightgen.pipelines.scheduler import TOLERANCE

LARGEST = 1e-5  # float32: limit of the largest difference; the two networks sum in different orders
SCALARS = ("timestep", "guidance")  # inputs up to 6000 that stay float32: bfloat16 would round their sinusoids' angles
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
def compare(model: VideoDiT, card: dict, folder: Path) -> dict:
    """Load the export strictly with stock diffusers, and compare its weights, one prediction and its scheduler.

    Returns the largest difference of the prediction and, for a student, the sampling times and their largest error.
    Raises ValueError that names the first thing that differs.
    """
    diffusers = need_diffusers()
    family, dtype = family_of(model.config), next(model.parameters()).dtype
    x_t, t, cond, _ = model.eval().example_inputs(batch=1, seed=0)
    inputs = family.stock_inputs(model.cfg, x_t, t, cond)
    v = model(x_t, t, cond).float()
    stock, found = getattr(diffusers, model.config_class).from_pretrained(
        folder / NETWORK, torch_dtype=dtype, output_loading_info=True, local_files_only=True
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
    report = {"difference": worst}
    # Load tokenizers, processors and scheduler through the pipeline class, without the large encoders.
    absent = {n: None for n, kind in parts_of(folder).items() if n == "vae" or "encoder" in n}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **absent, transformer=stock, local_files_only=True)
    if card.get("ladder"):
        report["sigmas"] = sigmas_of(pipe.scheduler, family, len(card["ladder"]))
        report["ladder_error"] = max(abs(a - b) for a, b in zip(report["sigmas"], card["ladder"], strict=True))
        if report["ladder_error"] > TOLERANCE:
            raise ValueError(f"{folder}: the scheduler steps at {report['sigmas']}, the model at {card['ladder']}")
    return report


def sigmas_of(scheduler, family: Family, steps: int) -> list[float]:
    """The sampling times that this family's stock pipelines make the scheduler use for `steps` steps."""
    if family.sets_sigmas:
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    else:
        scheduler.set_timesteps(steps)
    return scheduler.sigmas[:-1].tolist()
