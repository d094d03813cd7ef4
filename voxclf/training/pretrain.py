"""Pretraining without labels: a network learns how the tissue looks before it learns what it is called.

``center``  The voxels in the middle of a patch are masked, and the network says what they were from what is around
            them. They are masked in the grey values, before any features are made, so nothing of them is left to copy.
``vae``     A variational autoencoder: the backbone squeezes a patch into 512 numbers with noise on them, a decoder
            draws it again. Kingma and Welling 2014, https://arxiv.org/abs/1312.6114

Either trains the backbone with another head. What is saved is the backbone alone; ``fit --init`` puts it under a head
for classes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from voxclf.config import NetworkFitOptions
from voxclf.engine.transfer import read_block
from voxclf.errors import ModelError
from voxclf.geometry import Region, Zyx, add, make_block
from voxclf.models.network_inputs import NetworkInput
from voxclf.progress import Progress, silent
from voxclf.training.augment import build_augmentation
from voxclf.training.loop import Task, run_loop
from voxclf.training.volume_memory import remember
from voxclf.training.windows import Augmentation
from voxclf.volume import Volume

PRETRAINED_FILE = "pretrained.safetensors"
FACTS_FILE = "pretrained.json"
MODEL_WEIGHTS_FILE = "weights.safetensors"
HEAD = "head."

LATENT = 512
DECODER_CHANNELS = (256, 128, 64, 32, 16)
KL_WEIGHT = 0.5
VALIDATION_SHARE = 0.1
"""Part of the volume, at the end of its longest axis, from which no patch to train on is taken."""
N_VALIDATION = 512
IMAGE_MEMORY = 2**30
DEFAULT_BATCH = 64


@dataclass(frozen=True)
class Pretext:
    """What the network is asked while nobody has labelled anything.

    Parameters
    ----------
    kind : "center" or "vae"
        Predict the masked middle, or reconstruct the whole patch.
    padding : int
        The masked middle reaches so many voxels from the centre voxel: 0 masks one, 1 masks 3 x 3 x 3; less along axes
        on which the patch is thinner.
    mask_center : bool
        Mask the middle for "vae" too.
    """

    kind: Literal["center", "vae"] = "center"
    padding: int = 0
    mask_center: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("center", "vae"):
            raise ValueError(f"task was {self.kind!r}; choose center or vae")
        if self.padding < 0:
            raise ValueError(f"padding was {self.padding}; give 0 for one masked voxel, 1 for 3 x 3 x 3, and so on")

    @property
    def is_masked(self) -> bool:
        """Whether the middle is hidden from the network."""
        return self.kind == "center" or self.mask_center

    def middle(self, patch: Zyx) -> Region:
        """The masked voxels within a patch.

        Raises
        ------
        ValueError
            If the patch is nothing but middle.
        """
        start = tuple(max(0, p // 2 - self.padding) for p in patch)
        stop = tuple(min(p, p // 2 + self.padding + 1) for p in patch)
        region = Region(start, stop)  # type: ignore[arg-type]
        if region.shape == patch:
            raise ValueError(
                f"padding was {self.padding}, which masks all of a patch of {patch}; use a smaller padding or a larger "
                "--patch"
            )
        return region


class PatchBatch(NamedTuple):
    """Patches of an unlabelled volume.

    Parameters
    ----------
    images : ndarray of float32, shape (B, C, *patch)
        What the network sees: masked.
    truth : ndarray of float32, shape (B, *patch)
        Normalised intensities, nothing masked.
    """

    images: np.ndarray
    truth: np.ndarray


@dataclass(frozen=True)
class PatchReader:
    """Reads patches anywhere in a volume, masked before channels are made of them."""

    volume: Volume
    inputs: NetworkInput
    patch: Zyx
    pretext: Pretext

    def read(
        self, start: Zyx, augment: Augmentation | None = None, rng: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return what the network sees (C, *patch) and the truth (*patch) of the patch that begins at ``start``."""
        halo = self.inputs.halo
        block = make_block(0, Region(start, add(start, self.patch)), halo)
        mean, std = np.float32(self.inputs.mean[0]), np.float32(self.inputs.std[0])
        grey = (read_block(self.volume, block)[0].astype(np.float32) - mean) / std
        if augment is not None:
            assert rng is not None, "augmentation needs a random generator"
            nothing = np.full(grey.shape, -1, np.int64)
            grey = np.array(augment(grey[None], nothing, rng)[0])[0]
        inner = Region(halo, add(halo, self.patch))
        truth = grey[inner.slices].copy()
        if self.pretext.is_masked:
            middle = self.pretext.middle(self.patch)
            # Zero is the volume's mean.
            grey[Region(add(halo, middle.start), add(halo, middle.stop)).slices] = 0.0
        return self.inputs.compute(grey * std + mean), truth


@dataclass(frozen=True)
class PatchPlaces:
    """Where patches begin: training anywhere but at the end of the longest axis, validation there, not overlapping."""

    shape: Zyx
    patch: Zyx

    def draw(self, rng: np.random.Generator, n: int, is_validation: bool) -> list[Zyx]:
        """Draw starts of patches, evenly over their part of the volume."""
        low = [0, 0, 0]
        high = [max(0, n_ - p) for n_, p in zip(self.shape, self.patch, strict=True)]
        axis = int(np.argmax(self.shape))
        border = int(self.shape[axis] * (1 - VALIDATION_SHARE))
        # In a volume of few patches both parts still need one place each; then they overlap.
        if is_validation:
            low[axis] = min(border, high[axis])
        else:
            high[axis] = max(0, min(high[axis], border - self.patch[axis]))
        drawn = rng.integers(low, np.array(high) + 1, size=(n, 3))
        return [(int(z), int(y), int(x)) for z, y, x in drawn]


class Pretraining(Task):
    """What both pretexts share: patches, and a validation on patches from a part of the volume kept apart.

    Parameters
    ----------
    network : nn.Module
        With the head of the pretext.
    reader : PatchReader
    options : NetworkFitOptions
    seed : int
    """

    unit = "patch"

    def __init__(self, network: nn.Module, reader: PatchReader, options: NetworkFitOptions, seed: int) -> None:
        super().__init__(network, options)
        self.reader = reader
        self.seed = seed
        self.n_patches = options.batch or DEFAULT_BATCH
        self.places = PatchPlaces(reader.volume.shape, reader.patch)
        self.watched = self.places.draw(np.random.default_rng(seed), N_VALIDATION, is_validation=True)
        self.augment = build_augmentation(options.augment, reader.volume.voxel_size_nm)
        self.squared = self.n_squared = 0.0

    def draw(self, step: int) -> PatchBatch:
        """The patches of one step."""
        rng = np.random.default_rng([self.seed, step])
        starts = self.places.draw(rng, self.n_patches, is_validation=False)
        return _stack([self.reader.read(start, self.augment, rng) for start in starts])

    def n_labelled(self, batch: PatchBatch) -> int:
        """Patches."""
        return len(batch.images)

    def validation_batches(self) -> Iterator[PatchBatch]:
        """Patches of the part kept apart."""
        for first in range(0, len(self.watched), self.n_patches):
            yield _stack([self.reader.read(start) for start in self.watched[first : first + self.n_patches]])

    def note_errors(self, errors: Tensor) -> None:
        """Take in the errors of predicted intensities."""
        self.squared += float(errors.float().square().sum())
        self.n_squared += errors.numel()

    def verdict(self) -> dict[str, float]:
        """Mean squared error of the intensities predicted, in variances of the volume."""
        error = self.squared / max(1, self.n_squared)
        self.squared = self.n_squared = 0.0
        return {"validation_loss": error, "score": -error}


def _stack(patches: list[tuple[np.ndarray, np.ndarray]]) -> PatchBatch:
    images, truth = zip(*patches, strict=True)
    return PatchBatch(np.stack(images), np.stack(truth))


def _channels_last(images: Any) -> Tensor:
    return torch.as_tensor(images).contiguous(memory_format=torch.channels_last_3d)


class CenterRegression(Pretraining):
    """Predict the masked middle; the loss is the mean squared error."""

    def errors(self, batch: PatchBatch) -> Tensor:
        """Predicted less true intensity of each masked voxel, (B, n)."""
        middle = self.reader.pretext.middle(self.reader.patch)
        truth = torch.as_tensor(batch.truth)[(slice(None), *middle.slices)]
        return self.network(_channels_last(batch.images)) - truth.flatten(1)

    def loss_of(self, batch: PatchBatch) -> Tensor:
        """Mean squared error."""
        return self.errors(batch).square().mean()

    def judge(self, batch: PatchBatch) -> None:
        """Take in one validation batch."""
        self.note_errors(self.errors(batch))


class VariationalHead(nn.Module):
    """Mean and log-variance of the latent numbers, from the flattened result of a backbone."""

    def __init__(self, n_features: int, latent: int) -> None:
        super().__init__()
        self.mean = nn.Linear(n_features, latent)
        self.log_variance = nn.Linear(n_features, latent)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Both, (B, latent)."""
        flat = features.flatten(1)
        return self.mean(flat), self.log_variance(flat)


class Decoder(nn.Module):
    """From latent numbers to a patch: upsampling blocks 256-128-64-32-16 and a last 3 x 3 x 3 convolution.

    Parameters
    ----------
    patch : (z, y, x)
        Each block doubles the extent, or as much of it as an axis of the patch has.
    latent : int
    channels : sequence of int
        Of the blocks.
    """

    def __init__(self, patch: Zyx, latent: int = LATENT, channels: tuple[int, ...] = DECODER_CHANNELS) -> None:
        super().__init__()
        n_doublings = len(channels) - 1
        # ceil(P / 2^i) voxels after the block that is i doublings from the end
        self.sizes = [tuple(-(-p // 2**i) for p in patch) for i in range(n_doublings, -1, -1)]
        z, y, x = self.sizes[0]
        self.first = nn.Linear(latent, channels[0] * z * y * x)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv3d(a, b, 3, padding=1, bias=False), nn.BatchNorm3d(b), nn.GELU())
            for a, b in itertools.pairwise(channels)
        )
        self.last = nn.Conv3d(channels[-1], 1, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """A patch, (B, Z, Y, X)."""
        x = self.first(latent).reshape(len(latent), -1, *self.sizes[0])
        for size, block in zip(self.sizes[1:], self.blocks, strict=True):
            x = block(functional.interpolate(x, size=size, mode="nearest"))
        return self.last(x)[:, 0]


class Autoencoder(nn.Module):
    """A backbone, the variational bottleneck and the decoder."""

    def __init__(self, backbone: nn.Module, n_features: int, patch: Zyx) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = VariationalHead(n_features, LATENT)
        self.decoder = Decoder(patch)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patch drawn again (B, Z, Y, X), mean and log-variance; in eval mode drawn from the mean."""
        mean, log_variance = self.head(self.backbone(images))
        latent = mean
        if self.training:
            latent = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        return self.decoder(latent), mean, log_variance


class Reconstruction(Pretraining):
    """Reconstruct the whole patch; the loss is the mean squared error and half the Kullback-Leibler divergence.

    Both are counted per voxel: with E the squared error of a patch of n voxels and KL its divergence from the standard
    normal, the loss is (E + 0.5 KL) / n, the evidence bound for noise of half the volume's standard deviation.
    """

    def loss_of(self, batch: PatchBatch) -> Tensor:
        """Reconstruction and divergence."""
        truth = torch.as_tensor(batch.truth)
        drawn, mean, log_variance = self.network(_channels_last(batch.images))
        mean, log_variance = mean.float(), log_variance.float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1).mean()
        return (drawn - truth).square().mean() + KL_WEIGHT * divergence / truth[0].numel()

    def judge(self, batch: PatchBatch) -> None:
        """Take in one validation batch."""
        drawn, _, _ = self.network(_channels_last(batch.images))
        self.note_errors(drawn - torch.as_tensor(batch.truth))


@dataclass(frozen=True)
class PretrainedNetwork:
    """What pretraining gives.

    Parameters
    ----------
    weights : dict of str to Tensor
        Of the network without its head, names as in the network.
    history : list of dict
        One entry per round; ``validation_loss`` is the mean squared error in variances of the volume.
    seconds : float
    n_patches_seen : int
    """

    weights: dict[str, Tensor]
    history: list[dict[str, float]]
    seconds: float
    n_patches_seen: int


def pretrain_network(
    network: nn.Module,
    pretext: Pretext,
    inputs: NetworkInput,
    volume: Volume,
    options: NetworkFitOptions,
    seed: int,
    folder: Path,
    n_threads: int,
    progress: Progress = silent,
) -> PretrainedNetwork:
    """Train the backbone of a patch network on a volume without labels.

    Parameters
    ----------
    network : nn.Module
        From ``registry.build``; its head plays no part.
    pretext : Pretext
    inputs : NetworkInput
    volume : Volume
    options : NetworkFitOptions
        Optimiser, steps, time and so on; ``batch`` is in patches.
    seed : int
    folder : Path
        For the state of an unfinished training and logs.
    n_threads : int
    progress : Progress

    Raises
    ------
    ValueError
        If the network is a segmenter, or the padding masks all of its patch.
    """
    if not hasattr(network, "backbone"):
        raise ValueError(
            f"model {type(network).__name__} has no backbone to pretrain; choose a patch network (`voxclf models`)"
        )
    patch: Zyx = tuple(network.patch)
    reader = PatchReader(remember(volume, IMAGE_MEMORY), inputs, patch, pretext)
    task = make_pretraining(network, reader, options, seed)
    state = run_loop(task, options, seed, folder, n_threads, progress, "pretrain")
    weights = {f"backbone.{name}": tensor for name, tensor in task.network.backbone.cpu().state_dict().items()}
    return PretrainedNetwork(weights, state.history, state.seconds, state.n_seen)


def make_pretraining(network: Any, reader: PatchReader, options: NetworkFitOptions, seed: int) -> Pretraining:
    """Put the pretext's head on a network's backbone."""
    left = network.backbone_shape
    if reader.pretext.kind == "vae":
        n_features = left.channels * int(np.prod(left.extent))
        return Reconstruction(Autoencoder(network.backbone, n_features, reader.patch), reader, options, seed)
    n_masked = reader.pretext.middle(reader.patch).n_voxels
    head = nn.Sequential(nn.Conv3d(left.channels, n_masked, left.extent), nn.Flatten())
    regressor = nn.Sequential()
    regressor.add_module("backbone", network.backbone)
    regressor.add_module("head", head)
    return CenterRegression(regressor, reader, options, seed)


def save_pretrained(folder: Path, pretrained: PretrainedNetwork, facts: Mapping[str, Any]) -> None:
    """Write a folder that ``fit --init`` loads: weights, and facts about them (model, patch, task, input)."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in pretrained.weights.items()}, folder / PRETRAINED_FILE)
    values = {**facts, "seconds": pretrained.seconds, "n_patches_seen": pretrained.n_patches_seen}
    (folder / FACTS_FILE).write_text(json.dumps({**values, "history": pretrained.history}, indent=1) + "\n", "utf-8")


def load_pretrained(network: nn.Module, folder: Path) -> None:
    """Load into a network all weights but those of its head, from pretraining or from another model of its kind.

    Raises
    ------
    FileNotFoundError
        If the folder holds no weights.
    ModelError
        If they are those of another architecture, patch or input.
    """
    path = next((folder / name for name in (PRETRAINED_FILE, MODEL_WEIGHTS_FILE) if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"--init {folder} holds neither {PRETRAINED_FILE} nor {MODEL_WEIGHTS_FILE}; give a folder that "
            "`voxclf pretrain` or `voxclf fit` wrote"
        )
    found = {name: tensor for name, tensor in load_file(path).items() if not name.startswith(HEAD)}
    wanted = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(HEAD)}
    for name in sorted(found.keys() | wanted.keys()):
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (found.get(name), wanted.get(name))]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"--init {folder} does not fit this network: {name} has shape {shapes[0]} there and {shapes[1]} here; "
                "use the same --model, --patch, --width and --input-bank for both"
            )
    network.load_state_dict({**network.state_dict(), **found})
