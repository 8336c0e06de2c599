"""The emulator's registers: one number for every thread."""

import numpy as np

from pallas_kernels.lanes.registers import Kind, Value

DTYPE = {"i32": np.int32, "i64": np.int64, "f32": np.float32, "bool": np.bool_}
"""NumPy dtype of each kind."""

COMPARISONS = {"lt": np.less, "ge": np.greater_equal, "eq": np.equal}
UNSIGNED = {"shr": np.right_shift, "div": np.floor_divide, "rem": np.remainder}
FUNCTIONS = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": np.left_shift,
}


class LaneValue(Value):
    """One register of every thread: an array ``[threads of all CTAs]``."""

    def __init__(self, data: np.ndarray, kind: Kind):
        self.data: np.ndarray = np.ascontiguousarray(data, DTYPE[kind])
        self.kind = kind

    def binary(self, operation, other):
        a = self.data
        b = other.data if isinstance(other, LaneValue) else np.asarray(other).astype(DTYPE[self.kind])
        if self.kind != "f32" and operation not in ("div", "rem"):  # NumPy warns of none of these.
            return _binary(operation, a, b, self.kind)
        with np.errstate(all="ignore"):
            return _binary(operation, a, b, self.kind)


def _binary(operation: str, a: np.ndarray, b: np.ndarray, kind: Kind) -> LaneValue:
    if operation in COMPARISONS:
        return LaneValue(COMPARISONS[operation](a, b), "bool")
    if operation in UNSIGNED:
        return LaneValue(UNSIGNED[operation](a.view(np.uint32), b.view(np.uint32)).view(np.int32), "i32")
    return LaneValue(FUNCTIONS[operation](a, b), kind)
