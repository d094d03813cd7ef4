"""Model name → what it is and its defaults: the list that ``voxclf models`` prints and ``fit`` chooses from.

Trees stand in ``TREE_MODELS``, neural networks in ``NETWORKS``. torch is imported only when a network is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from voxclf.geometry import VoxelSize, Zyx

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ModelInfo:
    """What the registry tells about a model: one line, and the defaults that `fit_tree_model` fills in."""

    name: str
    description: str
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _info(name: str, description: str, **defaults: Any) -> tuple[str, ModelInfo]:
    return name, ModelInfo(name, description, MappingProxyType(defaults))


# Forests: depth 16 changed validation macro F1 against full depth by -0.003 on ssTEM with classes drawn equally,
# by 0.000 with classes drawn by the root of their frequency, by +0.002 on FIB-SEM; depth 12 by -0.016, -0.007 and
# 0.000. It halves the nodes. Leaves of at least 5 rows cost another 0.003, 50 trees in place of 100 0.000 to 0.005.
TREE_MODELS: Mapping[str, ModelInfo] = MappingProxyType(
    dict(
        (
            _info(
                "decision_tree",
                "One decision tree: a rule list that can be read; the least accurate, and instant.",
                max_depth=12,
                min_samples_leaf=20,
            ),
            _info(
                "random_forest",
                "Random forest: many trees on resampled rows, averaged; robust without tuning. The default.",
                n_trees=80,
                max_depth=16,
                min_samples_leaf=1,
            ),
            _info(
                "extra_trees",
                "Extremely randomised trees: as a random forest, with random thresholds; smoother, faster to fit.",
                n_trees=80,
                max_depth=18,
                min_samples_leaf=1,
            ),
            _info(
                "adaboost",
                "AdaBoost (SAMME): small trees, each on the rows that the ones before got wrong.",
                n_trees=100,
                max_depth=6,
                min_samples_leaf=5,
            ),
            _info(
                "gradient_boosting",
                "Gradient boosting of scikit-learn, on a random quarter of the rows per tree; slow to fit.",
                n_trees=100,
                max_depth=4,
                min_samples_leaf=5,
            ),
            _info(
                "hist_gradient_boosting",
                "Histogram gradient boosting of scikit-learn: gradient boosting on binned features, fast to fit.",
                n_trees=100,
                max_depth=6,
                min_samples_leaf=20,
            ),
            _info(
                "xgboost",
                "xgboost: regularised histogram gradient boosting; usually the most accurate.",
                n_trees=100,
                max_depth=6,
                min_samples_leaf=1,
            ),
            _info(
                "gaussian_mixture",
                "Gaussian mixture: unsupervised; labels only give the starting means and name the components.",
            ),
        )
    )
)


# --- neural networks ---


@dataclass(frozen=True)
class NetworkInfo:
    """What the registry tells about a neural network.

    Parameters
    ----------
    name : str
        Its name.
    description : str
        One line for `voxclf models`.
    builder : str
        Where it is built, "module:function"; called as function(name, n_classes=, in_channels=, patch=, **options),
        without `patch` for a segmenter.
    kind : "patch" or "segmenter"
        A patch network classifies the centre voxel of a patch, a segmenter every voxel of a block.
    is_exact : bool
        Whether every voxel's result depends on its surroundings alone, so that blocks of any size give the same.
    patch : int or None
        Edge of the published cube, voxels; None for segmenters.
    defaults : mapping
        The options it takes beside classes, channels and patch, and their defaults.
    """

    name: str
    description: str
    builder: str
    kind: Literal["patch", "segmenter"] = "patch"
    is_exact: bool = False
    patch: int | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _patch_network(
    name: str, description: str, patch: int, *, is_exact: bool, builder: str = "patch_cnn:build_patch_cnn"
) -> tuple[str, NetworkInfo]:
    defaults = MappingProxyType({"width": 1.0})
    return name, NetworkInfo(name, description, f"voxclf.models.{builder}", "patch", is_exact, patch, defaults)


def _segmenter(name: str, description: str, builder: str, **defaults: Any) -> tuple[str, NetworkInfo]:
    options = MappingProxyType({"width": 1.0, **defaults})
    return name, NetworkInfo(name, description, f"voxclf.models.{builder}", "segmenter", defaults=options)


ISOTROPIC: VoxelSize = (1.0, 1.0, 1.0)
"""Voxel size for which a segmenter is built unless told: it decides along which axes the network halves."""

NETWORKS: Mapping[str, NetworkInfo] = MappingProxyType(
    dict(
        (
            _patch_network(
                "3layer",
                "Three convolutions on a patch of 8: small and very fast, sees texture only.",
                8,
                is_exact=True,
            ),
            _patch_network(
                "4conv",
                "Four convolutions and three pools on a patch of 32: fast, the place to start.",
                32,
                is_exact=True,
            ),
            _patch_network(
                "4res",
                "Four stages with residual blocks on a patch of 32 or 16; padded, so predicted on a coarse grid only.",
                32,
                is_exact=False,
            ),
            _patch_network("4res_ln", "As 4res, with layer norm in place of batch norm.", 32, is_exact=False),
            _patch_network(
                "4res_valid",
                "As 4res without padding and with one early pool: exact at every voxel, twice the work of 4conv.",
                32,
                is_exact=True,
            ),
            _patch_network(
                "dil", "Dilated convolutions on a patch of 32 or 16: the fastest with a wide view.", 32, is_exact=True
            ),
            _patch_network(
                "dilres",
                "Dilated residual blocks without pools on a patch of 32 or 64: keeps thin boundaries sharp.",
                32,
                is_exact=True,
            ),
            _patch_network(
                "convnext",
                "ConvNeXt-Tiny in 3D on a patch of 32 or 16: 31 M parameters, wants pretraining; coarse grid only.",
                32,
                is_exact=False,
                builder="convnext3d:build_convnext",
            ),
            _patch_network(
                "convnext_dilated",
                "ConvNeXt in 3D with dilations in place of strides: hundreds of times the work of 4conv per patch.",
                32,
                is_exact=False,
                builder="convnext3d:build_dilated_convnext",
            ),
            _segmenter(
                "unet3d",
                "3D UNet: convolutions, pooling, upsampling; 6 M parameters. The segmenter to start with.",
                "unet3d:UNet3D",
                voxel_size_nm=ISOTROPIC,
            ),
            _segmenter(
                "denseunet569",
                "3D-DenseUNet-569: dense blocks of depthwise-separable convolutions; very deep, 10 M parameters.",
                "denseunet:DenseUNet",
                voxel_size_nm=ISOTROPIC,
            ),
            _segmenter(
                "res_unet_r",
                "Residual UNet for thick sections with class and boundary outputs; won MitoEM. 2 M parameters.",
                "res_unet:ResUNet",
                voxel_size_nm=ISOTROPIC,
                block="acb",
            ),
            _segmenter(
                "res_unet_h",
                "As res_unet_r, with a decoder for each output.",
                "res_unet:ResUNet",
                voxel_size_nm=ISOTROPIC,
                block="acb",
            ),
            _segmenter(
                "unet2d",
                "2D UNet section by section, with an encoder trained on ImageNet, or `plain`.",
                "unet2d:UNet2D",
                voxel_size_nm=ISOTROPIC,
                encoder="resnet34",
                encoder_weights="imagenet",
                three_axes=False,
            ),
            _segmenter(
                "dynunet",
                "nnU-Net's network, built by MONAI: strided convolutions planned from the voxel size; 17 M parameters.",
                "monai_networks:DynUNet",
                voxel_size_nm=ISOTROPIC,
            ),
            _segmenter(
                "swin_unetr",
                "SwinUNETR, built by MONAI: a transformer with shifted windows as encoder; 62 M parameters, slow.",
                "monai_networks:SwinUNETR",
                window=4,
            ),
        )
    )
)


def build(name: str, n_classes: int, patch: int | Zyx | None = None, in_channels: int = 1, **options: Any) -> nn.Module:
    """Build a neural network with random weights.

    Parameters
    ----------
    name : str
        One of `NETWORKS`.
    n_classes : int
        Classes to tell apart, K.
    patch : int or (z, y, x), optional
        Patch of a patch network, voxels; the published cube by default. Kernels, pools and dilations follow it axis
        by axis (:mod:`voxclf.models.patch_cnn`).
    in_channels : int
        Channels of its input: 1 for the image alone.
    **options
        Those of the network, `NETWORKS[name].defaults`; `width` scales all channel numbers.

    Returns
    -------
    nn.Module
        Patch networks: (B, C, *patch) to (B, K), with the attributes `name` and `patch`. Segmenters: (B, C, Z, Y, X)
        to (B, K, Z, Y, X).

    Raises
    ------
    ValueError
        If the name or an option is unknown, or a number is out of range.
    """
    if name not in NETWORKS:
        raise ValueError(
            f"network {name!r} is unknown; known are {', '.join(NETWORKS)} (`voxclf models` explains them)"
        )
    info = NETWORKS[name]
    for argument, value, least in (("n_classes", n_classes, 2), ("in_channels", in_channels, 1)):
        if value < least:
            raise ValueError(f"{argument} was {value}; {name} needs at least {least}")
    unknown = options.keys() - info.defaults.keys()
    if unknown:
        known = ", ".join(info.defaults) or "none"
        raise ValueError(f"{name} has no option {sorted(unknown)[0]!r}; its options are: {known}")
    options = {**info.defaults, **options}
    if options.get("width", 1.0) <= 0:
        raise ValueError(f"width was {options['width']}; it is a factor on channel numbers, above 0 (1.0 as published)")
    if info.kind == "patch":
        options["patch"] = _check_patch(patch, info)
    module, function = info.builder.split(":")
    return getattr(import_module(module), function)(name, n_classes=n_classes, in_channels=in_channels, **options)


def _check_patch(patch: int | Zyx | None, info: NetworkInfo) -> Zyx:
    assert info.patch is not None
    if patch is None:
        patch = info.patch
    shape = (patch,) * 3 if isinstance(patch, int) else tuple(patch)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(
            f"patch was {patch}; give one edge or three (z, y, x) of at least 1 voxel, such as {info.patch}"
        )
    z, y, x = (int(n) for n in shape)
    return z, y, x


def default_patch(name: str, voxel_size_nm: VoxelSize) -> Zyx:
    """Choose a patch that is about as thick as it is wide, in nanometres.

    The axis with the finest voxels gets the edge of the published cube; any other the odd number of voxels nearest to
    the same length, at least 1: an odd patch has its centre voxel in the middle, which matters where voxels are few.

    Parameters
    ----------
    name : str
        A patch network.
    voxel_size_nm : (z, y, x)
        Of the volume.

    Examples
    --------
    >>> default_patch("4conv", (8.0, 8.0, 8.0)), default_patch("4conv", (30.0, 8.0, 8.0))
    ((32, 32, 32), (9, 32, 32))
    """
    edge = NETWORKS[name].patch
    if edge is None:
        raise ValueError(f"{name} is a segmenter and has no patch; a patch belongs to patch networks")
    finest = min(voxel_size_nm)
    z, y, x = (edge if size == finest else _nearest_odd(edge * finest / size) for size in voxel_size_nm)
    return z, y, x


def _nearest_odd(length: float) -> int:
    """The larger one where two are as near."""
    return 2 * int(length // 2) + 1


def check_model_name(name: str) -> None:
    """Refuse a model that does not exist.

    Raises
    ------
    ValueError
        Listing those that do.
    """
    if name not in TREE_MODELS and name not in NETWORKS:
        known = ", ".join([*TREE_MODELS, *NETWORKS])
        raise ValueError(f"model {name!r} is unknown; known are {known} (`voxclf models` explains them)")
