"""The seam certificate: proof, for every prediction, that it is what the network says patch by patch.

A network is trained on patches and evaluated densely, in tiles, folded and reordered, on whatever processor there is.
All of that is exact in theory. So some voxels of every block, half of them where blocks meet, are classified again
the slow way: the plain network, in float32, on the patch around that voxel alone, read from the volume anew. The
largest difference is kept with the output. Above the tolerance the run stops: a halo is wrong, or the device's
libraries are (both have happened; convolutions of large float16 inputs were silently wrong in released cuDNN).

Known per block and logged beside the ledger, so a resumed run certifies the blocks done before too.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from voxclf.engine.step import Step
from voxclf.engine.transfer import read_block
from voxclf.errors import CertificateError
from voxclf.geometry import UNIT, Block, Region, Zyx, add, make_block
from voxclf.volume import Volume

VOXELS_PER_BLOCK = 16
"""Patches recomputed per block. For 4conv they cost as much as 12 000 dense voxels, 0.6 % of a block of 128 cubed."""
TOLERANCES = {"32": 1e-4, "bf16": 0.1}
"""Largest difference of a probability. Float32 rounding is 1e-7 to 1e-6; bf16 has 8 bits, and 0.03 was seen."""


class WindowClassifier(Protocol):
    """Classifies single voxels from the piece of the volume around each: the reference of a certificate."""

    @property
    def halo(self) -> Zyx: ...  # noqa: D102

    def classify_windows(self, windows: np.ndarray) -> np.ndarray:
        """Map raw windows (B, 1, 1 + 2 hz, 1 + 2 hy, 1 + 2 hx) to probabilities (B, K)."""
        ...


@runtime_checkable
class CertifiedStep(Protocol):
    """A step that can be compared with a slow reference: at voxels of a grid, up to a tolerance."""

    @property
    def reference(self) -> WindowClassifier: ...  # noqa: D102
    @property
    def stride(self) -> Zyx: ...  # noqa: D102
    @property
    def tolerance(self) -> float: ...  # noqa: D102


@dataclass
class SeamCertificate:
    """Checks some voxels of every block against their patches; call it with a block and its probabilities.

    Parameters
    ----------
    reference : WindowClassifier
        The plain network.
    volume : Volume
        What is predicted; read anew, one window per voxel.
    log : Path
        One line of JSON per block.
    tolerance : float
        Largest difference of a probability that is put down to rounding.
    stride : (z, y, x)
        Only voxels at multiples of it are compared: others are interpolated in a coarse prediction.
    """

    reference: WindowClassifier
    volume: Volume
    log: Path
    tolerance: float
    stride: Zyx = UNIT
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def of_step(cls, step: Step, volume: Volume, log: Path) -> SeamCertificate | None:
        """The certificate of a prediction with this step, or None for steps that need none (trees)."""
        if not isinstance(step, CertifiedStep):
            return None
        return cls(step.reference, volume, log, step.tolerance, step.stride)

    def __call__(self, block: Block, probabilities: np.ndarray) -> None:
        """Compare and log one block.

        Parameters
        ----------
        probabilities : ndarray of float32, shape (K, z, y, x) of the block's core

        Raises
        ------
        CertificateError
            Naming the voxel, if a probability is off by more than the tolerance (or is not a number).
        """
        voxels = _choose_voxels(block, self.stride)
        if not voxels:
            return
        windows = np.stack([self._read_window(voxel) for voxel in voxels])
        expected = self.reference.classify_windows(windows)
        places = np.array(voxels) - np.array(block.core.start)
        found = probabilities[:, places[:, 0], places[:, 1], places[:, 2]].T
        differences = np.abs(found - expected).max(axis=1)
        worst = int(np.argmax(np.where(np.isnan(differences), np.inf, differences)))
        self._write(block, voxels[worst], differences, found, expected)
        if not differences[worst] <= self.tolerance:
            raise CertificateError(
                f"probabilities of voxel {voxels[worst]} (z, y, x) differ by {differences[worst]:.2g} from those of "
                f"its patch alone, more than the {self.tolerance:g} that rounding explains; this processor or a "
                "library on it computes wrongly: try --device cpu or --precision 32 into another output, and do not "
                "use what was written"
            )

    def _read_window(self, voxel: Zyx) -> np.ndarray:
        return read_block(self.volume, make_block(0, Region(voxel, add(voxel, UNIT)), self.reference.halo))

    def _write(
        self, block: Block, voxel: Zyx, differences: np.ndarray, found: np.ndarray, expected: np.ndarray
    ) -> None:
        line = {
            "block": block.index,
            "n_voxels": len(differences),
            "largest": float(differences.max()),
            "sum": float(differences.sum()),
            "n_same_class": int((found.argmax(axis=1) == expected.argmax(axis=1)).sum()),
            "voxel": list(voxel),
        }
        with self._lock, self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def summarise(self) -> dict[str, Any]:
        """What the output's provenance says: voxels compared, largest and mean difference, tolerance, where."""
        by_block = {line["block"]: line for line in self._read_log()}
        if not by_block:
            return {"n_voxels": 0, "tolerance": self.tolerance}
        # In the order of the blocks, not of their completion: it decides between equal differences.
        lines = [by_block[index] for index in sorted(by_block)]
        n_voxels = sum(line["n_voxels"] for line in lines)
        worst = max(lines, key=lambda line: line["largest"])
        return {
            "n_voxels": n_voxels,
            # Two digits: what lies beyond may depend on the order of float sums.
            "largest_difference": float(f"{worst['largest']:.1e}"),
            "at_voxel": worst["voxel"],
            "mean_difference": float(f"{sum(line['sum'] for line in lines) / n_voxels:.1e}"),
            "same_class": round(sum(line["n_same_class"] for line in lines) / n_voxels, 6),
            "tolerance": self.tolerance,
        }

    def _read_log(self) -> Iterator[dict[str, Any]]:
        """Lines of finished blocks; one that a kill tore is skipped, for its block was not done either."""
        if not self.log.exists():
            return
        for line in self.log.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue


def _choose_voxels(block: Block, stride: Zyx) -> list[Zyx]:
    """Voxels to compare: half anywhere, half on the faces, where a wrong halo shows. Always the same."""
    rng = np.random.default_rng([0x5EA3, block.index])
    first = [-(-a // s) * s for a, s in zip(block.core.start, stride, strict=True)]
    counts = [len(range(a, b, s)) for a, b, s in zip(first, block.core.stop, stride, strict=True)]
    if min(counts) < 1:
        return []
    steps = rng.integers(0, counts, (VOXELS_PER_BLOCK, 3))
    for row in steps[::2]:
        axis = rng.integers(3)
        row[axis] = rng.choice([0, counts[axis] - 1])
    voxels = np.unique(np.array(first) + steps * np.array(stride), axis=0)
    return [(int(z), int(y), int(x)) for z, y, x in voxels]
