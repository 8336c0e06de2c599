"""Fixed-precision quantizers to compare with: RTN, GPTQ, AWQ, with groups of 128 inputs and zero points."""
