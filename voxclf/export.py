"""A fitted network as an ONNX file, with all that another program needs to use it beside it as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from voxclf.config import ExportConfig
from voxclf.errors import OutputExistsError
from voxclf.models.checkpoint import load_model, model_fingerprint
from voxclf.models.registry import NETWORKS


def export_model(config: ExportConfig) -> list[Path]:
    """Write a patch network as ONNX, and how to feed it as JSON; returns both paths.

    Raises
    ------
    ValueError
        If the model is not a patch network, or the dense form is asked for and it has none.
    OutputExistsError
        If the file exists and ``overwrite`` is not set.
    """
    path = Path(config.output)
    if path.exists() and not config.overwrite:
        raise OutputExistsError(f"{path} exists already; use --overwrite to replace it, or give another output")
    model = load_model(Path(config.model))
    if model.kind != "network" or NETWORKS[model.name].kind != "patch":
        names = ", ".join(name for name, info in NETWORKS.items() if info.kind == "patch")
        raise ValueError(f"{config.model} is a {model.name}; ONNX files are written of patch networks: {names}")
    from voxclf.models.network_model import NetworkModel
    from voxclf.models.onnx_export import export_dense_network, export_patch_network

    assert isinstance(model, NetworkModel)
    export = export_dense_network if config.dense else export_patch_network
    path.parent.mkdir(parents=True, exist_ok=True)
    export(model.network, model.patch, model.inputs.n_channels, path)
    facts: dict[str, Any] = {
        "model": model.name,
        "fingerprint": model_fingerprint(Path(config.model)),
        "form": "dense: logit i belongs to voxel i + centre" if config.dense else "one patch: the logits of its centre",
        "patch": list(model.patch),
        "centre": [n // 2 for n in model.patch],
        "voxel_size_nm": list(model.voxel_size_nm),
        "channels": list(model.feature_names),
        "subtract": list(model.inputs.mean),
        "divide_by": list(model.inputs.std),
        **model.label_set.to_dict(),
    }
    beside = path.with_suffix(".json")
    beside.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return [path, beside]
