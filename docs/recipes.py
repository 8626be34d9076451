"""The tables of docs/real-models.md about recipes, from the planner: `python docs/recipes.py` writes them anew."""

from pathlib import Path

from fastlightgen.config import GPUS, Plan, Recipe, load, preset, recipes
from fastlightgen.models.folder.released import sampling
from fastlightgen.planner.advice import WEEK, faster, fitted, recipe_plan, recipes_of
from fastlightgen.planner.budget import load_network

PAGE = Path(__file__).with_name("real-models.md")
MARKS = "<!-- planned: docs/recipes.py -->\n", "<!-- end -->\n"
MACHINES = (("4090", 1), ("h100", 1), ("h100", 8))  # those of which some have no recipe for a model
STAGES = ("1", "2", "3")


def rows(recipe: Recipe) -> str:
    """One line about a recipe; of several models it takes the largest numbers."""
    found = [[recipe_plan(recipe, model, stage) for stage in STAGES] for model in recipe.models]
    clips = {plan.size for plans in found for plan, _ in plans}
    stages = [[plans[i][1] for plans in found] for i in range(len(STAGES))]
    memory = ", ".join(f"{max(b.peak for b in budgets) / 1e9:.0f}" for budgets in stages)
    host = max(b.host_peak for budgets in stages for b in budgets) / 1e9
    days = ", ".join(short(max(b.days for b in budgets)) for budgets in stages)
    models = ", ".join(map(named, recipe.models))
    machine = f"{recipe.gpus} x {recipe.gpu} | {' '.join(clips)}"
    return f"| `{recipe.name}` | {models} | {machine} | {memory} | {host:.0f} | {days} |"


def long_one(recipe: Recipe) -> str:
    """One line about a recipe with a stage of more than a week: what makes it shorter; "" if there is none."""
    found = {model: [recipe_plan(recipe, model, stage) for stage in STAGES] for model in recipe.models}
    model = max(found, key=lambda name: sum(b.days for _, b in found[name]))  # the slowest
    cells, network = [], preset(model)["network"]
    for plan, b in found[model][1:]:
        ways = list(faster(load_network(network, plan.size, plan.text_tokens), plan, b, model))
        pairs = (way.partition(": ") for way in ways if "config=" not in way)
        shown = "; ".join(f"`{keys}`: {result}" for keys, _, result in pairs)
        cells.append(f"{short(b.days)} days. {shown}" if shown else f"{short(b.days)} days")
    if all(b.days <= WEEK for _, b in found[model]):
        return ""
    each = ", each expert" if preset(model).get("boundary") else ""
    return f"| `{recipe.name}`{each} | {short(sum(b.days for _, b in found[model]))} days | {' | '.join(cells)} |"


def named(model: str) -> str:
    """The preset; a run of a model with two experts is that of one of them."""
    return f"`{model}`{' (each expert)' if preset(model).get('boundary') else ''}"


def short(days: float) -> str:
    return f"{days:.0f}" if days >= 10 else f"{days:.2g}"


def without_recipe(model: str, gpu: str, gpus: int) -> str:
    """One line about a model on a machine that has no recipe for it."""
    cells = []
    least = min(recipes_of(model), key=lambda r: r.gpus)
    size = least.size or sampling(model).values["size"]
    for stage in STAGES:
        plan: Plan = load([f"stage={stage}", f"model={model}", f"gpu={gpu}", f"gpus={gpus}"], "plan")
        net = load_network(preset(model)["network"], size, 0)
        found = fitted(net, plan, GPUS[gpu].memory)
        if not found:
            cells.append("does not fit")
            continue
        words, b = found
        host = f", {b.host_peak / 1e9:.0f} GB of host memory" if b.host_peak > 100e9 else ""
        cells.append(f"{f'`{words}`: ' if words else ''}{b.peak / 1e9:.0f} GB{host}, {short(b.days)} days")
    return f"| {named(model)} | {gpus} x {gpu} | {size} | {' | '.join(cells)} | {least.gpus} x {least.gpu} |"


def tables() -> str:
    lines = [
        "| recipe | models | machine | clips | GB per GPU, Stages I, II, III | GB per host | days, Stages I, II, III |"
    ]
    lines += ["|---" * 7 + "|", *map(rows, recipes()), ""]
    lines += ["Stages of these recipes take more than a week. Each change alone brings a stage to a week or less:"]
    lines += ["", "| recipe | all stages | Stage II | Stage III |", "|---|---|---|---|"]
    lines += [line for recipe in recipes() if (line := long_one(recipe))]
    lines += [""]
    lines += ["These machines have no recipe for the model, because it does not fit or takes months:", ""]
    lines += ["| model | machine | clips | Stage I | Stage II | Stage III | smallest machine with a recipe |"]
    lines += ["|---" * 7 + "|"]
    for model in dict.fromkeys(recipe.models[0] for recipe in recipes()):  # the other models of a recipe need as much
        for gpu, gpus in MACHINES:
            if not any((r.gpu, r.gpus) == (gpu, gpus) for r in recipes_of(model)):
                lines.append(without_recipe(model, gpu, gpus))
    return "\n".join(lines) + "\n"


def parts() -> list[str]:
    """The page before the tables, the tables, and the page after them."""
    start, end = MARKS
    before, _, rest = PAGE.read_text().partition(start)
    inside, _, after = rest.partition(end)
    return [before + start, inside, end + after]


if __name__ == "__main__":
    before, _, after = parts()
    PAGE.write_text(before + tables() + after)
