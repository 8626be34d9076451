"""The layers: an import goes down or stays on its level, never up; and `import fastlightgen` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastlightgen"
LAYERS = [  # lowest first
    {"atomic", "config", "rng"},
    {"ops", "flow", "guidance", "blocks"},
    {"models"},
    {"engine", "data", "metrics"},
    {"stages"},
    {"train", "generate", "encode", "export", "evaluate", "report", "plan"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
CONCRETE = (
    "models.wan",
    "models.hunyuan",
    "engine.loop",
    "engine.local",
    "engine.deepspeed",
    "data.synthetic",
    "data.cache",
)
HEAVY = ("deepspeed", "diffusers", "transformers", "triton", "av", "matplotlib")
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def imported(source: str, module: str) -> set[str]:
    """Dotted names of everything that `source`, the text of `module`, imports, at any depth of nesting."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def units(names: set[str]) -> set[str]:
    """fastlightgen.<unit>... -> <unit>, for names that are layered modules."""
    parts = [n.split(".") for n in names]
    return {p[1] for p in parts if p[0] == "fastlightgen" and len(p) > 1 and p[1] in RANK}


def of(path: Path) -> tuple[str, set[str]]:
    relative = path.relative_to(ROOT).with_suffix("")
    module = ".".join(relative.parts)  # an __init__ keeps its name, so that level 1 means its own package
    return relative.parts[1], imported(path.read_text(), module)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_never_go_up(path: Path):
    unit, names = of(path)
    assert unit in RANK, f"{path.relative_to(ROOT)}: {unit} has no layer; name it in LAYERS"
    upward = {u for u in units(names) if RANK[u] > RANK[unit]}
    assert not upward, f"{path.relative_to(ROOT)} imports {upward} from a higher layer"


def test_config_imports_no_torch():
    files = [p for p in FILES if of(p)[0] == "config"]
    assert files
    assert not {n for p in files for n in of(p)[1] if n.split(".")[0] == "torch"}


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "stages"], ids=lambda p: p.name)
def test_a_stage_is_given_its_model_engine_and_data(path: Path):
    """Shared types (Batch, Role, VideoDiT) may be named; the things themselves come through arguments."""
    concrete = {n for n in of(path)[1] if n.startswith(tuple(f"fastlightgen.{c}" for c in CONCRETE))}
    assert not concrete


def test_the_rule_sees_nested_and_relative_imports():
    source = "def f():\n    from ..stages import prune\n    import fastlightgen.train\nfrom . import walk"
    assert imported(source, "fastlightgen.models.base") == {
        "fastlightgen.stages.prune",
        "fastlightgen.train",
        "fastlightgen.models.walk",
    }


def test_import_is_light():
    code = f"import sys, fastlightgen; print(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "", f"import fastlightgen loads {done.stdout.strip()}"
