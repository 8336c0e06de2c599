"""Text in and out: tokenizers, and documents read from files."""
