"""Reads the unquantized source checkpoint one layer, or one range of the vocabulary, at a time."""
