"""Advice about a run that does not fit its machine or takes more than a week: recipes, other machines, fewer steps."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fastlightgen.config import GPUS, Plan, Recipe, load, preset, recipes
from fastlightgen.models.cost import Network
from fastlightgen.models.folder.released import preset_of, sampling
from fastlightgen.planner.budget import Budget, budget, load_network
from fastlightgen.planner.remedies import remedies, words

WEEK = 7  # days
MOST = 64  # GPUs to think about


def recipe_plan(recipe: Recipe, model: str, stage: str) -> tuple[Plan, Budget]:
    """The plan of a stage by a recipe; `model`: a preset."""
    plan: Plan = load([f"stage={stage}", recipe.word, f"model={model}"], "plan")
    plan = replace(plan, size=plan.size or sampling(model).values["size"])
    return plan, budget(load_network(preset(model)["network"], plan.size, plan.text_tokens), plan)


def recipes_of(model: str) -> list[Recipe]:
    """The recipes for a preset, or for the preset with the network of a folder."""
    try:
        name = preset_of(model)
    except ValueError:  # no network; whoever loads it says so
        return []
    return [r for r in recipes() if name in r.models]


def recipe_for(model: str, plan: Plan) -> str:
    """Name the recipe that uses most of the planned machine, or the smallest machine that has one; "" without any."""
    if plan.gpu not in GPUS:
        return ""
    known, room = recipes_of(model), GPUS[plan.gpu].memory
    here = [r for r in known if r.gpus <= plan.gpus and GPUS[r.gpu].memory <= room]
    if here:
        best = max(here, key=lambda r: (r.gpus, GPUS[r.gpu].memory))
        own = best.size or sampling(model).values["size"]
        size = own if plan.size and plan.size != own else best.size  # the model's own size goes without saying
        return f"{best.word} is made for {replace(best, size=size).machine}"
    if not known:
        return ""
    least = min(known, key=lambda r: (r.gpus, GPUS[r.gpu].memory))
    return f"the smallest machine with a recipe is {least.machine}: {least.word}"


def fitted(net: Network, plan: Plan, room: float, whole: bool = False) -> tuple[str, Budget] | None:
    """The keys to change until a plan fits, and the plan with them; None if no keys suffice.

    `whole`: the student's own weights go on training, not adapters.
    """
    last, changes = budget(net, plan), dict[str, Any]()
    for change, after in remedies(net, plan, room):
        if whole and "student_mode" in change:
            break
        changes |= change
        last = after
    return (words(changes), last) if last.peak < room else None


def machines(net: Network, plan: Plan) -> Iterator[str]:
    """Name the fewest GPUs of the planned kind, and the smallest other kind, on which the run fits with all weights."""
    most = MOST if plan.stage == "1" else plan.clips_per_step  # each GPU has at least one clip
    for gpus in (2**n for n in range(1, 7) if plan.gpus < 2**n <= most):
        trial = replace(plan, gpus=gpus, gpus_per_node=8, engine="deepspeed")
        if found := fitted(net, trial, GPUS[plan.gpu].memory, whole=True):
            yield f"gpus={gpus} {found[0]}".rstrip() + f": {found[1].peak / 1e9:.1f} GB on each"
            break
    larger = [(kind, gpu.memory) for kind, gpu in GPUS.items() if gpu.memory > GPUS[plan.gpu].memory]
    for kind, memory in sorted(larger, key=lambda k: k[1]):
        if found := fitted(net, replace(plan, gpu=kind), memory, whole=True):
            yield f"gpu={kind} {found[0]}".rstrip() + f": {found[1].peak / 1e9:.1f} of {memory / 1e9:.0f} GB"
            break


def faster(net: Network, plan: Plan, b: Budget, model: str) -> Iterator[str]:
    """Name what makes a run of more than a week shorter: recipes, more GPUs, and how much of it a week holds."""
    if b.days <= WEEK:
        return
    for recipe in recipes_of(model):
        days = recipe_plan(recipe, preset_of(model), plan.stage)[1].days
        if days < 0.9 * b.days:
            yield f"{recipe.word}: {days:.1f} days on {recipe.machine}"
    gpus = plan.gpus
    while gpus < MOST and plan.gpu in GPUS:
        gpus *= 2
        together = max(plan.sequence_parallel, gpus // plan.clips_per_step) if plan.stage != "1" else 1
        if gpus % together or net.heads % together:
            continue
        trial = replace(plan, engine="deepspeed", gpus=gpus, gpus_per_node=8, sequence_parallel=together, micro_batch=1)
        more = budget(net, trial)
        if more.days <= WEEK and more.peak < GPUS[plan.gpu].memory:
            change = {"gpus": gpus, "sequence_parallel": together}
            yield f"{words({k: v for k, v in change.items() if v != getattr(plan, k)})}: {more.days:.1f} days"
            break
    key = "iters" if "iters" in vars(plan) else "clips"
    part = max(1, int(vars(plan)[key] * WEEK / b.days))
    yield f"{key}={part}: a week, for {part / vars(plan)[key]:.0%} of the run"
