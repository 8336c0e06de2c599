"""The public product at one level: one function with several implementations, chosen by name or by device."""

from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.dispatch import first_supporting
from pallas_kernels.matmul import mosaic_gpu, reference, tuning, xla
from pallas_kernels.weight import NestedWeight
from pallas_kernels.x64 import without_x64

LevelImplementation = Literal["reference", "xla", "mosaic_gpu"]

IMPLEMENTATIONS: dict[LevelImplementation, ModuleType] = {
    "xla": xla,
    "mosaic_gpu": mosaic_gpu,
    "reference": reference,
}
"""Implementations by name, in order of preference. Each module has two functions: ``supports(x [rows, K],
weight, level)`` returns None, or the reason why it cannot run; ``matmul(x [rows, K], weight, level)`` returns
float32 ``[rows, N]``. The kernel comes before XLA where the tuning table says that it is faster."""


@without_x64
def level_matmul(
    x: Float[Array, "*rows k"],
    weight: NestedWeight,
    level: int,
    *,
    implementation: LevelImplementation | None = None,
) -> Float32[Array, "*rows n"]:
    """Computes ``y = x @ W``, and reads the first ``2 * level`` bits of every input channel of W.

    All rows and channels have the same level, so unlike ``graded_matvec`` the product needs no thresholds and
    no lists. From about 9 rows on, the channels that at least one row reads at a high level are most of them.

    Args:
      x: Activations ``[in_features]`` or ``[..., in_features]``; float32, bfloat16 or float16.
      weight: The nested weight.
      level: Level of all input channels, 1 to ``weight.num_planes``; static under ``jit``.
      implementation: Name of the implementation. The default is the first that supports the arguments and
        the device, or the kernel where it was measured to be faster (``tuning``).

    Returns:
      float32 ``[..., out_features]``. For bfloat16 x, the weight may be rounded to bfloat16. All sums are
      float32. A NaN or Inf in a row of x makes that row of y non-finite.

    Raises:
      ValueError: Shapes or dtypes do not fit, the weight lacks the level, or the implementation is unknown.
      NotImplementedError: No implementation supports the arguments, or the named one does not. The message
        gives the reasons.
    """
    _check(x, weight, level)
    rows = x.reshape(-1, x.shape[-1])
    y = IMPLEMENTATIONS[choose(rows, weight, level, implementation)].matmul(rows, weight, level)
    return y.reshape(*x.shape[:-1], weight.out_features)


def choose(
    x: Array | jax.ShapeDtypeStruct,
    weight: NestedWeight,
    level: int,
    implementation: LevelImplementation | None = None,
) -> LevelImplementation:
    """Returns the implementation that ``level_matmul`` runs for these arguments on the default device.

    Looks only at shapes and dtypes, so x ``[rows, in_features]`` and the weight may be abstract.

    Raises:
      ValueError, NotImplementedError: As ``level_matmul``.
    """
    implementations = IMPLEMENTATIONS
    if implementation is None and tuning.kernel_pays(x.shape[0], level):
        implementations = {"mosaic_gpu": mosaic_gpu, **IMPLEMENTATIONS}
    return first_supporting(
        "no implementation of level_matmul fits", implementations, implementation, x, weight, level
    )


def _check(x, weight: NestedWeight, level: int) -> None:
    """Raises ValueError, which names all problems, if the arguments do not fit."""
    problems = []
    if x.ndim < 1 or x.shape[-1] != weight.in_features:
        problems.append(f"x has shape {x.shape}, expected [..., {weight.in_features}]")
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        problems.append(f"x has dtype {x.dtype}, expected float32, bfloat16 or float16")
    if level not in range(1, weight.num_planes + 1):
        problems.append(f"level is {level!r}, expected 1 to {weight.num_planes}, the planes of the weight")
    if problems:
        raise ValueError("level_matmul: " + "; ".join(problems))
