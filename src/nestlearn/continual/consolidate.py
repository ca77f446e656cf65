"""Consolidation: what the levels of many streams have learned, written into the slow weights of a new model."""
