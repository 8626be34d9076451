"""Find the network that a preset, a config.json or a model folder describes, without reading weights."""

from dataclasses import asdict
from pathlib import Path

from fastlightgen.config import find_preset_weights, preset, presets
from fastlightgen.models.families import depth, family_of
from fastlightgen.models.folder.experts import experts_of
from fastlightgen.models.folder.index import INDEX
from fastlightgen.models.folder.original import read_config


def config_of(path_or_preset: str | Path) -> dict:
    """The complete diffusers config of a preset or a model folder, defaults filled in."""
    name = str(path_or_preset)
    if name in presets():
        config = preset(name)["network"]
    else:
        pair = experts_of(path_or_preset)  # of two experts the first: they differ in their number of blocks at most
        config = read_config(model_folder(pair.high if pair else path_or_preset))
    family = family_of(config)
    return {"_class_name": family.config_class} | asdict(family.settings(config))


def full_depth(folder: Path, pipeline: Path | None = None) -> int:
    """Blocks of the deepest network that differs from the folder's in its number of blocks alone.

    The pipeline's own network and the presets are compared; without such a network it is the folder's own depth.
    """
    own = config_of(folder)
    others = [config_of(name) for name in presets()]
    if pipeline and (pipeline / "transformer" / "config.json").is_file():
        others.append(config_of(pipeline))
    counts = family_of(own).lists.values()
    alike = [c for c in others if c | {k: 0 for k in counts} == own | {k: 0 for k in counts}]
    return max(depth(c) for c in [own, *alike])


def model_folder(path: str | Path) -> Path:
    """The folder with config.json and weights: `path`, or transformer/ in a pipeline folder."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    if pair := experts_of(folder):
        raise ValueError(f"{folder}: has two networks; give the folder of one of them, {pair.high} or {pair.low}")
    if (folder / INDEX).is_file():
        if (folder / "transformer" / "config.json").is_file():
            return folder / "transformer"
        raise ValueError(f"{folder}: a pipeline without transformer/config.json; give one with a video transformer")
    found = [*folder.glob("stage[0-9]/model/config.json"), *folder.glob("stage[0-9]/model/*/config.json")]
    if results := sorted(folder / file.relative_to(folder).parts[0] / "model" for file in found):
        raise ValueError(f"model={path}: is the folder of a run; give model={results[-1]}, its latest result")
    raise ValueError(f"model={path}: neither a folder with config.json nor a preset ({', '.join(presets())})")


def trained_folder(path_or_preset: str) -> Path:
    """The folder with trained weights for `model=`: the given folder, or the weights shipped for a preset."""
    if path_or_preset not in presets():
        return Path(path_or_preset)
    folder = find_preset_weights(path_or_preset)
    if folder is None:
        repository, run = preset(path_or_preset).get("repository", ""), f"runs/{path_or_preset}-teacher"
        name = repository.rpartition("/")[2]
        how = f"download them: hf download {repository} --local-dir {name}; then give model={name}"
        if not repository:  # a network that Stage 0 trains from random weights
            how = (
                f"make them with: python -m fastlightgen.train stage=0 model={path_or_preset} run={run}; "
                f"then give model={run}/stage0/model"
            )
        raise ValueError(f"model={path_or_preset}: this preset has no weights here; {how}")
    return folder
