"""`python -m fastlightgen.ops` prints which compiled parts were built and which backend the operators use."""

from fastlightgen.ops import attention, gemm
from fastlightgen.ops.dispatch import describe, parts

if __name__ == "__main__":
    for name, (built, detail) in parts().items():
        print(f"{name:<20} {'built' if built else 'NOT built'}: {detail}")
    print(describe())
    print(attention.describe())
    print(gemm.describe())
