"""Reading the unquantized source checkpoint one layer, or one block of the vocabulary, at a time."""
