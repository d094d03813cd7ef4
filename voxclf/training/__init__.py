"""Training: labelled feature rows or patches in, a model that `voxclf.models` can run out."""
