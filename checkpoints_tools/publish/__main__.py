"""``python -m checkpoints_tools.publish``."""

import sys

from checkpoints_tools.publish.command import main

if __name__ == "__main__":
    sys.exit(main())
