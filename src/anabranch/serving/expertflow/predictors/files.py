"""Fitted predictors on disk: named tensors, and what they were made for."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anabranch.errors import DataError
from anabranch.files import atomic_file, parse_json
from anabranch.lm.checkpoint import find_model
from anabranch.lm.folder import PREDICTOR_FILE
from anabranch.serving.expertflow.predictors.base import Fingerprint

VERSION = 1
# In the folder of a model, or of a training run.
FILE = PREDICTOR_FILE


def place_of(model: str | Path) -> Path:
    """Where the predictor of a model lies: in its folder, or beside its file under the same name."""
    path = Path(model)
    return path.with_name(f"{path.name}.{FILE}") if path.is_file() else path / FILE


def find_file(model: str | Path) -> Path | None:
    """The file of the predictor that lies beside a model; for a training run in the run's folder, else in that of its checkpoint."""
    places = (place_of(model), place_of(find_model(model)))
    return next((place for place in places if place.is_file()), None)


def write(path: str | Path, kind: str, fingerprint: Fingerprint, tensors: dict[str, Tensor], **settings: Any) -> None:
    """Write a predictor, all or nothing."""
    about = {"version": VERSION, "kind": kind, "fingerprint": fingerprint.to_dict(), "settings": settings}
    with atomic_file(path) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            temporary,
            {"route_predictor": json.dumps(about)},
        )


def read(path: str | Path) -> tuple[str, Fingerprint, dict[str, Any]]:
    """(kind, fingerprint, tensors and settings). Raises DataError if the file holds no predictor."""
    try:
        with safe_open(path, framework="pt") as file:
            about = parse_json((file.metadata() or {})["route_predictor"])
            state: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}
        if about["version"] != VERSION:
            raise DataError(f"{path} holds a route predictor of version {about['version']}; this is {VERSION}")
        return about["kind"], Fingerprint.from_dict(about["fingerprint"]), state | about["settings"]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DataError(f"{path} holds no route predictor: {error}") from None


def as_tensor(array: Any) -> Tensor:
    """A numpy array as a tensor of its own."""
    return torch.tensor(array)
