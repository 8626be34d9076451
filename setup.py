"""Builds the compiled module with CMakeLists.txt and reports at the end which parts were built.

FLG_BUILD_CUDA=auto (default): build CUDA kernels if nvcc is found; without a C++ compiler the package is pure Python.
FLG_BUILD_CUDA=0: build no CUDA kernels.  FLG_BUILD_CUDA=1: fail if they cannot be built.
FLG_CUDA_ARCHS: GPU architectures, "90a" by default.
FLG_CUTLASS: a folder of CUTLASS headers for the matrix products; by default that of the nvidia-cutlass wheel. Install
the wheel before this package (pip install -c constraints.txt nvidia-cutlass): pip installs extras after the build.
"""

import json
import os
import shutil
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def tool(name: str) -> str:
    """The path of a build tool, found on PATH (pip adds its build environment) or beside this interpreter."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        raise BuildFailed(f"{name} was not found; pip install {name}")
    return found


class BuildFailed(Exception):
    """The reason, in one line, why a part was not built."""


def call(*command: str | Path) -> None:
    """Run a build command and print its output (shown by pip -v); raise BuildFailed with its first error."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    if done.returncode:
        raise BuildFailed(first_error(done.stdout))


def first_error(output: str) -> str:
    """Return the first error of a build as one line. CMake prints "CMake Error at FILE:LINE", then the message."""
    lines = [" ".join(line.split()) for line in output.splitlines() if line.strip()]
    at = next((i for i, line in enumerate(lines) if "error" in line.lower()), len(lines) - 1)
    below = takewhile(lambda line: not line.startswith(("Call Stack", "-- ", "CMake Error")), lines[at + 1 :])
    return " ".join(below) if lines[at].startswith("CMake Error at") else lines[at]


class CMakeBuild(build_ext):
    """Builds fastlightgen._C with CMake and writes the outcome to fastlightgen/_build.json."""

    def run(self) -> None:
        mode = os.environ.get("FLG_BUILD_CUDA", "auto")
        if mode not in ("auto", "0", "1"):
            raise SystemExit(f"FLG_BUILD_CUDA: got {mode!r}, wanted auto, 0 or 1")
        module = Path(self.get_ext_fullpath("fastlightgen._C")).resolve()
        module.parent.mkdir(parents=True, exist_ok=True)
        module.unlink(missing_ok=True)  # a failed build must not leave an old module behind
        report = self.attempt(module.parent, mode)
        (module.parent / "_build.json").write_text(json.dumps(report) + "\n")
        for part, state in report.items():
            print(f"fastlightgen: {part}: {state}", file=sys.stderr)

    def attempt(self, out: Path, mode: str) -> dict[str, str]:
        """Build and return the report. auto tries with CUDA, without CUDA, then pure Python, and keeps the reasons."""
        try:
            cuda, gemm = self.compile(out, mode)
            return {"C++ extension": "compiled", "CUDA kernels": cuda, "CUTLASS products": gemm}
        except BuildFailed as error:
            if mode == "1":
                raise SystemExit(f"FLG_BUILD_CUDA=1: the CUDA kernels were not built: {error}") from None
            if mode == "0":
                need = "they need the C++ extension"
                return {"C++ extension": str(error), "CUDA kernels": need, "CUTLASS products": need}
            report = self.attempt(out, "0")
            return report | ({"CUDA kernels": str(error)} if report["C++ extension"] == "compiled" else {})

    def compile(self, out: Path, mode: str) -> tuple[str, str]:
        """Configure and build; return CMake's one-line states of the CUDA kernels and of the CUTLASS products."""
        import pybind11  # imported here: pip runs this file to learn the requirements before it installs them

        build = Path(self.build_temp).resolve() / f"cmake-{mode}"
        shutil.rmtree(build, ignore_errors=True)
        options = {
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": out,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "FLG_BUILD_CUDA": mode,
            "FLG_CUTLASS": os.environ.get("FLG_CUTLASS", ""),
            "FLG_CUDA_ARCHS": os.environ.get("FLG_CUDA_ARCHS", "90a"),
        }
        cmake = tool("cmake")
        call(cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *(f"-D{key}={value}" for key, value in options.items()))
        call(cmake, "--build", build)
        return tuple((build / f"{part}_state.txt").read_text() for part in ("cuda", "gemm"))


setup(
    ext_modules=[Extension("fastlightgen._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    packages=[*find_namespace_packages(include=["fastlightgen*"], exclude=["*__pycache__*"]), "fastlightgen.configs"],
    package_dir={"fastlightgen.configs": "configs"},  # install the top-level folder configs/ inside the package
    package_data={
        "fastlightgen": ["py.typed", "ops/products.json"],
        "fastlightgen.page": ["*.html", "*.css", "*.js"],
        "fastlightgen.configs": ["**/*.yaml", "**/*.json", "**/*.safetensors", "cluster/*"],
    },
)
