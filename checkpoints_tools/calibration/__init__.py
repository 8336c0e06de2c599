"""Calibration: activation statistics of every linear layer, and the thresholds that follow from them."""
