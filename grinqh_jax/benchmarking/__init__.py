"""Speed measurements, and models with random weights to measure."""
