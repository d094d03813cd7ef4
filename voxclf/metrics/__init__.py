"""Scores of a prediction, all computed from additive tables: count blocks, add the counts, score once."""
