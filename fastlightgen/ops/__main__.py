"""`python -m fastlightgen.ops` prints which compiled parts were built and which backend the operators use."""

from fastlightgen.config import guarded
from fastlightgen.ops import attention, gemm
from fastlightgen.ops.dispatch import describe, parts


def main() -> None:
    for name, (built, detail) in parts().items():
        print(f"{name:<20} {'built' if built else 'NOT built'}: {detail}")
    print(describe())  # FLG_OPS or FLG_ATTENTION may name what is not there
    print(attention.describe())
    print(gemm.describe())


if __name__ == "__main__":
    guarded(main)
