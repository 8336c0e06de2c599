"""Trials of other refits of the weights. Level gains are fitted, not trained.

* ``refit-all-digits``: refitted weights in all digits, with little damping and no bound: the converter before
  2026-11-29, except that a group's scale is that of the original weights.
* ``refit-unbounded``: any change at full precision is allowed.
* ``refit-one-digit``: only the first digit is that of the refitted weight.
* ``refit-little-damping``: a tenth of the damping.
* ``refit-graded-inputs``: exact inputs count a quarter as much.
"""

import math

from trial import NOT_TRAINED, Trial, patched

from checkpoints_tools.convert import least_squares, refitted_codes

REFITS = {
    "refit": Trial("the product, gains fitted", NOT_TRAINED),
    "refit-all-digits": Trial(
        "all digits refitted, little damping, no bound",
        NOT_TRAINED,
        patched(
            (refitted_codes, "REFITTED_DIGITS", 4),
            (refitted_codes, "EXCESS", math.inf),
            (least_squares, "DAMPING", 0.01),
        ),
    ),
    "refit-unbounded": Trial("no bound", NOT_TRAINED, patched((refitted_codes, "EXCESS", math.inf))),
    "refit-one-digit": Trial(
        "one digit refitted", NOT_TRAINED, patched((refitted_codes, "REFITTED_DIGITS", 1))
    ),
    "refit-little-damping": Trial("little damping", NOT_TRAINED, patched((least_squares, "DAMPING", 0.01))),
    "refit-graded-inputs": Trial(
        "exact inputs count a quarter as much",
        NOT_TRAINED,
        patched((least_squares, "FULL_PRECISION_WEIGHT", 0.5)),
    ),
}
