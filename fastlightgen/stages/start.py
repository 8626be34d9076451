"""What Stage III starts from: the model folders, and the settings with which Stage II made them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from fastlightgen.config import numbers, root
from fastlightgen.engine.folder import as_used, read_run
from fastlightgen.models.families import depth, family_of, narrowed
from fastlightgen.models.folder.networks import config_of, trained_folder
from fastlightgen.models.folder.weights import read_card
from fastlightgen.stages.method import Guess, Subject


class Keys(Protocol):
    """The keys of a method that name Stage II's folder and the teacher."""

    run: str
    model: str
    stage2_model: str


def needs(cfg: Keys) -> str:
    """Return the stage whose result in the run folder is read."""
    return "" if cfg.stage2_model else "2"


def stage2_folder(cfg: Keys) -> Path:
    """Return the model folder of Stage II; raise if it does not exist."""
    folder = Path(cfg.stage2_model or Path(cfg.run) / "stage2" / "model")
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: there is no Stage II model; run stage=2 with the same run= first, or give stage2_model="
        )
    return folder


def pruned_path(folder: Path) -> list[int]:
    """Return the blocks that Stage II's pruned path keeps; raise if the folder names none."""
    keep: list[int] | None = read_card(folder).get("pruned_path")
    if keep is None:
        raise ValueError(f"{folder}/fastlightgen.json: names no pruned_path; wanted a model that stage=2 made")
    return keep


def teacher_blocks(folder: Path, path: Sequence[int]) -> list[int]:
    """Return the original teacher's blocks that some blocks of Stage II's network are."""
    kept: list[int] | None = read_card(folder).get("kept_blocks")
    if kept is None:
        return list(path)
    if max(path) >= len(kept):
        raise ValueError(
            f"{folder}/fastlightgen.json: pruned_path names block {max(path)}, kept_blocks only {len(kept)} blocks; "
            "copy the folder again"
        )
    return [kept[i] for i in path]


def is_narrow(folder: Path) -> bool:
    """Return whether Stage II left a network of its own: narrower than the teacher, with no dropped blocks in it."""
    return "widths" in read_card(folder)


def narrow_config(cfg: Keys) -> dict[str, Any] | None:
    """Return config.json of the network that Stage II left, if it is narrower than the teacher's; None otherwise."""
    if not (cfg.stage2_model or cfg.run):  # a plan without a run
        return None
    folder = Path(cfg.stage2_model or Path(cfg.run) / "stage2" / "model")
    return config_of(folder) if is_narrow(folder) else None


def require_narrowed(name: str, folder: Path, teacher: dict[str, Any], where: str) -> None:
    """Raise unless a folder holds the teacher's network, or one that width pruning made of it."""
    found, wanted = config_of(folder), teacher
    if is_narrow(folder):
        family = family_of(teacher)
        own = family.settings(found)
        wanted = narrowed(teacher, own.heads, own.ffn_width) | {key: found[key] for key in family.lists.values()}
    require_same(name, found, wanted, where)


def student_folder(start_model: str, stage2: Path, keep: Sequence[int]) -> Path:
    """Return the folder whose pruned path the student starts from; raise unless it has Stage II's network and path."""
    if not start_model:
        return stage2
    start = Path(start_model)
    require_model(start)
    require_same(f"start_model={start}", config_of(start), config_of(stage2), str(stage2))
    if (path := pruned_path(start)) != list(keep):
        raise ValueError(
            f"start_model={start}: its pruned path keeps blocks {path}, wanted {list(keep)} as in {stage2}; "
            "give a model that was made with the same importance="
        )
    return start


def require_model(folder: Path, wanted: str = "that stage=2 made") -> None:
    """Raise unless start_model=FOLDER is a model folder."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"start_model={folder}: there is no model folder; give one {wanted}")


def require_same(name: str, found: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    """Raise unless two config.json describe the same network."""
    for key in wanted | found:
        if found.get(key) != wanted.get(key):
            raise ValueError(
                f"{name}: {key} is {found.get(key)}, wanted {wanted.get(key)} as in {where}; "
                "give a model of the same network"
            )


def subject(cfg: Keys, guess: Guess | None = None) -> Subject:
    """Return config.json of the network that Stage III starts from, and the blocks of its pruned path."""
    if guess and not cfg.stage2_model:
        config = config_of(trained_folder(cfg.model))
        return config, guess(depth(config))
    folder = stage2_folder(cfg)
    config, keep = config_of(folder), read_card(folder).get("pruned_path")
    return config, list(range(depth(config))) if keep is None else keep


def inputs(cfg: Keys) -> dict[str, Any]:
    """Return the settings of the run's own Stage II: another Stage II makes another student."""
    if cfg.stage2_model:
        return {}
    made = as_used(read_run(Path(cfg.run)).get("stage2") or {})
    keys = numbers(root("2", {"2": made.get("method", "fastlightgen")})(run=cfg.run))
    return {"stage2_made_with": {k: made[k] for k in [*keys, "ranking_used"] if k in made}}
