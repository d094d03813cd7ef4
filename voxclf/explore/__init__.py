"""Look before training: what is labelled, what grey values tell, and whether the volume is sound.

``voxclf explore``. `exploration.py` runs all of it; `data_warnings.py` says what is wrong; `page.py` writes it down.
"""

from voxclf.explore.exploration import Exploration, explore

__all__ = ["Exploration", "explore"]
