"""The scripts import each other by name, as they do where they are run."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts/bench"))
