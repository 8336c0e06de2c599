"""``python -m grinqh_jax.generate``, the same command as ``grinqh-jax generate``."""

from grinqh_jax.cli import command
from grinqh_jax.cli.generate import main

if __name__ == "__main__":
    command.leave(main())
