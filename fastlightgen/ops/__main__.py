"""`python -m fastlightgen.ops` prints which compiled parts were built and which backend the operators use."""

import sys

from fastlightgen.config import report
from fastlightgen.ops import attention, gemm
from fastlightgen.ops.dispatch import describe, parts


def main() -> None:
    for name, (built, detail) in parts().items():
        print(f"{name:<20} {'built' if built else 'NOT built'}: {detail}")
    try:
        print(describe())
        print(attention.describe())
        print(gemm.describe())
    except ValueError as err:  # FLG_OPS or FLG_ATTENTION names what is not there
        sys.exit(report(err))


if __name__ == "__main__":
    main()
