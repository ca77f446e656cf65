"""Slow float64 truths, one token at a time, from the objective; nothing here imports nestlearn."""
