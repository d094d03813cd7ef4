"""Blockwise execution: knows blocks and volumes, nothing of models.

Two verbs carry everything that touches a whole volume: ``run.map_blocks`` writes volumes,
``run.reduce_blocks`` sums small results.
"""
