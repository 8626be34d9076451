"""The parts of a pipeline folder that an export leaves as they are: checked, then copied or linked."""

import errno
import os
import re
import shutil
from pathlib import Path

from fastlightgen.models.folder.files import mapped
from fastlightgen.models.folder.index import within
from fastlightgen.models.folder.manifest import Entry, entry, verify_files
from fastlightgen.parallel.log import bar


def check_parts(pipeline: Path, names: list[str]) -> None:
    """Raise ValueError if a part of the pipeline is damaged: by its manifest, or by the headers of its weights."""
    verify_files(pipeline, lambda file: file.partition("/")[0] in names)
    for file in (f for name in names for f in sorted((pipeline / name).rglob("*.safetensors"))):
        with mapped(file):  # compares the header with the size
            pass


def copy_parts(pipeline: Path, folder: Path, names: list[str], link: bool, progress: bool) -> dict[str, Entry]:
    """Copy or link the unchanged parts into `folder`, and copy the licence files.

    Return the manifest's records of what was copied, taken from the sources.
    """
    copied: dict[str, Entry] = {}
    if link:
        for name in names:
            (folder / name).symlink_to((pipeline / name).resolve(), target_is_directory=True)
    else:
        total = sum(f.stat().st_size for n in names for f in (pipeline / n).rglob("*") if f.is_file())
        with bar(total, "copying parts", progress, unit="B", scale=True) as shown:

            def copy(source: str, target: str) -> None:
                if not within(Path(source), pipeline):
                    raise ValueError(f"{source}: is a link out of the pipeline, so it is not copied; delete it")
                shutil.copyfile(source, target)  # follows the links of a download cache
                copied[Path(target).relative_to(folder).as_posix()] = entry(Path(source))
                shown.update(os.path.getsize(target))

            for name in names:
                try:
                    shutil.copytree(pipeline / name, folder / name, copy_function=copy)
                except shutil.Error as err:  # a list of (source, target, what the system said)
                    _, target, why = err.args[0][0]
                    code = int(found[1]) if (found := re.search(r"Errno (\d+)", why)) else errno.EIO
                    raise OSError(code, os.strerror(code), target) from None
    for file in (f for f in pipeline.glob("LICENSE*") if within(f, pipeline)):
        shutil.copyfile(file, folder / file.name)
    return copied
