"""A dense conditional random field for volumes: an image and class probabilities in, better ones out.

Knows arrays and nothing else. `DenseCRF` in `meanfield.py` is the interface; torch is imported only by
`torch_backend.py`, and numba only when a volume is refined.
"""

from crf.meanfield import DenseCRF
from crf.potentials import symmetric_part

__all__ = ["DenseCRF", "symmetric_part"]
