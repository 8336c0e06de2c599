"""Fixed-precision quantizers for comparison: RTN, GPTQ and AWQ, with groups of 128 inputs and zero points."""
