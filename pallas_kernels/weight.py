"""The nested quantized weight: a pytree dataclass, with the invariants and formulas of the format."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NestedWeight:
    """A weight ``W[in_features, out_features]`` of ``y = x @ W``, stored as nested bit planes.

    Let ``P`` be the number of planes, ``K, N = padded_shape(in_features, out_features)``, ``g = k // 128``
    the group of channel ``k``, and ``d_f[k, n]`` the digit of plane ``f`` for channel ``k`` and output ``n``.
    Level ``l`` (``0 <= l <= P``, which is ``2 * l`` bits) reads the weight as

        ``w_0[k, n] = 0``
        ``w_l[k, n] = scales[g, n] * (sum_{f < l} d_f[k, n] * 4**-f  +  0.5 * 4**(1 - l)  -  2)``.

    The half step ``0.5 * 4**(1 - l)`` puts the value in the middle of the interval that the first ``l``
    digits leave open. Because ``sum_{f < l} 1.5 * 4**-f = 2 - 0.5 * 4**(1 - l)``, the same value can be
    written without a term that depends on the level. All implementations compute this form:

        ``w_l[k, n] = scales[g, n] * sum_{f < l} (d_f[k, n] - 1.5) * 4**-f``.

    Weights are denser near 0 than near the ends of the range, so the middle of a wide interval is larger in
    magnitude than the mean of the weights in it: by about 15 per cent at level 1. A weight may therefore have
    a gain for each level, which ``checkpoints_tools`` fits: level ``l`` reads ``level_gains[l - 1] * w_l``.

    Construction checks nothing, so the arrays may be traced or abstract. Code that reads weights from outside
    calls ``check``.

    Attributes:
      planes: uint32 ``[P, K, N // 16]``; ``layout`` gives the order of the outputs in a row. A graded matvec
        never reads padding channels (``k >= in_features``). Padding outputs have scale 0. Both hold zeros, so
        that equal weights are equal bytes.
      scales: float16 ``[K // 128, N]``, finite, ``>= 0``. A scale of 0 makes its group exactly 0.
      in_features: Logical K, static under ``jit``.
      out_features: Logical N, static under ``jit``.
      level_gains: float32 ``[P]``: gains of levels ``1..P``, finite, ``> 0``. The gain of the highest level
        is 1. None means that all are 1.
    """

    planes: jax.Array
    scales: jax.Array
    in_features: int = dataclasses.field(metadata={"static": True})
    out_features: int = dataclasses.field(metadata={"static": True})
    level_gains: jax.Array | None = None

    @property
    def num_planes(self) -> int:
        """Number of stored planes ``P``, which is also the highest level."""
        return self.planes.shape[0]

    @property
    def max_bits(self) -> int:
        """Bits of the highest level, ``2 * P``."""
        return layout.DIGIT_BITS * self.num_planes

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, padding included."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @classmethod
    def abstract(cls, in_features: int, out_features: int, max_bits: int = 8) -> "NestedWeight":
        """Returns a weight of ``jax.ShapeDtypeStruct`` leaves: the shapes and dtypes that a checkpoint holds.

        Raises:
          ValueError: ``max_bits`` is not 2, 4, 6 or 8.
        """
        k, n = layout.padded_shape(in_features, out_features)
        planes = num_planes(max_bits)

        def abstract(shape: tuple[int, ...], dtype) -> Any:  # Any: it takes the place of an array.
            return jax.ShapeDtypeStruct(shape, dtype)

        return cls(
            planes=abstract((planes, k, n // layout.WORD_DIGITS), jnp.uint32),
            scales=abstract((k // layout.GROUP, n), jnp.float16),
            in_features=in_features,
            out_features=out_features,
            level_gains=abstract((planes,), jnp.float32),
        )

    def check(self, name: str = "weight") -> None:
        """Checks shapes and dtypes, and the values of scales and level gains.

        It need not read the planes, because all their values are valid.

        Args:
          name: Name of the tensor in the error.

        Raises:
          ValueError: Invariants are broken; the message names all of them.
        """
        problems = []
        planes, scales = tuple(self.planes.shape), tuple(self.scales.shape)
        k, n = layout.padded_shape(self.in_features, self.out_features)
        if len(planes) != 3 or not 1 <= planes[0] <= layout.MAX_PLANES:
            problems.append(f"planes has shape {planes}, expected [1..4, {k}, {n // layout.WORD_DIGITS}]")
        elif planes[1:] != (k, n // layout.WORD_DIGITS):
            problems.append(f"planes has shape {planes}, expected {(planes[0], k, n // layout.WORD_DIGITS)}")
        if scales != (k // layout.GROUP, n):
            problems.append(f"scales has shape {scales}, expected {(k // layout.GROUP, n)}")
        if self.planes.dtype != jnp.uint32:
            problems.append(f"planes has dtype {self.planes.dtype}, expected uint32")
        if self.scales.dtype != jnp.float16:
            problems.append(f"scales has dtype {self.scales.dtype}, expected float16")
        else:
            values = np.asarray(self.scales)
            if not np.isfinite(values).all() or (values < 0).any():
                problems.append("scales holds negative or non-finite values")
        problems += self._level_gain_problems()
        if problems:
            raise ValueError(f"{name}: " + "; ".join(problems))

    def _level_gain_problems(self) -> list[str]:
        """Returns a message for each broken invariant of ``level_gains``."""
        if self.level_gains is None:
            return []
        if self.level_gains.dtype != jnp.float32 or self.level_gains.shape != self.planes.shape[:1]:
            actual = f"{self.level_gains.dtype} {tuple(self.level_gains.shape)}"
            return [f"level_gains is {actual}, expected float32 {tuple(self.planes.shape[:1])}"]
        gains = np.asarray(self.level_gains)
        if not np.isfinite(gains).all() or (gains <= 0).any() or gains[-1] != 1:
            return [f"level_gains is {gains.tolist()}, expected finite numbers above 0, the last of them 1"]
        return []


def num_planes(max_bits: int) -> int:
    """Returns the number of planes of a code of ``max_bits`` bits.

    Raises:
      ValueError: ``max_bits`` is not 2, 4, 6 or 8.
    """
    if max_bits not in (2, 4, 6, 8):
        raise ValueError(f"max_bits must be 2, 4, 6 or 8, not {max_bits!r}")
    return max_bits // layout.DIGIT_BITS
