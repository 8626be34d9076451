"""What Stage III starts from: the model folders, and the settings with which Stage II made them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from fastlightgen.config import numbers, root
from fastlightgen.engine.folder import as_used, read_run
from fastlightgen.models.families import depth, family_of
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
    require_audible(folder)
    return folder


def require_audible(folder: Path) -> None:
    """Raise if method=f3 silenced self-attentions of this network."""
    if silent := read_card(folder).get("silent"):
        raise ValueError(
            f"{folder}: method=f3 silenced the self-attention of {len(silent)} blocks, which Stage III would train "
            "again; use a model of f3=block"
        )


def pruned_alone(folder: Path) -> bool:
    """True if a method of Stage II left the pruned network alone, without the dropped blocks."""
    card = read_card(folder)
    return card.get("stage") == 2 and "pruned_path" not in card


def pruned_path(folder: Path) -> list[int]:
    """Return the blocks that Stage II's pruned path keeps; raise if the folder names none."""
    keep: list[int] | None = read_card(folder).get("kept_blocks" if pruned_alone(folder) else "pruned_path")
    if keep is None:
        raise ValueError(f"{folder}/fastlightgen.json: names no pruned_path; wanted a model that stage=2 made")
    return keep


def own_path(folder: Path, keep: Sequence[int]) -> list[int]:
    """The blocks `keep` of the unpruned network, as they are numbered in the folder's network."""
    return list(range(len(keep))) if pruned_alone(folder) else list(keep)


def pruned_config(config: dict[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """config.json of a network that is pruned to these blocks."""
    out, first = dict(config), 0
    for key in family_of(config).lists.values():
        out[key] = sum(first <= i < first + config[key] for i in keep)
        first += config[key]
    return out


def student_folder(start_model: str, stage2: Path, keep: Sequence[int]) -> Path:
    """Return the folder whose pruned path the student starts from; raise unless it has Stage II's network and path."""
    if not start_model:
        return stage2
    start, config = Path(start_model), config_of(stage2)
    require_model(start)
    if pruned_alone(start) and not pruned_alone(stage2):
        config = pruned_config(config, keep)
    require_same(f"start_model={start}", config_of(start), config, str(stage2))
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
    """Return config.json of the network that Stage III starts from, and the blocks of its pruned path."""
    if guess and not cfg.stage2_model:
        config = config_of(trained_folder(cfg.model))
        return config, guess(depth(config))
    folder = stage2_folder(cfg)
    if pruned_alone(folder):  # its teacher is not
        return config_of(trained_folder(cfg.model)), pruned_path(folder)
    config, keep = config_of(folder), read_card(folder).get("pruned_path")
    return config, list(range(depth(config))) if keep is None else keep


def inputs(cfg: Keys) -> dict[str, Any]:
    """Return the settings of the run's own Stage II: another Stage II makes another student."""
    if cfg.stage2_model:
        return {}
    made = as_used(read_run(Path(cfg.run)).get("stage2") or {})
    keys = numbers(root("2", {"2": made.get("method", "fastlightgen")})(run=cfg.run))
    return {"stage2_made_with": {k: made[k] for k in [*keys, "ranking_used"] if k in made}}
