"""Models: each file holds one model, or one idea that serves several, as features in and probabilities out."""
