"""What this machine has for a run on a GPU: versions, clocks, tools. `complaints` says in one line each what is wrong.

Imports nothing beyond Python: it has to work where a package is missing or does not fit.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "torch triton numpy setuptools pybind11 cmake ninja pytest pytest-benchmark pytest-xdist omegaconf safetensors "
    "diffusers transformers liger-kernel quack-kernels nvidia-cutlass"
).split()
FETCH = "bench/wheels.sh fetches it"
ASK = """
import json, torch
out = {"version": str(torch.__version__), "cuda": torch.version.cuda, "gpu": None}
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    out["gpu"] = {"name": p.name, "capability": [p.major, p.minor]}
    out["gpu"] |= {"memory": p.total_memory, "sms": p.multi_processor_count}
print(json.dumps(out))
"""
CLOCKS = "clocks.sm clocks.max.sm clocks.mem clocks.max.mem temperature.gpu power.draw power.limit".split()


def said(*command: str, seconds: float = 120) -> str | None:
    """What a command prints, or None if it fails; it fails too where it is not installed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def look() -> dict:
    """Everything that a result must be read with."""
    names = ("name", "driver_version", *CLOCKS)
    smi = said("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", seconds=30)
    listed = dict(zip(names, smi.splitlines()[0].split(", "))) if smi else {}
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "sources": sources(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": ask_torch(),
        "driver": {"gpu": listed.pop("name", None), "version": listed.pop("driver_version", None), "clocks": listed},
        "nvcc": nvcc(),
        "cutlass": cutlass(),
        "packages": {name: version(name) for name in PACKAGES},
        "tools": {name: shutil.which(name) for name in ("ncu", "compute-sanitizer", "cuobjdump", "cmake", "ninja")},
        "cores": os.cpu_count(),
    }


def ask_torch() -> dict:
    """torch's version, CUDA and GPU, asked of a process of its own: a broken torch ends only that."""
    if importlib.util.find_spec("torch") is None:
        return {"error": "it is not installed"}
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def nvcc() -> str | None:
    """The version of nvcc, looked for where CMakeLists.txt looks."""
    places = [Path(os.environ["CUDA_HOME"], "bin")] if "CUDA_HOME" in os.environ else []
    path = os.pathsep.join(map(str, [*places, "/usr/local/cuda/bin", os.environ.get("PATH", "")]))
    found = shutil.which("nvcc", path=path)
    release = re.search(r"release ([\d.]+)", said(found, "--version") or "") if found else None
    return release[1] if release else None


def cutlass() -> str | None:
    """The folder of CUTLASS headers: FLG_CUTLASS, or that of the nvidia-cutlass wheel, wherever it was installed."""
    found = importlib.util.find_spec("cutlass_library")
    wheel = [str(Path(found.origin).parent / "source" / "include")] if found and found.origin else []
    folders = [os.environ["FLG_CUTLASS"]] if os.environ.get("FLG_CUTLASS") else wheel
    return next((f for f in folders if Path(f, "cutlass", "version.h").exists()), None)


def sources() -> str:
    """A hash of the files that decide what is measured; a copy of the tree without git has it too."""
    patterns = ("csrc/**/*.*", "bindings/*", "fastlightgen/**/*.py", "bench/*.py", "CMakeLists.txt", "setup.py")
    files = sorted({p for pattern in patterns for p in ROOT.glob(pattern) if p.is_file()})
    text = b"".join(str(p.relative_to(ROOT)).encode() + p.read_bytes() for p in files)
    return hashlib.sha256(text).hexdigest()[:12]


def commit() -> str | None:
    """The commit that wheels.sh noted, if the sources are still those; otherwise git's.

    A copy of the tree may have no git, or an older commit with these sources as changes.
    """
    noted = ROOT / "bench" / "wheels" / "commit"
    hashed, _, name = noted.read_text().strip().partition(" ") if noted.exists() else ("", "", "")
    if name and hashed == sources():
        return name
    short = said("git", "rev-parse", "--short", "HEAD")
    return short and short + ("-dirty" if said("git", "status", "--porcelain", "--untracked-files=no") else "")


def number(text: str | None) -> tuple[int, ...]:
    """A version as numbers that compare: "2.11.0+cu130" is (2, 11, 0)."""
    return tuple(int(n) for n in re.findall(r"\d+", (text or "0").partition("+")[0]))


def complaints(found: dict) -> list[str]:
    """What is missing or wrong, and what is left out for it: one line each, the most important first."""
    torch, packages, gpu = found["torch"], found["packages"], found["torch"].get("gpu")
    out = []
    if "error" in torch:
        return [f"torch does not work: {torch['error']}; nothing can run"]
    if number(torch["version"]) < (2, 11):
        out.append(f"torch {torch['version']}: the package needs 2.11 or newer; what fails is left out")
    if gpu is None and (there := found["driver"]["gpu"]):
        out.append(
            f"torch {torch['version']} does not see the {there}; this is a rehearsal on the CPU, it measures nothing"
        )
    elif gpu is None:
        out.append("no GPU: this is a rehearsal on the CPU with small shapes, it measures nothing")
    elif gpu["capability"] != [9, 0]:
        arch = "".join(map(str, gpu["capability"]))
        out.append(
            f"{gpu['name']} is sm_{arch}, not Hopper: the kernels are built for it; CUTLASS products are left out"
        )
    rest = "the compiled kernels are left out, those of Triton and torch remain"
    if gpu and found["nvcc"] is None:
        out.append(f"nvcc was not found in CUDA_HOME, /usr/local/cuda or PATH: {rest}")
    elif gpu and torch["cuda"] and number(found["nvcc"])[0] > number(torch["cuda"])[0]:
        out.append(
            f"nvcc {found['nvcc']} is newer than torch's CUDA {torch['cuda']}: the driver may refuse the kernels"
        )
    if gpu and number(packages["setuptools"]) < (77,):
        out.append(f"setuptools {packages['setuptools']}: the build needs 77 or newer ({FETCH}); {rest}")
    for tool in ("cmake", "ninja"):
        if gpu and not (packages[tool] or found["tools"][tool]):
            out.append(f"{tool} is not installed: {rest}")
    if gpu and not packages["pybind11"]:
        out.append(f"pybind11 is not installed: {rest}")
    if gpu and gpu["capability"] == [9, 0] and found["cutlass"] is None:
        out.append(f"CUTLASS headers were not found ({FETCH}): the fused linear layers are left out")
    effects = {
        "pytest": "tests and benches are left out",
        "pytest-benchmark": "benches are left out",
        "pytest-xdist": "the tests run in one process",
        "omegaconf": f"blocks and steps are left out ({FETCH})",
        "safetensors": "blocks and steps are left out",
        "diffusers": f"its rows are left out ({FETCH})",
    }
    effects |= {"liger-kernel": f"its rows are left out ({FETCH})"} if gpu else {}
    return out + [f"{name} is not installed: {effect}" for name, effect in effects.items() if not packages[name]]


def registers(library: Path) -> dict[str, dict[str, int]]:
    """Registers, stack and local memory of each kernel of the compiled module, from the toolkit's disassembler."""
    triton = importlib.util.find_spec("triton")
    own = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton and triton.origin else ""
    tool = shutil.which(
        "cuobjdump", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin", str(own)])
    )
    text = said(tool, "--dump-resource-usage", str(library)) if tool else None
    if text and (plain := shutil.which("c++filt")):
        text = subprocess.run([plain], input=text, capture_output=True, text=True).stdout
    found = re.findall(r"Function (.+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text or "")
    return {brief(name): dict(zip(("registers", "stack", "shared", "local"), map(int, n))) for name, *n in found}


def brief(name: str) -> str:
    """A kernel's name; those of CUTLASS have thousands of letters."""
    return name if len(name) < 200 else f"{name[:160]}.. {hashlib.sha256(name.encode()).hexdigest()[:8]}"


if __name__ == "__main__":  # for wheels.sh: the sources and the commit
    print(sources(), commit())
