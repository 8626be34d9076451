"""What Stage III starts from: the model folders, and the settings with which Stage II made them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fastlightgen.config import method_for, numbers, root
from fastlightgen.engine.folder import as_used, read_run
from fastlightgen.models.families import depth, family_of, narrowed
from fastlightgen.models.folder.networks import config_of, trained_folder
from fastlightgen.models.folder.weights import read_card
from fastlightgen.stages.experts import partner_used
from fastlightgen.stages.method import BOTH, SILENCED, Guess, Subject


class Keys(Protocol):
    """The keys of a method that name Stage II's folder and the teacher."""

    run: str
    model: str
    stage2_model: str


@dataclass(frozen=True)
class Pruned:
    """What Stage II left in a folder: the full network with a pruned path, or a network of its own.

    A network of its own has no dropped blocks in it. It may have fewer heads and a narrower feed-forward too.
    """

    folder: Path
    alone: bool  # a network of its own
    path: list[int]  # the blocks to run, as the folder's network numbers them
    kept: list[int]  # the teacher's blocks that they are


def needs(cfg: Keys) -> str:
    """Return the stage whose result in the run folder is read."""
    return "" if cfg.stage2_model else "2"


def result_folder(cfg: Keys) -> Path:
    """Return the model folder of Stage II."""
    return Path(cfg.stage2_model or Path(cfg.run) / "stage2" / "model")


def stage2_result(cfg: Keys) -> Pruned:
    """Return what Stage II left; raise if there is no such folder."""
    folder = result_folder(cfg)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: there is no Stage II model; run stage=2 with the same run= first, or give stage2_model="
        )
    require_audible(folder)
    return read_pruned(folder)


def read_pruned(folder: Path) -> Pruned:
    """Read what Stage II left in a folder; raise if its card does not tell."""
    card, blocks, where = read_card(folder), depth(config_of(folder)), f"{folder}/fastlightgen.json"
    alone = card.get("stage") == 2 and "pruned_path" not in card
    path: list[int] | None = list(range(blocks)) if alone else card.get("pruned_path")
    if path is None:
        raise ValueError(f"{where}: names no pruned_path; wanted a model that stage=2 made")
    kept = card.get("kept_blocks") or list(range(blocks))
    if len(kept) != blocks:
        raise ValueError(
            f"{where}: kept_blocks names {len(kept)} of the network's {blocks} blocks; copy the folder again"
        )
    if path[-1] >= blocks:
        raise ValueError(
            f"{where}: pruned_path names block {path[-1]}, wanted at most {blocks - 1}; copy the folder again"
        )
    return Pruned(folder, alone, path, [kept[i] for i in path])


def require_audible(folder: Path) -> None:
    """Raise if method=f3 silenced self-attentions of this network."""
    if silent := read_card(folder).get("silent"):
        raise ValueError(
            f"{folder}: method=f3 silenced the self-attention of {len(silent)} blocks, which Stage III would train "
            "again; use a model of f3=block"
        )


def own_config(cfg: Keys) -> dict[str, Any] | None:
    """Return config.json of a network of its own that Stage II left; None if it left none, or nothing yet."""
    if not (cfg.stage2_model or cfg.run):  # a plan without a run
        return None
    folder = result_folder(cfg)
    found = (folder / "config.json").is_file() and read_pruned(folder).alone
    return config_of(folder) if found else None


def pruned_config(config: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """config.json of a network that is pruned to these blocks."""
    out, first = dict(config), 0
    for key in family_of(config).lists.values():
        out[key] = sum(first <= i < first + config[key] for i in kept)
        first += config[key]
    return out


def require_made_of(teacher: dict[str, Any], found: Pruned, where: str) -> None:
    """Raise unless Stage II left the teacher's network, or one that its card says was pruned from it."""
    wanted = teacher
    if widths := read_card(found.folder).get("widths"):
        wanted = narrowed(wanted, widths["heads"][0], widths["ffn"][0])
    if found.alone:
        wanted = pruned_config(wanted, found.kept)
    require_same(f"stage2_model={found.folder}", config_of(found.folder), wanted, where)


def student_from(start_model: str, result: Pruned) -> Pruned:
    """Return what the student starts from; raise unless start_model is of Stage II's network and blocks."""
    if not start_model:
        return result
    folder, config = Path(start_model), config_of(result.folder)
    require_model(folder)
    start = read_pruned(folder)
    if start.alone and not result.alone:
        config = pruned_config(config, result.kept)
    require_same(f"start_model={folder}", config_of(folder), config, str(result.folder))
    if start.kept != result.kept:
        raise ValueError(
            f"start_model={folder}: its pruned path keeps blocks {start.kept}, wanted {result.kept} as in "
            f"{result.folder}; give a model that was made with the same importance="
        )
    return start


def require_fitting(stage2: Any, stage3: Any) -> None:
    """Raise if this Stage III of stage=all cannot start from what this Stage II will leave."""
    left, method = method_for(stage2).leaves(stage2), method_for(stage3)
    if method.needs(stage3) != "2" or left == BOTH:
        return
    strong = ["stage3.strong=original"] * (vars(stage3).get("strong") == "stage2")
    said = f"stage2.method={stage2.method}: leaves {left}"
    if left == SILENCED:
        use = " ".join(["stage2.f3=block", *strong])
        raise ValueError(f"{said} (f3={stage2.f3}), which stage 3 would train again; use {use}")
    if strong:
        raise ValueError(f"{said}, and Eq. 9 needs a strong teacher; use {strong[0]}")


def require_model(folder: Path, wanted: str = "that stage=2 made") -> None:
    """Raise unless start_model=FOLDER is a model folder."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"start_model={folder}: there is no model folder; give one {wanted}")
    require_audible(folder)


def require_same(name: str, found: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    """Raise unless two config.json describe the same network."""
    for key in wanted | found:
        if found.get(key) != wanted.get(key):
            raise ValueError(
                f"{name}: {key} is {found.get(key)}, wanted {wanted.get(key)} as in {where}; "
                "give a model of the same network"
            )


def subject(cfg: Keys, guess: Guess | None = None) -> Subject:
    """Return config.json of the network that Stage III starts from, and its blocks that the student has."""
    if guess and not cfg.stage2_model:
        config = config_of(trained_folder(cfg.model))
        return config, guess(depth(config))
    found = stage2_result(cfg)
    return config_of(found.folder), found.path


def inputs(cfg: Keys) -> dict[str, Any]:
    """Return the settings of the run's own Stage II: another Stage II makes another student."""
    if cfg.stage2_model:
        return partner_used(cfg)
    made = as_used(read_run(Path(cfg.run)).get("stage2") or {})
    keys = numbers(root("2", {"2": made.get("method", "fastlightgen")})(run=cfg.run))
    return {"stage2_made_with": {k: made[k] for k in [*keys, "ranking_used"] if k in made}} | partner_used(cfg)
