"""A volume, its labels and its probabilities in a viewer, from local files. ``voxclf view``.

`scene.py` says what is shown and `server.py` hands it to the browser.
"""

from voxclf.view.scene import view

__all__ = ["view"]
