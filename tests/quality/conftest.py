"""Makes the helpers of ``tests/hf`` importable here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))
