"""Pages that mkdocs adds to those of docs/: the README, the texts beside it, and every key of every command.

The keys come from the classes that --help reads, so that these pages are never out of date.
"""

import re
from collections.abc import Container, Mapping
from dataclasses import Field
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url
from omegaconf import DictConfig, OmegaConf

from fastlightgen.config.cli import assigned, layers_of
from fastlightgen.config.commands import COMMANDS
from fastlightgen.config.help import row
from fastlightgen.config.layers import leaves, plain
from fastlightgen.config.plan import Machine
from fastlightgen.config.run import Run
from fastlightgen.config.stages import CHOOSES, DEFAULT, METHODS, STAGES, declared, root

ROOT = Path(__file__).parents[1]
TEXTS = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
}
RELEASED, SMALL = "wan2.1-t2v-14b", "tiny"  # models whose defaults the tables show
FETCHED, OWN = "https://unpkg.com/iframe-worker/shim", "assets/iframe-worker.js"
Keys = Mapping[str, Field]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs: add the pages."""
    pages = {name: moved((ROOT / source).read_text()) for name, source in TEXTS.items()}
    pages |= {"keys/train.md": train_keys(), "keys/commands.md": command_keys()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Called by mkdocs: take the script for a search without a server from the site; the theme would fetch it."""
    return output.replace(FETCHED, get_relative_url(OWN, page.url))


def on_post_template(output_content: str, template_name: str, config: MkDocsConfig) -> str:
    """Called by mkdocs for the page of a wrong address, which stands at the top."""
    return output_content.replace(FETCHED, OWN)


def moved(text: str) -> str:
    """A text of the repository's root, with its links as seen from docs/."""
    text = text.replace("](docs/", "](")
    for name, source in TEXTS.items():
        text = text.replace(f"]({source}", f"]({name}")
    return text


def train_keys() -> str:
    """The keys that all stages share, then those of each stage, then those that only another method has."""
    lines = ["# Keys of train", "", "    python -m fastlightgen.train stage=STAGE KEY=VALUE ...", ""]
    lines += [f"The defaults are those of a released model, `{RELEASED}`; other ones of `{SMALL}` stand below them."]
    lines += ["`--help` after your own words shows the defaults that a run would have.", ""]
    shared = of(leaves(Run))
    lines += section("Every stage", shared, defaults("3"))
    for stage, about in STAGES.items():
        if stage == "all":
            continue  # its keys are those of the stages, as stage2.lr, and of evaluate, as evaluate.clips
        own = of(leaves(root(stage)), () if stage == "decoder" else shared)
        lines += section(f"stage={stage}", own, defaults(stage), about)
        for name in METHODS[stage] if stage in CHOOSES else ():
            if name != DEFAULT:
                keys = of(leaves(root(stage, {stage: name})), {*own, *shared})
                about = f"{declared(stage, name).about}. It has these keys beside those of `stage={stage}`"
                lines += section(f"stage={stage} method={name}", keys, defaults(stage, name), about)
    return "\n".join(lines)


def command_keys() -> str:
    """The keys of the other commands."""
    lines = ["# Keys of the other commands", ""]
    for name, cls in COMMANDS.items():
        lines += section(name, of(leaves(cls)), [OmegaConf.structured(cls)], str(cls.__doc__))
    about = "memory, operations, traffic and time of a stage. Beside these keys it takes those of `train`"
    return "\n".join([*lines, *section("plan", leaves(Machine), [OmegaConf.structured(Machine)], about)])


def of(keys: Keys, known: Container[str] = ()) -> Keys:
    """Those of the keys that a table lists."""
    return {key: f for key, f in keys.items() if key != "stage" and key not in known}


def defaults(stage: str, method: str = DEFAULT) -> list[DictConfig]:
    """The values of a stage's keys for the released model and for the small one."""
    cls = root(stage, {stage: method})
    chosen = {} if method == DEFAULT else {"method": method}
    return [assigned(cls, layers_of(cls, {"model": model, **chosen}, None, {})) for model in (RELEASED, SMALL)]


def section(title: str, keys: Keys, values: list[DictConfig], about: str = "") -> list[str]:
    """A heading and a table of keys; those that --help shows first stand first."""
    lines = [f"## {title}", ""]
    lines += [f"{about[0].upper()}{about[1:]}.", ""] if about else []
    lines += ["| key | meaning |", "|---|---|"]
    for key in sorted(keys, key=lambda name: not keys[name].metadata["everyday"]):
        shown = [row(key, keys[key], plain(OmegaConf.select(node, key))) for node in values]
        first, *others = dict.fromkeys(default for default, _ in shown)
        also = "".join(f"<br>`{SMALL}`: `{other.partition('=')[2]}`" for other in others)
        lines.append(f"| `{first}`{also} | {escaped(shown[0][1])} |")
    return [*lines, ""]


def escaped(text: str) -> str:
    """A text of --help as a cell of a table."""
    return re.sub(r"([|*_\[\]])", r"\\\1", text.replace("\xa0", " ").replace("<", "&lt;"))
