"""Inputs for the benchmarks of scale: phantoms on disk of any size, and a model to classify them with."""

from __future__ import annotations

from pathlib import Path

import tifffile
from record import run_voxclf

from voxclf.datasets import EndlessPhantom, Phantom, make_phantom, sparse_labels
from voxclf.geometry import Region, Zyx, split_into_blocks
from voxclf.volume import create_volume

VOXEL_SIZE = (5.0, 5.0, 5.0)
SLAB: Zyx = (64, 512, 512)  # 16 MB, whole chunks


def write_endless(path: Path, shape: Zyx) -> None:
    """Write an endless phantom as OME-Zarr, block by block; only the finest level is filled."""
    phantom = EndlessPhantom(shape, VOXEL_SIZE)
    volume = create_volume(path, shape, 1, phantom.dtype, VOXEL_SIZE, kind="image")
    for block in split_into_blocks(shape, SLAB):
        core = block.core
        volume.write(core.start, phantom.read(core.start, core.stop)[None])


def write_labelled(folder: Path, phantom: Phantom) -> tuple[Path, Path]:
    """Write a phantom and labels on three slices of it as TIFF; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    volume, labels = folder / "volume.tif", folder / "labels.tif"
    tifffile.imwrite(volume, phantom.image)
    tifffile.imwrite(labels, sparse_labels(phantom))
    return volume, labels


def fit_on_phantom(folder: Path, size: int = 128) -> Path:
    """Fit the default model on a small phantom; returns the model's folder."""
    volume, labels = write_labelled(folder, make_phantom(size, VOXEL_SIZE))
    model = folder / "model"
    spell_size = ",".join(f"{s:g}" for s in VOXEL_SIZE)
    run_voxclf("fit", volume, labels, "-o", model, "--voxel-size", spell_size, "--workers", 2)
    return model


def centred_region(shape: Zyx, inner: Zyx, unit: int = 64) -> Region:
    """Place a box in the middle of a volume, its corner on a multiple of the chunks."""
    z, y, x = (max(0, (n - m) // 2 // unit * unit) for n, m in zip(shape, inner, strict=True))
    return Region((z, y, x), (z + inner[0], y + inner[1], x + inner[2]))
