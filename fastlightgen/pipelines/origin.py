"""Where an export comes from: names of models without local paths, and the licence of the teacher."""

import re
from pathlib import Path
from typing import Any

from fastlightgen.files.border import parsed_yaml, read_text
from fastlightgen.models.folder.index import read_index

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name
LICENCE = ("license", "license_name", "license_link")  # keys in the head of a model card


def cached(path: Path) -> str | None:
    """owner/name of a folder inside a download cache, whose folders are called models--owner--name."""
    names = [part.removeprefix("models--") for part in path.parts if part.startswith("models--")]
    return names[0].replace("--", "/", 1) if names and "--" in names[0] else None


def name_of(path: str | Path) -> str:
    """A model's name without the folders that hold it."""
    parts = Path(path).parts
    inner = len(parts) > 1 and parts[-1] in ("model", "transformer")  # names that every run and pipeline has
    return cached(Path(path)) or "/".join(parts[-2 if inner else -1 :])


def hub_id(pipeline: Path) -> str | None:
    """The owner/name of a pipeline folder, as far as a download cache or model_index.json tells it."""
    said = str(read_index(pipeline).get("_name_or_path") or "")
    return cached(pipeline.resolve()) or (said if HUB_ID.fullmatch(said) and not Path(said).exists() else None)


def licence(pipeline: Path) -> dict[str, Any]:
    """The licence keys in the head of the pipeline's README.md; {} if there are none."""
    path = pipeline / "README.md"
    text = read_text(path, errors="replace") if path.is_file() else ""
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        found = parsed_yaml(head[1], str(path)) if head else None
    except ValueError:
        return {}
    return {key: found[key] for key in LICENCE if key in found} if isinstance(found, dict) else {}
