"""What nvcc makes of the kernels: registers, spills, instructions per row, width of the memory accesses.

`python tests/ops/machine_code.py` writes them to bench/results/kernels-static.json. They are counts, not speeds; no GPU
is needed.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "kernels-static.json"
SOURCES = sorted((ROOT / "csrc" / "ops").glob("*/*.cu"))
ARCHS = ("80", "90a", "100")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
DTYPES = {"13__nv_bfloat16": "bfloat16", "6__half": "float16", "f": "float32"}
VARIANTS = {"forward": "with y", "backward": "with a gate"}  # what a kernel's last template argument, a bool, says


@dataclass
class Kernel:
    """One kernel of a cubin. Counts are per thread."""

    name: str
    dtype: str | None  # of the rows
    dim: int | None  # width of the rows, if the kernel is for one width
    threads: int | None
    variant: str | None
    registers: int
    spilled: int  # bytes
    shared: int  # bytes
    instructions: int
    per_row: int | None  # instructions of the loop over rows for each row, with both sides of its branches
    ahead: int | None  # barriers of the loop that the loads of rows pass, at least, before anything waits for them
    loads: dict[str, int]  # global loads by their width in bits
    stores: dict[str, int]
    text: str  # the disassembly


def cuobjdump() -> str | None:
    """The path of the CUDA toolkit's disassembler, or of triton's copy."""
    triton = importlib.util.find_spec("triton")
    own = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton else None
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin") or (
        shutil.which("cuobjdump", path=str(own)) if own else None
    )  # fmt: skip


def nvcc_version() -> str:
    said = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", said)[1]


def compile_for(arch: str, source: Path, folder: Path, *flags: str | Path) -> tuple[Path, str] | None:
    """Compile a source; return the cubin and ptxas's output, or None if this nvcc does not know the architecture."""
    out = folder / f"{source.stem}.cubin"
    command = [NVCC, "-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", *flags]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    command += [f"-I{ROOT / 'csrc' / 'include'}", "-Xptxas", "-v", "-cubin", "-o", out, source]
    done = subprocess.run(command, capture_output=True, text=True)
    if "Unsupported gpu architecture" in done.stderr:
        return None
    assert done.returncode == 0, done.stderr
    return out, done.stderr


def kernels(arch: str, cubin: Path, said: str, tool: str) -> list[Kernel]:
    """The kernels of a cubin from ptxas's output and the disassembly."""
    sass = subprocess.run([tool, "--dump-sass", cubin], capture_output=True, text=True, check=True).stdout
    texts = {part.split()[0]: part for part in re.split(r"Function : ", sass)[1:]}
    entry = r"entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    found = re.findall(entry, said, re.S)
    assert len(found) == len(texts), "ptxas and the disassembler name different kernels"
    return [
        kernel(arch, name, int(out) + int(back), int(used), rest, texts[name]) for name, out, back, used, rest in found
    ]


def kernel(arch: str, symbol: str, spilled: int, registers: int, rest: str, text: str) -> Kernel:
    parts = re.search(r"3flg\d+([a-z_]+?)_kernel(?:I(13__nv_bfloat16|6__half|f))?", symbol)
    width = re.search(r"5WidthILi(\d+)ELb([01])", symbol)
    threads, exact = (int(width[1]), width[2] == "1") if width else (None, False)
    flag = re.search(r"ELb([01])EEEv\d", symbol)
    rows = rows_of_loop(parts[1], exact and parts[2] != "f", bool(flag and flag[1] == "1"), arch)
    lines = [(int(at, 16), line) for at, line in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", text, re.M)]
    back = [(to, at) for at, line in lines if "BRA" in line and (to := target(line)) is not None and to < at]
    # The loop over rows is long and lies inside the loop over runs, if there is one.
    size, first = min((loop for to, at in back if (loop := ((at - to) // 16 + 1, to))[0] > 100), default=(0, 0))
    return Kernel(
        parts[1], DTYPES.get(parts[2]), threads * 16 if exact else None, threads,
        VARIANTS.get(parts[1]) if flag and flag[1] == "1" else None,
        registers, spilled, int(m[1]) if (m := re.search(r"(\d+) bytes smem", rest)) else 0,
        len(lines), size // rows or None, ahead(text, first, size),
        widths("LDG", lines), widths("STG", lines), text,
    )  # fmt: skip


def ahead(text: str, first: int, size: int) -> int | None:
    """The smallest number of barriers that a load of a row passes before the first wait for its scoreboard.

    A load names one of six scoreboards and a wait is for all loads that named it, so a wait for another load can end
    the overlap. The control bits of an instruction, since Volta: a mask of scoreboards to wait for from bit 116 on, and
    the scoreboard that it sets from bit 110 on.
    """
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);\s+/\* 0x[0-9a-f]+ \*/\s+/\* 0x([0-9a-f]+) \*/", text)
    loop = [(line, int(high, 16)) for at, line, high in found if first <= int(at, 16) < first + 16 * size]
    least = None
    for i, (line, high) in enumerate(loop):
        if "LDG.E.EF" in line:  # rows are read once: evict first
            barriers = 0
            for other, bits in loop[i + 1 :] + loop[:i]:
                if bits >> 52 >> (high >> 46 & 7) & 1:
                    break
                barriers += "BAR.SYNC" in other
            least = min(barriers, barriers if least is None else least)
    return least


def rows_of_loop(name: str, narrow: bool, flag: bool, arch: str) -> int:
    """Rows that one turn of a kernel's loop works on. `narrow`: rows of 16-bit numbers in one of the exact widths."""
    two = (name == "forward" and not flag) or (name == "norm_backward" and arch == "90a")
    return 2 if narrow and two else 1


def target(line: str) -> int | None:
    """The address that a branch jumps to."""
    found = re.search(r"0x([0-9a-f]+)", line)
    return int(found[1], 16) if found else None


def widths(kind: str, lines: list[tuple[int, str]]) -> dict[str, int]:
    """Number of accesses of a kind by their width in bits."""
    counts: dict[str, int] = {}
    for _, line in lines:
        if found := re.search(rf"\b{kind}\.(\S+)", line):
            size = re.search(r"(?:^|\.)(?:[SU])?(8|16|64|128)(?:\.|$)", found[1])
            counts[size[1] if size else "32"] = counts.get(size[1] if size else "32", 0) + 1
    return counts


def main() -> None:
    tool = cuobjdump()
    if NVCC is None or tool is None:
        raise SystemExit("nvcc or cuobjdump was not found; install the CUDA toolkit, or triton for cuobjdump")
    rows = []
    for arch in ARCHS:
        for source in SOURCES:
            with tempfile.TemporaryDirectory() as folder:
                made = compile_for(arch, source, Path(folder))
                for k in kernels(arch, *made, tool) if made else []:
                    row = {"arch": f"sm_{arch}", "source": source.stem} | asdict(k)
                    del row["text"]
                    if k.dim or not k.threads:  # leave out the kernels for widths that no released network has
                        rows.append(row)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    RESULTS.write_text(f'{{"nvcc": "{nvcc_version()}", "kernels": [\n{lines}\n]}}\n')
    print(f"{len(rows)} kernels in {RESULTS}")


if __name__ == "__main__":
    main()
