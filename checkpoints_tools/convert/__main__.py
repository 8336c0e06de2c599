"""``python -m checkpoints_tools.convert``."""

import sys

from checkpoints_tools.convert.command import main

if __name__ == "__main__":
    sys.exit(main())
