"""What is read once and stays, and what is read again."""

import numpy as np

from checkpoints_tools.source import array_cache as kept


def test_what_fits_is_read_once_and_the_rest_each_time():
    keep = kept.ArrayCache(limit=10 * 4)
    reads = []

    def value(name, numbers):
        def read():
            reads.append(name)
            return {"a": np.full(numbers, len(reads), np.float32)}

        return keep(name, read)["a"][0]

    first_pass = [value("six", 6), value("five", 5), value("four", 4), value("one", 1)]
    second_pass = [value("six", 6), value("five", 5), value("four", 4), value("one", 1)]
    assert reads == ["six", "five", "four", "one", "five", "one"]
    assert first_pass == [1, 2, 3, 4]
    assert second_pass == [1, 5, 3, 6]


def test_a_cpu_gives_a_fixed_room():
    assert kept.room() == kept.HOST_BYTES
