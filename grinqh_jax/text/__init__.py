"""Text input and output: tokenizers, and documents read from files."""
