"""Fitted predictors on disk: named tensors, and what they were made for."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anabranch.bounds import shown
from anabranch.errors import DataError
from anabranch.files import atomic_file, parse_json
from anabranch.lm.checkpoint import find_model
from anabranch.lm.folder import PREDICTOR_FILE, run_of
from anabranch.serving.expertflow.predictors.base import Fingerprint

VERSION = 1
# No weight that was trained is larger; beyond it a network computes infinities.
_LARGEST = 1e4
# In the folder of a model, or of a training run.
FILE = PREDICTOR_FILE


def place_of(model: str | Path) -> Path:
    """Where the predictor of a model lies: in its folder, or beside its file under the same name."""
    path = Path(model)
    return path.with_name(f"{path.name}.{FILE}") if path.is_file() else path / FILE


def find_file(model: str | Path) -> Path | None:
    """The file of the predictor that lies beside a model; of a checkpoint in its folder, else in that of the training run around it."""
    found = find_model(model)
    places = [place_of(place) for place in (found, run_of(found)) if place is not None]
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
    """(kind, fingerprint, tensors and settings). Raises DataError if the file holds no predictor of a form that this version writes."""
    try:
        return _read(path)
    except (SafetensorError, OSError, ValueError, DataError) as error:
        raise refused(path, error) from None


def refused(path: str | Path, why: object) -> DataError:
    """The error for a file that holds no predictor, with what to do about it."""
    remedy = "delete it" if Path(path).name.endswith(FILE) else "name another file"
    return DataError(
        f"{path} holds no route predictor: {why}; {remedy}, or fit one again (anabranch experts fit-predictor)"
    )


def _read(path: str | Path) -> tuple[str, Fingerprint, dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("route_predictor")
        if text is None:
            raise DataError("it has no table 'route_predictor'")
        about = parse_json(text)
        if not isinstance(about, dict):
            raise DataError(f"its table is {shown(about)}")
        if about.get("version") != VERSION:
            raise DataError(f"it is of version {shown(about.get('version'))}, and this is {VERSION}")
        kind, settings = about.get("kind"), about.get("settings")
        if not isinstance(kind, str):
            raise DataError(f"kind is {shown(kind)}; it must be a text")
        if not isinstance(settings, dict):
            raise DataError(f"settings is {shown(settings)}; it must be a table")
        fingerprint = Fingerprint.from_dict(about.get("fingerprint"))  # type: ignore[arg-type]
        state: dict[str, Any] = {}
        for name in file.keys():
            stored = file.get_slice(name).get_dtype()
            if stored != "F32":
                raise DataError(f"{name} is stored as {stored}; it must be F32")
            state[name] = file.get_tensor(name)
            # NaN is not below anything either.
            if not bool((state[name].abs() <= _LARGEST).all()):
                raise DataError(f"{name} has weights that are no numbers, or beyond {_LARGEST:g}")
    both = sorted(state.keys() & settings.keys())
    if both:
        raise DataError(f"{both[0]} is a tensor and a setting")
    return kind, fingerprint, state | settings


def as_tensor(array: Any) -> Tensor:
    """A numpy array as a tensor of its own."""
    return torch.tensor(array)
