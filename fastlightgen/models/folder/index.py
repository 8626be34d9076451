"""model_index.json of a pipeline folder, checked before diffusers sees the folder: loading must run no code of it."""

from pathlib import Path

from fastlightgen.files.border import read_json
from fastlightgen.files.kinds import PIPELINE
from fastlightgen.models.families import family_of_pipeline

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers")
REMEDY = "copy the folder again from a source that you trust"


def named_parts(pipeline: str | Path) -> dict:
    """Read model_index.json, for those who load nothing but networks of this package."""
    index: dict = read_json(Path(pipeline) / INDEX, PIPELINE, "give a folder that diffusers' save_pretrained wrote")
    return index


def read_index(pipeline: str | Path) -> dict:
    """Read model_index.json. Parts must be classes of diffusers and transformers: other names are code to load."""
    path, index = Path(pipeline) / INDEX, named_parts(pipeline)
    family = family_of_pipeline(index)
    own = family.libraries if family else ()
    for name, part in index.items():
        if name.startswith("_") or not isinstance(part, list):
            continue
        library, kind = part
        if Path(name).name != name or name in (".", ".."):
            raise ValueError(f"{path}: names a part outside the folder, {name!r}; copy the folder again")
        if library is None and kind is None:
            continue
        if library not in (*LIBRARIES, *own) or not str(kind).isidentifier() or str(kind).startswith("_"):
            raise ValueError(f"{path}: {name} is {part}, wanted a class of {' or '.join(LIBRARIES)}; {REMEDY}")
        check_part(Path(pipeline) / name)
    return index


def check_part(folder: Path) -> None:
    """Refuse a part whose settings name code: an attention kernel from elsewhere."""
    path = folder / "config.json"
    if not path.is_file():
        return
    config = read_json(path, remedy="copy the folder again")
    found = [(k, v) for k, v in config.items() if "attn_implementation" in k] if isinstance(config, dict) else []
    for key, value in found:
        if "/" in str(value):
            raise ValueError(f"{path}: {key} is {value!r}, the name of code to download; {REMEDY}")


def within(file: Path, pipeline: Path) -> bool:
    """Does a file of a pipeline, its links followed, lie in the pipeline or in the download cache that holds it?"""
    target, home = file.resolve(), pipeline.resolve()
    roots = [home, *(p for p in home.parents if p.name.startswith("models--"))]
    return any(root in target.parents for root in roots)
