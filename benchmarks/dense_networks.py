"""Patch networks at every voxel: patch by patch as published, patch by patch tuned, and dense; voxels per second.

    python benchmarks/dense_networks.py                                     tiles of 64, 96 and 128, some ten minutes
    python benchmarks/dense_networks.py --networks 4conv --tiles 64         two minutes
    python benchmarks/dense_networks.py --device cuda --tiles 128 192 256   on a GPU; needs torch only

`plain` is the network as it was trained, on batches of patches. `tuned` is the same with all that makes the dense form
fast: batch norm merged, activations inside the convolutions, channels_last_3d. Both classify one voxel per patch.
`dense` classifies a tile at once. The contenders take turns in one run, so that a busy machine slows all of them, and
the median of the rounds counts.

The peak is what the device reaches in the same rounds on one large product of matrices, through oneDNN on CPUs: torch's
own float32 product goes through another library there, which on AMD processors is half as fast and so no peak. What a
tile computes beyond its voxels, the border that its results need, counts as work for the share of the peak.

Results go to benchmarks/results/dense_networks.md and .json, on a GPU dense_networks_cuda.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from record import RESULTS, describe_run, markdown_table, publish
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from voxclf.models.dense import DenseNetwork, densify, tune_for_inference
from voxclf.models.dense_tuning import fused_convolution_works
from voxclf.models.registry import NETWORKS, build

N_CLASSES = 6
BATCH = {"cpu": 16, "cuda": 256}  # patches: more or fewer change little, measured on both sides of these
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PEAK_SIDE = {"cpu": 2048, "cuda": 8192}
NEVER_RUN = ("convnext_dilated",)  # one patch takes some 100 GFLOP
COLUMNS = (
    "network",
    "precision",
    "tile",
    "plain voxel/s",
    "tuned voxel/s",
    "dense voxel/s",
    "dense / plain",
    "dense / tuned",
    "GFLOP/s",
    "of peak",
    "backend",
    "same class",
    "tile GB",
)
TITLE = "Patch networks at every voxel"


def timed(call: Callable[[], object], device: str) -> float:
    """Wall seconds of a call."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def after_training(network: nn.Module) -> nn.Module:
    """Statistics of batch norm as training leaves them; the weights stay random, which costs the same."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def flops(dense: DenseNetwork, shape: tuple[int, ...]) -> int:
    """Additions and multiplications in the convolutions for an input of this spatial shape."""
    total = 0
    for i, operation in enumerate(dense.operations):
        if operation.kind == "convolution":
            lost = dense.reaches[i + 1].lost
            n_voxels = math.prod(n - gone for n, gone in zip(shape, lost, strict=True))
            total += 2 * operation.target.weight.numel() * n_voxels
    return total


def peak_calls(device: str, dtype: torch.dtype) -> tuple[list[Callable[[], object]], int]:
    """Return ways to multiply large matrices, of which the fastest counts, and their arithmetic."""
    n = PEAK_SIDE[device]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    calls: list[Callable[[], object]] = [lambda: a @ b]
    if device == "cpu" and fused_convolution_works(dtype):
        bias = torch.zeros(n, dtype=dtype)
        calls.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], ""))
    return calls, 2 * n**3


class Contest:
    """One network in one precision: the calls that take turns, and what each is worth."""

    def __init__(self, name: str, precision: str, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.name, self.precision, self.options = name, precision, options
        self.device, self.dtype = options.device, PRECISIONS[precision]
        self.network = after_training(build(name, N_CLASSES))
        self.patch = self.network.patch
        self.is_exact = NETWORKS[name].is_exact
        self.dense: dict[int, DenseNetwork] = {}
        self.calls: dict[Any, Callable[[], object]] = {}
        self.work: dict[Any, int] = {}  # voxels, of the peak: FLOP
        self.seconds: dict[Any, list[float]] = {}

    @torch.inference_mode()
    def run(self) -> list[dict[str, Any]]:
        """Time everything; one row per tile, or one if there is no dense form."""
        self._enter_patches()
        peaks, work = peak_calls(self.device, self.dtype)
        for i, call in enumerate(peaks):
            self.calls[f"peak {i}"], self.work[f"peak {i}"] = call, work
        for side in self.options.tiles if self.is_exact else ():
            self._enter_tile(side)
        self.seconds = {key: [] for key in self.calls}
        for call in self.calls.values():  # compiles, allocates, chooses kernels
            call()
        for _ in range(self.options.rounds):
            for key, call in self.calls.items():
                self.seconds[key].append(timed(call, self.device))
        return [self._row(side) for side in self.options.tiles] if self.is_exact else [self._row(None)]

    def _enter_patches(self) -> None:
        n = BATCH[self.device]
        patches = torch.randn(n, 1, *self.patch, device=self.device, dtype=self.dtype)
        plain = build(self.name, N_CLASSES)
        plain.load_state_dict(self.network.state_dict())
        plain = plain.eval().to(self.device, self.dtype)
        tuned = tune_for_inference(
            self.network, self.patch, device=self.device, dtype=self.dtype, dense_axes=(False, False, False)
        )
        # Average pools have no half-precision kernel on CPUs, so plain runs in float32 there.
        if self.device == "cpu" and self.dtype != torch.float32:
            plain, inputs = plain.float(), patches.float()
        else:
            inputs = patches
        self.calls |= {"plain": lambda: plain(inputs), "tuned": lambda: tuned(patches)}
        self.work |= {"plain": n, "tuned": n}

    def _enter_tile(self, side: int) -> None:
        tile = (side, side, side)
        dense = tune_for_inference(self.network, self.patch, device=self.device, dtype=self.dtype, tile=tile)
        volume = torch.randn(1, 1, *dense.input_shape(tile), device=self.device, dtype=self.dtype)
        self.dense[side] = dense
        self.calls[side] = lambda: dense(volume)
        self.work[side] = side**3

    def _row(self, side: int | None) -> dict[str, Any]:
        rate = {key: self.work[key] / median(seconds) for key, seconds in self.seconds.items()}
        row: dict[str, Any] = {
            "network": self.name,
            "precision": self.precision,
            "plain_voxel_per_s": rate["plain"],
            "tuned_voxel_per_s": rate["tuned"],
            "peak_GFLOP_per_s": max(r for key, r in rate.items() if str(key).startswith("peak")) / 1e9,
            "seconds": {str(key): seconds for key, seconds in self.seconds.items()},
        }
        if side is None:
            return row
        dense = self.dense[side]
        tile = (side, side, side)
        done = flops(dense, dense.input_shape(tile)) / median(self.seconds[side]) / 1e9
        return row | {
            "tile": side,
            "dense_voxel_per_s": rate[side],
            "dense_over_plain": rate[side] / rate["plain"],
            "dense_over_tuned": rate[side] / rate["tuned"],
            "GFLOP_per_s": done,
            "of_peak": done / row["peak_GFLOP_per_s"],
            "backend": dense.backend,
            "bytes": dense.working_bytes(tile),
            **self._agreement(dense),
        }

    def _agreement(self, dense: DenseNetwork) -> dict[str, float]:
        """Compare with the untuned network in float32 on a small tile."""
        volume = torch.randn(1, 1, *dense.input_shape((16, 16, 16)))
        expected = densify(self.network, self.patch)(volume)
        found = dense(volume).cpu()
        same = (found.argmax(1) == expected.argmax(1)).double().mean()
        return {"same_class": float(same), "largest_difference": float((found - expected).abs().max())}


def lay_out(rows: list[dict[str, Any]]) -> list[str]:
    """The table of the page."""
    cells = []
    for row in rows:
        values = [row["network"], row["precision"], row.get("tile", ""), spell(row["plain_voxel_per_s"])]
        values.append(spell(row["tuned_voxel_per_s"]))
        if "tile" in row:
            values += [spell(row["dense_voxel_per_s"]), f"{row['dense_over_plain']:.0f}"]
            values += [f"{row['dense_over_tuned']:.0f}", f"{row['GFLOP_per_s']:.0f}", f"{row['of_peak']:.0%}"]
            values += [row["backend"], f"{row['same_class']:.4f}", f"{row['bytes'] / 1e9:.2f}"]
        else:
            values += ["not exact"] + [""] * 7
        cells.append(dict(zip(COLUMNS, values, strict=True)))
    return markdown_table(COLUMNS, cells)


def spell(rate: float) -> str:
    """Three digits and a unit."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if rate >= size:
            return f"{rate / size:.3g}{unit}"
    return f"{rate:.3g}"


def explain(options: argparse.Namespace) -> str:
    """What the page says about the method."""
    return (
        f"{N_CLASSES} classes, the published patch, batches of {BATCH[options.device]} patches, cubes as tiles. "
        f"Medians of {options.rounds} rounds in which all contenders take turns. Plain: as trained, patch by "
        "patch (float32 on CPUs); tuned: the same with merged batch norm, fused activations and "
        "channels_last_3d; dense: a tile at once. "
        "The peak is a product of large matrices in the same rounds. Same class: share of voxels whose most probable "
        "class is that of the untuned float32 network; the weights are random, so classes are nearly tied, and "
        "trained networks agree better. Tile GB: memory that a tile takes."
    )


def main() -> None:
    names = [n for n, info in NETWORKS.items() if info.kind == "patch" and n not in NEVER_RUN]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--networks", nargs="+", default=names, choices=names)
    parser.add_argument("--tiles", type=int, nargs="+", default=[64, 96, 128], help="edges of the cubes, voxels")
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"], choices=list(PRECISIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="threads on the CPU; default: all cores")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the tables")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    facts = describe_run(("torch", "numpy"), device=device, threads=torch.get_num_threads())
    rows = []
    for name in options.networks:
        for precision in options.precisions:
            found = Contest(name, precision, options).run()
            rows += found
            print(
                *(json.dumps({k: v for k, v in row.items() if k != "seconds"}) for row in found), sep="\n", flush=True
            )
    stem = "dense_networks" + ("_cuda" if options.device == "cuda" else "")
    publish(stem, TITLE, explain(options), facts, rows, lay_out(rows), options.output)


if __name__ == "__main__":
    main()
