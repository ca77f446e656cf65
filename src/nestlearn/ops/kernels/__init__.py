"""Triton twins of what stands in `ops/`: imported when a GPU, or TRITON_INTERPRET=1, can run them."""
