"""``python -m grinqh_jax.generate``, the same command as ``grinqh-jax generate``."""

import sys

from grinqh_jax.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
