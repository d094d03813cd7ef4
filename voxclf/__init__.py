"""Every voxel of a 3D electron-microscopy volume, classified from a few labelled slices."""

__version__ = "0.1.0"
