"""Reads the unquantized source checkpoint layer by layer, and its vocabulary in ranges of tokens."""
