"""The order of the package: a unit imports only units below it, and `import fastlightgen` loads no heavy module."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastlightgen"
ORDER = [  # from the top down; no two units share a level
    "__main__",
    # commands: parse, build, call
    "sweep",
    "sweeps",
    "train",
    "train_rank",
    "train_decoder",
    "evaluate",
    "speed",
    "vbench",
    "report",
    "generate",
    "encode",
    "export",
    "plan",
    "evaluation",
    # the method: losses and updates, given their models, engines and data
    "methods",
    "stages",
    "planner",
    # engines, models and data
    "engine",
    "pipelines",
    "decoder",
    "world",
    "page",
    "metrics",
    "data",
    "models",
    "parallel",
    # pure functions
    "ops",
    "guidance",
    "flow",
    "blocks",
    "config",
    "files",
    "rng",
    "atomic",
]
RANK = {name: place for place, name in enumerate(ORDER)}
CONCRETE = (
    "models.wan",
    "models.wan_ti2v",
    "models.hunyuan",
    "models.hunyuan15",
    "engine.loop",
    "engine.local",
    "engine.deepspeed",
    "world",
    "data.cache",
)
HEAVY = (
    "deepspeed",
    "diffusers",
    "transformers",
    "triton",
    "av",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "executorch",
)
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imported(source: str, module: str, is_package: bool = False) -> set[str]:
    """Dotted names of everything that `source`, the text of `module`, imports, at any depth of nesting."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            up = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def imports_of(module: str) -> set[str]:
    path = MODULES[module]
    return imported(path.read_text(), module, path.name == "__init__.py")


def unit_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "fastlightgen" and len(parts) > 1 and parts[1] in RANK else None


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str):
    unit = module.split(".")[1]
    assert unit in RANK, f"{module}: {unit} has no place; name it in ORDER"
    others = {unit_of(name) for name in imports_of(module)} - {None, unit}
    upward = {other for other in others if RANK[other] < RANK[unit]}
    assert not upward, f"{module} imports {upward}, which stand above {unit}"


def test_no_module_imports_itself_through_others():
    """No module imports another in a circle, also within a unit."""

    def home(name: str) -> str | None:  # "fastlightgen.a.b.thing" -> the module it stands in
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        return name or None

    edges = {m: {home(n) for n in imports_of(m)} - {None, m} for m in MODULES}
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in edges[module]:
                visit(other, [*path, module])
            done.add(module)

    for module in MODULES:
        visit(module, [])


def test_config_imports_no_torch():
    files = [m for m in MODULES if m.split(".")[1] == "config"]
    assert files
    assert not {n for m in files for n in imports_of(m) if n.split(".")[0] == "torch"}


@pytest.mark.parametrize("module", [m for m in MODULES if m.split(".")[1] in ("stages", "methods")])
def test_a_stage_is_given_its_model_engine_and_data(module: str):
    """These units may import shared types (Batch, Role, VideoDiT); the objects come through arguments."""
    concrete = {n for n in imports_of(module) if n.startswith(tuple(f"fastlightgen.{c}" for c in CONCRETE))}
    assert not concrete


def test_the_rule_sees_nested_and_relative_imports():
    source = "def f():\n    from ..stages import prune\n    import fastlightgen.train\nfrom . import walk"
    assert imported(source, "fastlightgen.models.base") == {
        "fastlightgen.stages.prune",
        "fastlightgen.train",
        "fastlightgen.models.walk",
    }
    assert imported("from . import walk", "fastlightgen.models", is_package=True) == {"fastlightgen.models.walk"}


def test_import_is_light():
    code = f"import sys, fastlightgen; print(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "", f"import fastlightgen loads {done.stdout.strip()}"
