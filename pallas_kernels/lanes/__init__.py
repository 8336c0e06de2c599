"""Lane programs: GPU kernels written as the work of one lane of a warp.

``instructions`` specifies the language, ``ptx`` and ``emulator`` execute it, ``launch`` turns a program into
a kernel, ``device`` decides whether the device can run it, and ``rows`` holds what kernels on rows of
activations share.
"""
