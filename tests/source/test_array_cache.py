"""The array cache keeps the values that fit, and has a fixed limit on a CPU."""

import numpy as np

from checkpoints_tools.source import array_cache


def test_values_that_fit_are_read_once_and_the_others_each_time():
    cache = array_cache.ArrayCache(limit=10 * 4)
    reads = []

    def value(name, numbers):
        def read():
            reads.append(name)
            return {"a": np.full(numbers, len(reads), np.float32)}

        return cache(name, read)["a"][0]

    first_pass = [value("six", 6), value("five", 5), value("four", 4), value("one", 1)]
    second_pass = [value("six", 6), value("five", 5), value("four", 4), value("one", 1)]
    assert reads == ["six", "five", "four", "one", "five", "one"]
    assert first_pass == [1, 2, 3, 4]
    assert second_pass == [1, 5, 3, 6]


def test_a_cpu_has_a_fixed_limit():
    assert array_cache.free_bytes() == array_cache.HOST_BYTES
