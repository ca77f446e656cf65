"""The networks: HOPE and its parts as plain modules; `hf.py` is the Hugging Face seam."""
