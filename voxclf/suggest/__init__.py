"""Where to label next: small boxes ranked by what a model would learn from them. ``voxclf suggest``.

`suggestions.py` runs all of it, `box_scores.py` defines the factors, `files.py` writes it down.
"""

from voxclf.suggest.suggestions import Suggestion, Suggestions, suggest_boxes

__all__ = ["Suggestion", "Suggestions", "suggest_boxes"]
