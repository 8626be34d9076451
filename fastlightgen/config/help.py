"""The text of --help: every key with its type, default and meaning."""

from collections.abc import Mapping, Sequence

from omegaconf import OmegaConf

from fastlightgen.config.commands import COMMANDS
from fastlightgen.config.fields import default_of, limits, show, type_of
from fastlightgen.config.layers import TYPES, assign, leaves, plain, shipped_layers
from fastlightgen.config.plan import Machine, Plan, plan_root
from fastlightgen.config.run import Run
from fastlightgen.config.stages import CHOOSES, DEFAULT, METHODS, STAGES, declared, root


def help_text(command: str, argv: Sequence[str]) -> str:
    """The help of a command; stage=N limits it to a stage, method=NAME chooses the method whose keys are listed."""
    given = dict(word.split("=", 1) for word in argv if "=" in word)
    usage = f"usage: python -m fastlightgen.{command} {'stage=STAGE ' if command == 'train' else ''}key=value ..."
    head = [usage, "", "Also config=FILE.yaml: keys from a file; the command line wins."]
    stage, method = given.get("stage", ""), given.get("method", DEFAULT)
    if command == "plan":
        return "\n".join([*head, *plan_keys(stage or "3", method, given)])
    if command != "train":
        about = COMMANDS[command].__doc__
        return "\n".join([*head, "", f"Keys ({about}):", *describe(COMMANDS[command], {})])
    model, preset = (given.get(key, default_of(leaves(Run)[key])) for key in ("model", "preset"))
    text = [*head, f"The defaults are those of model={model} preset={preset}.", ""]
    text += [f"stage={name:<4} {about}" for name, about in STAGES.items()]
    text += ["", "Keys of every stage:", *describe(Run, {})]
    for name, about in STAGES.items():
        if stage not in (name, "") and stage in STAGES:
            continue
        chosen = {name: method} if name in CHOOSES and method in METHODS[name] else {}
        text += ["", f"Keys of stage={name} ({about}):"]
        lines, common = describe(root(name, chosen), given), len(leaves(Run))
        # without a stage the sections of stage=all would repeat what stands above
        short = name == "all" and stage != "all"
        text += ["  stage1.KEY, stage2.KEY, stage3.KEY: the keys above"] if short else []
        text += [line for line in lines[common:] if not (short and line.startswith("  stage"))]
        text += methods(name) if name in CHOOSES else []
    return "\n".join(text)


def methods(stage: str) -> list[str]:
    """One line for each method of a stage."""
    lines = [f"    method={name:<18} {declared(stage, name).about}" for name in METHODS[stage]]
    return [f"  Methods of stage={stage}; --help stage={stage} method=NAME lists the keys of another one:", *lines]


def plan_keys(stage: str, method: str, given: Mapping[str, str]) -> list[str]:
    """The keys of the machine, then those of the stage that is planned."""
    cls = plan_root(stage, method)
    lines = dict(zip(leaves(cls), describe(cls, given), strict=True))
    machine = [lines.pop(key) for key in leaves(Machine)]
    return ["", f"Keys ({Plan.__doc__}):", *machine, "", f"Keys of stage={stage}, as of train:", *lines.values()]


def describe(cls: type, given: Mapping[str, str]) -> list[str]:
    """One line per key, with the default that holds before config=FILE and the command line."""
    node = OmegaConf.structured(cls)
    for where, values in shipped_layers(cls, given) if cls is not Run else ():
        assign(node, cls, values, f" (in {where})")
    lines = []
    for key, f in leaves(cls).items():
        value, meaning = plain(OmegaConf.select(node, key)), f.metadata["help"]
        default = "required" if value is None else show(value) or '""'
        named = f.metadata["choices"] and all(c in meaning for c in f.metadata["choices"])
        meaning += f" ({limits(f)})" if limits(f) and not named else ""
        lines.append(f"  {key:<22} {TYPES[type_of(f)]:<16} {default:<12} {meaning}")
    return lines
