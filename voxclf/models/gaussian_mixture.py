"""Gaussian mixture over features: each component is one Gaussian, mapped to the class it agrees with most.

The unsupervised model of the corridor: where classes differ in intensity it needs labels only to start from and to
name what it found. Evaluation is one matrix product per component and batch, in float64, because log densities of
40 correlated features lose their small differences in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from voxclf.errors import ModelError

# Rows per batch: 40 features x 4096 rows x 8 bytes stays in the L2 cache.
_BATCH_ROWS = 4096
_ARRAY_AXES = {"whitening": 3, "offset": 2, "log_weight": 1, "component_class": 1, "n_classes": 0}


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """A fitted mixture of M Gaussians as plain arrays.

    Parameters
    ----------
    whitening : ndarray of float64, shape (M, F, F)
        ``whitening[m] @ x - offset[m]`` has identity covariance for rows of component m.
    offset : ndarray of float64, shape (M, F)
        The component's mean, whitened.
    log_weight : ndarray of float64, shape (M,)
        Log of the component's weight times its density at the mean, up to a shared constant.
    component_class : ndarray of int32, shape (M,)
        Class index of each component; several may share one.
    n_classes : int
        Classes (K) of the output; a class without component has probability 0.

    Raises
    ------
    ModelError
        If shapes disagree, or a number is not finite.
    """

    whitening: np.ndarray
    offset: np.ndarray
    log_weight: np.ndarray
    component_class: np.ndarray
    n_classes: int

    def __post_init__(self) -> None:
        n_components, n_features = self.offset.shape
        shapes = (self.whitening.shape, self.log_weight.shape, self.component_class.shape)
        expected = ((n_components, n_features, n_features), (n_components,), (n_components,))
        if shapes != expected or n_components < 1 or n_features < 1:
            raise ModelError(
                f"the mixture's arrays have shapes {shapes}, but offset {self.offset.shape} asks for {expected}; "
                "the model file is damaged, fit the model again"
            )
        if not all(np.isfinite(array).all() for array in (self.whitening, self.offset, self.log_weight)):
            raise ModelError("the mixture holds numbers that are not finite; the file is damaged, fit the model again")
        classes = self.component_class
        if self.n_classes < 2 or classes.min() < 0 or classes.max() >= self.n_classes:
            raise ModelError(
                f"the mixture's component_class {classes.tolist()} must lie in 0 to n_classes - 1, and n_classes "
                f"{self.n_classes} must be at least 2; the model file is damaged, fit the model again"
            )

    @classmethod
    def from_parameters(
        cls,
        weights: np.ndarray,
        means: np.ndarray,
        precisions_cholesky: np.ndarray,
        component_class: np.ndarray,
        n_classes: int,
    ) -> GaussianMixture:
        """Build from weights (M,), means (M, F) and, per component, P (F, F) with precision = P @ P.T."""
        whitening = np.ascontiguousarray(np.swapaxes(precisions_cholesky, 1, 2), dtype=np.float64)
        offset = np.einsum("mij,mj->mi", whitening, means)
        log_weight = np.log(weights) + np.linalg.slogdet(whitening)[1]
        return cls(whitening, offset, log_weight, np.asarray(component_class, dtype=np.int32), int(n_classes))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> GaussianMixture:
        """Rebuild a mixture from `to_arrays`.

        Raises
        ------
        ModelError
            If an array is missing, has another kind or shape, or holds impossible numbers.
        """
        for name, n_axes in _ARRAY_AXES.items():
            kind = "i" if name in ("component_class", "n_classes") else "f"
            if name not in arrays or arrays[name].ndim != n_axes or arrays[name].dtype.kind != kind:
                raise ModelError(
                    f"the mixture's array {name!r} is missing or is not {n_axes}-dimensional of kind {kind!r}; "
                    "the model file is damaged, fit the model again"
                )
        vectors = {name: np.array(arrays[name]) for name in _ARRAY_AXES if name != "n_classes"}
        return cls(**vectors, n_classes=int(arrays["n_classes"]))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything needed to rebuild the mixture, as plain arrays."""
        arrays = {name: getattr(self, name) for name in _ARRAY_AXES if name != "n_classes"}
        return {**arrays, "n_classes": np.array(self.n_classes, dtype=np.int64)}

    @property
    def n_features(self) -> int:
        """Features (F) each row must have."""
        return int(self.offset.shape[1])

    def component_probabilities(self, features: np.ndarray) -> np.ndarray:
        """Probability of each component for every row, shape (M, N) float64: what mutual information is scored on."""
        log_density = np.empty((self.offset.shape[0], features.shape[1]))
        for component, (whitening, offset) in enumerate(zip(self.whitening, self.offset, strict=True)):
            whitened = whitening @ features.astype(np.float64) - offset[:, None]
            log_density[component] = self.log_weight[component] - 0.5 * np.einsum("fn,fn->n", whitened, whitened)
        log_density -= log_density.max(axis=0)
        np.exp(log_density, out=log_density)
        return log_density / log_density.sum(axis=0)

    def predict_probabilities(self, features: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Class probabilities of every row (voxel); the interface of `PackedForest.predict_probabilities`.

        Parameters
        ----------
        features : ndarray of float32, shape (F, N)
            Feature-major, finite.
        out : ndarray of float32, shape (K, N), optional
            Where to write; left out, a new array.

        Returns
        -------
        ndarray of float32, shape (K, N)
            Sums to 1 over K.
        """
        if features.ndim != 2 or features.shape[0] != self.n_features:
            raise ValueError(
                f"features has shape {features.shape}, but the model needs ({self.n_features}, N): "
                "one row per feature, one column per voxel"
            )
        shape = (self.n_classes, features.shape[1])
        if out is None:
            out = np.empty(shape, dtype=np.float32)
        elif out.shape != shape or out.dtype != np.float32:
            raise ValueError(f"out has shape {out.shape} and dtype {out.dtype}, but must be float32 {shape}")
        out[:] = 0
        for start in range(0, features.shape[1], _BATCH_ROWS):
            batch = slice(start, start + _BATCH_ROWS)
            of_component = self.component_probabilities(features[:, batch])
            for component, k in enumerate(self.component_class):
                out[k, batch] += of_component[component]
        return out
