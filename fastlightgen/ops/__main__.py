"""`python -m fastlightgen.ops`: which parts of the compiled code were built, and which backend the operators use."""

from fastlightgen.ops import attention
from fastlightgen.ops.dispatch import describe, parts

if __name__ == "__main__":
    for name, (there, detail) in parts().items():
        print(f"{name:<20} {'built' if there else 'NOT built'}: {detail}")
    print(describe())
    print(attention.describe())
