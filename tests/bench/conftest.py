"""The modules of bench/ import each other by name, as pytest and Python find them there."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "bench"))
