"""Makes the helpers of ``tests/hf`` and ``tests/checkpoints_tools`` importable here."""

import sys
from pathlib import Path

for _helpers in ("hf", "checkpoints_tools"):
    sys.path.insert(0, str(Path(__file__).parents[1] / _helpers))
