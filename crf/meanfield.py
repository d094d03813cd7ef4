"""The dense CRF: every voxel is connected to every other one, and 10 rounds of messages settle the labels.

`DenseCRF` is the whole interface: a frozen description of the model and `refine`. Mean-field inference after
Kraehenbuehl and Koltun (2011): Q ← softmax(ln p - sum_k mu_k F_k(Q)) for all voxels at once, with
F_k(Q)_i = n_i sum_{j≠i} k_ij n_j Q_j and n_i = (sum_j k_ij)^-1/2. The filters are in `gaussian.py`, their
compiled form in `compiled.py`, the GPU form in `torch_backend.py`, the exact one in `reference.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crf.gaussian import intensity_basis, kernel_radius
from crf.potentials import Penalty, check_probabilities, parse_penalty, penalty_matrix, per_axis
from crf.problem import Problem

Backend = Literal["compiled", "torch", "brute_force", "grey_levels", "pydensecrf"]
IMAGE_TYPES = "uint8, uint16, float16, float32 or float64"


@dataclass(frozen=True)
class DenseCRF:
    """A fully connected conditional random field that sharpens class probabilities along image edges.

    Two kernels tell which voxels should agree: the *bilateral* one connects voxels that are near and alike in
    intensity, the *spatial* one connects voxels that are near. A penalty is paid for each pair of classes that
    two connected voxels take.

    Parameters
    ----------
    bilateral_sigma_nm : float or sequence of 3 floats
        θα: reach of the bilateral kernel in nanometres, one width or (z, y, x).
    intensity_sigma : float or sequence of floats
        θβ: intensity difference at which the bilateral kernel falls to 0.61; one, or one per image channel.
        Integer images are scaled to 0..1 by their type's maximum (255 for uint8), float images are used as given.
    spatial_sigma_nm : float or sequence of 3 floats
        θγ: reach of the spatial kernel in nanometres.
    bilateral_weight, spatial_weight : float or array-like, shape (K, K)
        A number w: penalty w for any two different classes (Potts). A matrix: the penalty of a voxel of the row's
        class for a neighbour of the column's class; see `potentials.penalty_matrix` about asymmetry. 0 switches
        the kernel off.
    n_iterations : int
        Mean-field iterations, at least 1.
    include_self : bool
        Let a voxel's own belief be part of the message it receives. False is what the equations say; True is what
        pydensecrf computes.
    tolerance : float
        Largest error of a kernel value, as a fraction of its peak, that the fast filters may make: three tenths
        for the intensity (relative to the value itself, so rare grey levels are as exact as frequent ones), the
        rest for the three axes. Between 1e-5 and 0.1. No message is further off than this either; most are far closer,
        because the errors of a neighbourhood oscillate in sign.
    stop_change : float
        Stop before `n_iterations` once no probability changes by more than this. 0: never.

    Raises
    ------
    ValueError
        A width that is not positive, a weight that is neither a number nor square, a tolerance or number of
        iterations out of range.

    Notes
    -----
    With the default tolerance ten iterations ended within 1e-5 of the exact mean field on average and within 1e-3
    everywhere, for kernels of 3, 8 and 20 voxels and 2 to 8 classes on synthetic tissue (pydensecrf: 1e-3 and
    0.2). Where two labels are balanced to a hair, any error can tip iterated mean field either way, so no bound
    on the result exists; `tests/crf/test_meanfield.py` holds messages to `tolerance` over the parameter range.

    Time per iteration is proportional to voxels × (K - 1) × grey-level terms, about 1.25 / θβ of them; memory
    above the inputs is 4·(3·(K-1) + 1) + 40 bytes per voxel, and 4·K for the result while it is made.

    Examples
    --------
    >>> import numpy as np
    >>> crf = DenseCRF(bilateral_sigma_nm=40, intensity_sigma=0.1, spatial_sigma_nm=10, bilateral_weight=4.0,
    ...                spatial_weight=2.0)
    >>> image = np.zeros((4, 8, 8), np.uint8)
    >>> probabilities = np.full((2, 4, 8, 8), 0.5, np.float32)
    >>> crf.refine(image, probabilities, voxel_size_nm=(5, 5, 5)).shape
    (2, 4, 8, 8)
    """

    bilateral_sigma_nm: float | Sequence[float]
    intensity_sigma: float | Sequence[float]
    spatial_sigma_nm: float | Sequence[float]
    bilateral_weight: float | ArrayLike
    spatial_weight: float | ArrayLike
    n_iterations: int = 10
    include_self: bool = False
    tolerance: float = 2e-3
    stop_change: float = 0.0

    def __post_init__(self) -> None:
        _freeze(self, "bilateral_sigma_nm", per_axis(self.bilateral_sigma_nm, 3, "bilateral_sigma_nm", "nanometres"))
        _freeze(self, "spatial_sigma_nm", per_axis(self.spatial_sigma_nm, 3, "spatial_sigma_nm", "nanometres"))
        n_channels = np.size(self.intensity_sigma)
        widths = per_axis(self.intensity_sigma, n_channels, "intensity_sigma", "1 = the full range of integers")
        _freeze(self, "intensity_sigma", widths)
        _freeze(self, "bilateral_weight", parse_penalty(self.bilateral_weight, "bilateral_weight"))
        _freeze(self, "spatial_weight", parse_penalty(self.spatial_weight, "spatial_weight"))
        if self.n_iterations < 1:
            raise ValueError(f"n_iterations is {self.n_iterations}; it must be at least 1 (10 is usual).")
        if not 1e-5 <= self.tolerance <= 0.1:
            raise ValueError(
                f"tolerance is {self.tolerance}; it must lie between 1e-5 and 0.1. The default suits most data; "
                "float32 sums cannot do better than 1e-5."
            )
        if not 0.0 <= self.stop_change < 1.0:
            raise ValueError(f"stop_change is {self.stop_change}; it must be 0 (never stop early) or below 1.")

    def refine(
        self,
        image: NDArray,
        probabilities: NDArray,
        voxel_size_nm: Sequence[float],
        *,
        backend: Backend = "compiled",
        n_threads: int | None = None,
        device: str = "cpu",
    ) -> NDArray[np.float32]:
        """Refine class probabilities with the image they were predicted from.

        Parameters
        ----------
        image : ndarray of uint8, uint16 or float, shape (Z, Y, X) or (C, Z, Y, X)
            Several channels multiply the number of intensity terms, so two or three are practical.
        probabilities : ndarray of float, shape (K, Z, Y, X)
            Sum to one over K; values below 1e-5 are raised to it.
        voxel_size_nm : sequence of 3 floats
            (z, y, x) in nanometres.
        backend : {"compiled", "torch", "brute_force", "grey_levels", "pydensecrf"}
            The fast CPU filters, the same method on tensors, or one of the references in `reference.py`.
        n_threads : int, optional
            For "compiled"; default one per core. The result does not depend on it.
        device : str
            For "torch": "cpu", "cuda", "cuda:1".

        Returns
        -------
        ndarray of float32, shape (K, Z, Y, X)
            Sum to one over K.

        Raises
        ------
        TypeError
            Image or probabilities of another kind of number.
        ValueError
            Shapes that do not fit together, probabilities that are not, a matrix of another size than K.
        """
        problem = self.problem(image, probabilities, voxel_size_nm)
        if backend == "compiled":
            from crf.compiled import refine_compiled

            return refine_compiled(problem, n_threads)
        if backend == "torch":
            from crf.torch_backend import refine_on_device

            return refine_on_device(problem, device)
        return _refine_by_reference(problem, backend)[0].astype(np.float32)

    def refine_with_energies(
        self,
        image: NDArray,
        probabilities: NDArray,
        voxel_size_nm: Sequence[float],
        *,
        backend: Literal["compiled", "brute_force", "grey_levels"] = "compiled",
        n_threads: int | None = None,
    ) -> tuple[NDArray[np.float32], list[float]]:
        """Refine and report the mean-field energy before the first and after every iteration.

        The energy is E(Q) = sum Q (-ln p) + 1/2 sum Q mu F(Q) + sum Q ln Q, the Kullback-Leibler divergence from
        the model up to a constant. Beliefs of all voxels are updated at once, so it usually falls but need not:
        an energy that rises for several iterations says that the weights are too strong to be trusted.

        Parameters
        ----------
        image, probabilities, voxel_size_nm, n_threads
            As in `refine`. Takes about four times its time and memory.
        backend : {"compiled", "brute_force", "grey_levels"}

        Returns
        -------
        probabilities : ndarray of float32, shape (K, Z, Y, X)
        energies : list of float
            `n_iterations` + 1 values, fewer when `stop_change` ended the run.
        """
        problem = self.problem(image, probabilities, voxel_size_nm)
        if backend == "compiled":
            from crf.compiled import compiled_filters
            from crf.reference import refine_exactly

            with compiled_filters(problem, n_threads) as filters:
                refined, energies = refine_exactly(problem, filters)
        else:
            refined, energies = _refine_by_reference(problem, backend)
        return refined.astype(np.float32), energies

    def halo(self, tolerance: float, voxel_size_nm: Sequence[float]) -> tuple[int, int, int]:
        """Voxels that a block needs around its core so that refining blocks equals refining the whole.

        Parameters
        ----------
        tolerance : float
            Fraction of voxels, 0 < tolerance < 1, whose label may differ from the whole volume's.
        voxel_size_nm : sequence of 3 floats
            (z, y, x) in nanometres.

        Returns
        -------
        tuple of 3 ints
            (z, y, x) voxels on each side.

        Notes
        -----
        Messages travel on from voxel to voxel, so only `n_iterations` kernel radii are exact. Their influence dies
        out exponentially: on synthetic tissue with six classes and weights of 4 and 2, where the CRF changes a
        fifth of all labels, halos of 3, 4, 5, 6, 7 and 8 widths of the wider kernel left 9, 4, 2, 0.5, 0.2 and 0.1
        labels in 10,000 different (20 iterations: 9, 5, 2, 0.9, 0.3, 0.1). The halo is therefore
        2·log10(1 / tolerance) - 2 widths, 6 for 1e-4, and never more than the exact one.
        """
        if not 0.0 < tolerance < 1.0:
            raise ValueError(f"tolerance is {tolerance}; give the fraction of labels that may change, such as 1e-4.")
        reach = max(1.0, -2.0 * math.log10(tolerance) - 2.0)
        size = per_axis(voxel_size_nm, 3, "voxel_size_nm", "nanometres")
        halos = []
        for axis in range(3):
            widths = [s / size[axis] for s in self._active_sigmas_nm(axis)]
            exact = self.n_iterations * max((kernel_radius(w, self.tolerance) for w in widths), default=0)
            halos.append(min(exact, math.ceil(reach * max(widths, default=0.0))))
        return halos[0], halos[1], halos[2]

    def _active_sigmas_nm(self, axis: int) -> list[float]:
        pairs = ((self.bilateral_sigma_nm, self.bilateral_weight), (self.spatial_sigma_nm, self.spatial_weight))
        return [sigma[axis] for sigma, weight in pairs if np.any(weight)]  # type: ignore[index]

    def memory_bytes(
        self, shape: tuple[int, int, int], n_classes: int, voxel_size_nm: Sequence[float], n_image_channels: int = 1
    ) -> int:
        """Memory that `refine` takes above its inputs with the default backend, its result included.

        Parameters
        ----------
        shape : tuple of 3 ints
            Voxels (z, y, x), halos included.
        n_classes : int
        voxel_size_nm : sequence of 3 floats
            (z, y, x) in nanometres.
        n_image_channels : int

        Returns
        -------
        int
            An upper bound; about 4·(3·(K-1) + 1) + 40 bytes per voxel.
        """
        from crf.compiled import peak_bytes

        size = per_axis(voxel_size_nm, 3, "voxel_size_nm", "nanometres")
        return peak_bytes(shape, n_classes, n_image_channels, _in_voxels(self.bilateral_sigma_nm, size), self.tolerance)

    def count_intensity_terms(self, n_image_channels: int = 1) -> int:
        """How many intensity terms, to which time is proportional, an image of integers needs.

        Raises
        ------
        ValueError
            If they are more than `gaussian.MAX_TERMS`, which `refine` would refuse too.
        """
        from crf.compiled import INTENSITY_SHARE

        sigmas: tuple[float, ...] = self.intensity_sigma  # type: ignore[assignment]
        sigmas = sigmas * n_image_channels if len(sigmas) == 1 else sigmas
        ranges = (1.0,) * len(sigmas)
        return intensity_basis(sigmas, ranges, 2, INTENSITY_SHARE * self.tolerance).n_terms

    def problem(self, image: NDArray, probabilities: NDArray, voxel_size_nm: Sequence[float]) -> Problem:
        """Check the arguments of `refine` and bring them into the form that every backend reads."""
        image, probabilities = np.asarray(image), np.asarray(probabilities)
        if image.ndim == 3:
            image = image[None]
        _check_image(image)
        check_probabilities(probabilities)
        if image.shape[1:] != probabilities.shape[1:]:
            raise ValueError(
                f"image is {image.shape[1:]} voxels (z, y, x) but probabilities are {probabilities.shape[1:]}; they "
                "must cover the same voxels. Crop or resample one, and check that both are in z, y, x order."
            )
        size = per_axis(voxel_size_nm, 3, "voxel_size_nm", "nanometres")
        sigmas: tuple[float, ...] = self.intensity_sigma  # type: ignore[assignment]
        if len(sigmas) == 1:
            sigmas = sigmas * len(image)
        if len(sigmas) != len(image):
            raise ValueError(
                f"intensity_sigma has {len(sigmas)} values but the image has {len(image)} channels; "
                "give one number, or one per channel."
            )
        weights: tuple[tuple[str, Penalty], ...] = (
            ("bilateral_weight", self.bilateral_weight),
            ("spatial_weight", self.spatial_weight),
        )  # type: ignore[assignment]
        matrices = [penalty_matrix(weight, len(probabilities), name) for name, weight in weights]
        return Problem(
            image=image,
            probabilities=probabilities,
            bilateral_sigma=_in_voxels(self.bilateral_sigma_nm, size),
            intensity_sigma=sigmas,
            spatial_sigma=_in_voxels(self.spatial_sigma_nm, size),
            penalties=(matrices[0], matrices[1]),
            n_iterations=self.n_iterations,
            include_self=self.include_self,
            tolerance=self.tolerance,
            stop_change=self.stop_change,
        )


def _freeze(model: DenseCRF, name: str, value: object) -> None:
    """Store the parsed form of an argument: tuples, so that the model can be hashed, compared and saved."""
    object.__setattr__(model, name, value)


def _in_voxels(sigma_nm: object, size: tuple[float, ...]) -> tuple[float, float, float]:
    z, y, x = (s / v for s, v in zip(sigma_nm, size, strict=True))  # type: ignore[call-overload]
    return z, y, x


def _check_image(image: NDArray) -> None:
    if image.ndim != 4 or 0 in image.shape:
        raise ValueError(
            f"image has shape {image.shape}; it must be (Z, Y, X) or (C, Z, Y, X) with at least one voxel. "
            "Use image[None] for a single slice."
        )
    if image.dtype not in (np.uint8, np.uint16) and not np.issubdtype(image.dtype, np.floating):
        raise TypeError(
            f"image has dtype {image.dtype}; it must be {IMAGE_TYPES}. "
            "Convert other integers to float and scale them to 0..1."
        )
    if np.issubdtype(image.dtype, np.floating) and not all(np.isfinite(plane).all() for plane in image.swapaxes(0, 1)):
        raise ValueError("image holds NaN or infinity; fill missing voxels, for example with the mean intensity.")


def _refine_by_reference(problem: Problem, backend: str) -> tuple[NDArray, list[float]]:
    from crf import reference

    if backend == "pydensecrf":
        return reference.refine_with_pydensecrf(problem)
    if backend == "brute_force":
        return reference.refine_exactly(problem, reference.brute_force_filters(problem))
    if backend == "grey_levels":
        return reference.refine_exactly(problem, reference.grey_level_filters(problem))
    raise ValueError(f"backend is {backend!r}; choose one of {', '.join(get_args(Backend))}.")
