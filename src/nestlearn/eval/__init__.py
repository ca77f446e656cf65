"""Measuring a trained model and showing what was measured; imports `models` and `data`, never `train`."""
