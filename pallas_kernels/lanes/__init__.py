"""Lane programs: GPU kernels written as what one lane of a warp does.

``instructions`` is what they are written in, ``ptx`` and ``emulator`` carry them out, ``launch`` makes a
kernel of one, ``device`` says where they run.
"""
