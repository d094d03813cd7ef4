"""Several models on the same labels, split and time budget. ``voxclf compare``.

`comparison.py` runs all of it: `contestants.py` and `split.py` on what, `runs.py` and `cost.py` how, `scores.py` who is
better. `page.py` and `figures.py` write it down.
"""

from voxclf.compare.comparison import Comparison, compare_models

__all__ = ["Comparison", "compare_models"]
