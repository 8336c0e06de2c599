"""The options of a conversion, from which ``plan`` derives its decisions."""

import dataclasses

PRINCIPAL, ORIGINAL = BASES = ("principal", "original")
"""Bases of the residual stream: its principal axes, or the channels that the model was trained with."""

SENSITIVITY, UNIFORM = SPLITS = ("sensitivity", "uniform")
"""Splits of the bits over the linear layers: by sensitivity, or the same mean for each."""

TRAINED, FITTED, NONE = GAINS = ("trained", "fitted", "none")
"""Level gains: trained end to end, fitted by least squares where they help, or all 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a conversion.

    Attributes:
      max_bits: Bits of the stored codes: 2, 4, 6 or 8.
      quantizer: Key of ``QUANTIZERS``.
      basis: One of ``BASES``.
      split: One of ``SPLITS``.
      gains: One of ``GAINS``. Trained level gains need enough calibration tokens and more than one level;
        otherwise they are fitted.
      refit: Whether weights are fitted to their graded inputs (see ``refit``). A projection with too few
        calibration tokens for its inputs keeps its weights.
    """

    max_bits: int = 8
    quantizer: str = "rtn"
    basis: str = PRINCIPAL
    split: str = SENSITIVITY
    gains: str = TRAINED
    refit: bool = True
