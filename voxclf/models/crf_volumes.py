"""The volumes that a CRF reads together."""

from __future__ import annotations

from dataclasses import dataclass

from voxclf.geometry import VoxelSize
from voxclf.labels import LabelSet
from voxclf.volume import Volume


@dataclass(frozen=True)
class CrfVolumes:
    """Images whose edges a CRF follows, and the probabilities that it refines: volumes of one shape.

    Parameters
    ----------
    images : tuple of Volume
        The image, and the guide if there is one; C channels altogether.
    probabilities : Volume
    label_set : LabelSet
        The K classes of the probabilities.
    """

    images: tuple[Volume, ...]
    probabilities: Volume
    label_set: LabelSet

    @property
    def inputs(self) -> list[Volume]:
        """In the order in which the step takes them."""
        return [*self.images, self.probabilities]

    @property
    def n_channels(self) -> int:
        """C."""
        return sum(volume.n_channels for volume in self.images)

    @property
    def voxel_size_nm(self) -> VoxelSize:
        """Of all volumes."""
        return self.images[0].voxel_size_nm
