"""The comparison stage on real volumes: segmenters, patch networks and forests through ``voxclf compare``.

Every study is one comparison: same labels, same held-out slab, same training time for each network, default settings.

- vnc, cdeep3m_mito, isbi2012: which model, from the labels that are there (vnc: three slices).
- vnc_longer: for another ``--time``, what the best UNet of vnc brings.
- losses: Dice against Boundary DoU, for unet3d and denseunet569.
- encoders: those of unet2d, from random weights.
- blocks: the four of res_unet_r.
- sparse, dense: unet3d, 4conv and a forest from three orthogonal slices of flyem, and from all its 120.

Run: ``python benchmarks/comparisons.py --data DATA --time 4m -o RUNS`` (RUNS keeps every comparison with its page,
models and predictions, and goes on where it stopped); ``--studies vnc,losses``; ``--publish`` writes tables and plots
of the comparisons that are finished in RUNS. With a GPU: ``--time 20m --device cuda --seeds 3 --full-width``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_data import (
    Dataset,
    default_data_folder,
    locate_flyem,
    locate_flyem_all,
    locate_vnc,
    prepare_cdeep3m,
    prepare_isbi2012,
)
from record import RESULTS, describe_run, markdown_table, publish, run_voxclf

LIBRARIES = ("numpy", "torch", "lightning", "monai", "segmentation-models-pytorch", "scikit-learn")
NAME, TITLE = "comparisons", "Segmenters, patch networks and forests compared"
EXPLANATION = (
    "Each table is one `voxclf compare`: the same labels, the same held-out slab, the same training time for each "
    "network; default settings. Brackets: 95 % intervals, by a spatial bootstrap and, with several seeds, their "
    "spread. Against the best: difference in macro F1 on the same redrawn pieces."
)
COLUMNS = (
    "model",
    "macro F1",
    "mean IoU",
    "AP",
    "kappa",
    "against the best",
    "fit s",
    "predict s",
    "size",
    "memory MB",
)
FORESTS, CRF = "random_forest,random_forest+autocontext", "random_forest+crf"
WIDTH = ":width=0.25"
"""What two cores can train in minutes; ``--full-width`` leaves it out."""
NETWORKS = (
    f"4conv,unet3d{WIDTH},unet2d:encoder=plain{WIDTH},res_unet_r{WIDTH},res_unet_h{WIDTH},dynunet{WIDTH},"
    f"denseunet569{WIDTH},swin_unetr{WIDTH}"
)
KEPT = ("classes", "contestants", "against_best", "stage_gains", "failures")
ENCODERS = ("plain", "resnet34", "resnest14d", "resnest50d", "resnet101", "resnest200e", "vgg16", "vgg19")


@dataclass(frozen=True)
class Study:
    """One comparison."""

    title: str
    locate: Callable[[Path, Path], Dataset]
    models: str


STUDIES = {
    "vnc": Study(
        "vnc: serial sections, five classes, three labelled slices",
        locate_vnc,
        f"{FORESTS},{CRF},{NETWORKS}",
    ),
    "cdeep3m_mito": Study(
        "cdeep3m_mito: mitochondria, twelve labelled slices", prepare_cdeep3m, f"{FORESTS},{CRF},{NETWORKS}"
    ),
    "isbi2012": Study("isbi2012: membranes, sixteen labelled slices", prepare_isbi2012, f"{FORESTS},{NETWORKS}"),
    "vnc_longer": Study("vnc: what more time brings", locate_vnc, f"random_forest,unet2d:encoder=plain{WIDTH}"),
    "losses": Study(
        "Losses on cdeep3m_mito",
        prepare_cdeep3m,
        ",".join(
            f"{name}{WIDTH}:loss={loss}" for name in ("unet3d", "denseunet569") for loss in ("dice", "boundary_dou")
        ),
    ),
    "encoders": Study(
        "Encoders of unet2d on cdeep3m_mito, from random weights",
        prepare_cdeep3m,
        ",".join(f"unet2d:encoder={name}:encoder_weights=none" for name in ENCODERS),
    ),
    "blocks": Study(
        "Blocks of res_unet_r on cdeep3m_mito",
        prepare_cdeep3m,
        ",".join(f"res_unet_r{WIDTH}:block={name}" for name in ("acb", "res", "se", "eca")),
    ),
    "sparse": Study("flyem: three orthogonal slices", locate_flyem, f"random_forest,4conv,unet3d{WIDTH}"),
    "dense": Study("flyem: all 120 slices", locate_flyem_all, f"random_forest,4conv,unet3d{WIDTH}"),
}


def run_study(name: str, options: argparse.Namespace) -> None:
    """One `voxclf compare`, in the folder of its name; what is finished there is not repeated."""
    folder = options.output / name
    inputs = options.output / "labels"
    inputs.mkdir(parents=True, exist_ok=True)
    dataset = STUDIES[name].locate(options.data, inputs)
    models = options.models or STUDIES[name].models.replace(WIDTH, "" if options.full_width else WIDTH)
    run_voxclf(
        *("compare", dataset.volume, dataset.labels, "-o", folder, "--validation", dataset.validation),
        *("--models", models, "--time", options.time, "--seeds", options.seeds),
        *("--voxel-size", ",".join(f"{s:g}" for s in dataset.voxel_size), "--classes", ",".join(dataset.classes)),
        *("--region", dataset.region, "--memory", options.memory, "--workers", options.threads),
        *("--precision", options.precision, "--device", options.device, "--folds", "2"),
    )


def lay_out(found: dict[str, Any]) -> list[dict[str, str]]:
    """The table of a comparison."""
    against = {difference["name"]: difference["macro_f1"] for difference in found["against_best"]}
    rows = []
    for one in found["contestants"]:
        difference = against.get(one["name"])
        values = (
            one["name"].replace(":encoder_weights=none", ""),
            _spell(one["macro_f1"]),
            f"{one['mean_iou']['value']:.3f}",
            f"{one['macro_average_precision']['value']:.3f}",
            f"{one['kappa']['value']:.3f}",
            _spell(difference, "+.3f") if difference else "",
            f"{one['fit_s']:.0f}",
            f"{one['predict_s']:.0f}",
            f"{one['size']:,} {one['size_counts']}",
            f"{one['peak_bytes'] / 1e6:.0f}" if one["peak_bytes"] else "",
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def _spell(interval: dict[str, float], form: str = ".3f") -> str:
    return f"{interval['value']:{form}} [{interval['low']:{form}}, {interval['high']:{form}}]"


def publish_studies(options: argparse.Namespace) -> None:
    """Tables and plots of what is finished."""
    lines: list[str] = []
    rows = []
    for name, study in STUDIES.items():
        page = options.output / name / "compare.json"
        if not page.exists():
            continue
        found = json.loads(page.read_text())
        settings = found["settings"]
        seeds = max(len(contestant["seeds"]) for contestant in found["contestants"])
        setup = (
            f"{settings['time']:.0f} s of training, {seeds} seed(s), {settings['workers']} thread(s), "
            f"{settings['precision']}, {settings['device']}"
        )
        plot = f"{NAME}_{name}.svg"
        shutil.copy(options.output / name / "score_and_time.svg", RESULTS / plot)
        lines += [f"## {study.title}", "", f"{setup}.", "", *markdown_table(COLUMNS, lay_out(found)), ""]
        lines += [f"- {failure['name']} did not finish: {failure['message']}" for failure in found["failures"]]
        gains = [f"- {gain['name']}: {_spell(gain['macro_f1'], '+.3f')} macro F1" for gain in found["stage_gains"]]
        lines += ["What each stage adds:", "", *gains, ""] if gains else []
        lines += [f"![score and time of {name}]({plot})", ""]
        for contestant in found["contestants"]:
            for seed in contestant["seeds"]:
                del seed["prediction"]  # a path of this machine
        rows.append({"study": name, "setup": setup} | {key: found[key] for key in KEPT})
    facts = describe_run(LIBRARIES, remark=options.remark)
    publish(NAME, TITLE, EXPLANATION, facts, rows, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=default_data_folder())
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to keep the comparisons in")
    parser.add_argument("--studies", default=",".join(STUDIES), help="some of " + ", ".join(STUDIES))
    parser.add_argument("--models", help="only these contestants; more can be added by another call")
    parser.add_argument("--full-width", action="store_true", help="networks as published, not a quarter as wide")
    parser.add_argument("--time", default="4m", help="training time of a network")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--precision", default="32", choices=["32", "bf16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--remark", default="none", help="what to say about the run when it is published")
    parser.add_argument("--publish", action="store_true", help="write tables and plots of what is finished and stop")
    options = parser.parse_args()
    if options.publish:
        publish_studies(options)
        return
    for name in options.studies.split(","):
        run_study(name, options)


if __name__ == "__main__":
    main()
