"""The emulator's registers: one number for every thread."""

import numpy as np

from pallas_kernels.lanes.registers import Kind, Value

DTYPE = {"i32": np.int32, "i64": np.int64, "f32": np.float32, "bool": np.bool_}
"""NumPy dtype of each kind."""


class LaneValue(Value):
    """One register of every thread: an array ``[threads of all CTAs]``."""

    def __init__(self, data: np.ndarray, kind: Kind):
        self.data: np.ndarray = np.ascontiguousarray(data, DTYPE[kind])
        self.kind = kind

    def binary(self, operation, other):
        a = self.data
        b = other.data if isinstance(other, LaneValue) else np.asarray(other).astype(DTYPE[self.kind])
        with np.errstate(all="ignore"):
            if operation in ("lt", "ge", "eq"):
                compare = {"lt": np.less, "ge": np.greater_equal, "eq": np.equal}[operation]
                return LaneValue(compare(a, b), "bool")
            if operation in ("shr", "div", "rem"):
                a, b = a.view(np.uint32), np.asarray(b).view(np.uint32)
                unsigned = {"shr": np.right_shift, "div": np.floor_divide, "rem": np.remainder}[operation]
                return LaneValue(unsigned(a, b).view(np.int32), "i32")
            function = {
                "add": np.add,
                "sub": np.subtract,
                "mul": np.multiply,
                "and": np.bitwise_and,
                "or": np.bitwise_or,
                "xor": np.bitwise_xor,
                "shl": np.left_shift,
            }[operation]
            return LaneValue(function(a, b), self.kind)
