"""Lane programs: GPU kernels written as the work of one lane of a warp.

``instructions`` specifies the language, ``ptx`` and ``emulator`` execute it, ``launch`` turns a program into
a kernel, ``device`` decides whether the target device can run it, and ``rows`` has helpers for kernels on
rows of activations.
"""
