"""Two segmentations of one volume compared. ``voxclf diff``.

`volume_diff.py` runs all of it, `objects.py` relates the objects of both, `page.py` writes it down.
"""

from voxclf.diff.volume_diff import Diff, compare_volumes

__all__ = ["Diff", "compare_volumes"]
