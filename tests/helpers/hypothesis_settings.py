"""Examples of Hypothesis: always the same few; more, also always the same, where CI is set.

With ``RANDOM_EXAMPLES`` set they are new in each run. CI does not set it, because a landing must not fail for
an example that has nothing to do with it.
"""

import os

from hypothesis import settings
from hypothesis import strategies as st

IN_CI = bool(os.environ.get("CI"))
RANDOM = bool(os.environ.get("RANDOM_EXAMPLES"))


def examples(count: int, in_ci: int | None = None) -> settings:
    """Tries ``count`` examples; in CI ``in_ci``, by default five times as many."""
    most = (in_ci or 5 * count) if IN_CI else count
    return settings(max_examples=most, derandomize=not RANDOM, deadline=None)


def shapes(*typical: tuple[int, ...]) -> st.SearchStrategy[tuple[int, ...]]:
    """Draws one of the typical shapes; in CI, any shape up to the largest of them.

    Every new shape compiles programs, which takes longer than the test itself.
    """
    if not IN_CI:
        return st.sampled_from(typical)
    return st.tuples(*(st.integers(1, max(sizes)) for sizes in zip(*typical, strict=True)))
