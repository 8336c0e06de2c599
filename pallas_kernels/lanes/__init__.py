"""Lane programs: GPU kernels written as the work of one lane of a warp.

``instructions`` and ``registers`` specify the language. ``ptx`` compiles it for a GPU, ``emulator`` executes
it on NumPy. ``launch`` turns a program into a kernel, ``device`` tells whether the target device can run it,
and ``rows`` has helpers for kernels on rows of activations.
"""
