"""A fitted skipper on disk: one small safetensors file, under a digest; nothing in it is ever run."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from anabranch.bounds import MOST_SEED, shown
from anabranch.config import from_dict, to_dict
from anabranch.depth.ftp.decider import ByPlace, Schedule
from anabranch.depth.ftp.features import FactorConfig
from anabranch.depth.ftp.passes import Kept
from anabranch.depth.ftp.router import Mode, RouterConfig, TokenRouter
from anabranch.depth.ftp.schedule import check_schedule
from anabranch.errors import AnabranchError, CheckpointError, DataError
from anabranch.files import atomic_write, parse_json

__all__ = ["Stored", "check_replaces", "read_skipper", "write_skipper"]

VERSION = 1
_FIELD, _ROUTER, _SCHEDULE = "anabranch.token_skipper", "router.", "schedule"
# A router of hidden states of a wide model is larger than one of factors; beyond this it is something else.
_LARGEST = 64 * 2**20
_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CHOICES = {"mode": ("topk", "threshold"), "kv": ("drop", "keep"), "by_place": (None, "static", "random")}


@dataclass(frozen=True)
class Stored:
    """What a file holds.

    Attributes:
        schedule: the sparsity of each block.
        router: that learned; None for one by place.
        by_place: its name; None for one that learned.
        mode, kv, one_pass, factors, seed: as of `TokenSkipper`.
        fingerprint: of the model.
    """

    schedule: Schedule
    router: TokenRouter | None
    by_place: ByPlace | None
    mode: Mode
    kv: Kept
    one_pass: bool
    factors: FactorConfig
    seed: int
    fingerprint: str


def write_skipper(path: str | Path, stored: Stored) -> None:
    """Write the file, whole or not at all. Raises DataError or CapacityError where it cannot be written."""
    tensors = {_SCHEDULE: torch.tensor(stored.schedule, dtype=torch.float64)}
    if stored.router is not None:
        state = stored.router.state_dict()
        tensors |= {f"{_ROUTER}{name}": value.detach().cpu().contiguous() for name, value in state.items()}
    text = json.dumps(
        {
            "version": VERSION,
            "router": None if stored.router is None else to_dict(stored.router.config),
            "by_place": stored.by_place,
            "mode": stored.mode,
            "kv": stored.kv,
            "one_pass": stored.one_pass,
            "factors": to_dict(stored.factors),
            "seed": stored.seed,
            "fingerprint": stored.fingerprint,
        }
    )
    # One entry, since several come in any order and the same skipper would be other bytes.
    data = save(tensors, {_FIELD: f"{_digest(tensors, text)} {text}"})

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    atomic_write(path, write)


def read_skipper(path: str | Path) -> Stored:
    """Read a file. Raises CheckpointError if it is missing, damaged, or of another kind or version."""
    path = Path(path)
    tensors, text = _read(path)
    try:
        content = parse_json(text)
        if content["version"] != VERSION:
            raise CheckpointError(
                f"{path} is of version {content['version']}; this version of anabranch reads {VERSION}"
            )
        return _stored(tensors, content)
    except CheckpointError:
        raise
    except (AnabranchError, KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged or no skipper of tokens ({type(error).__name__}: {error})") from None


def check_replaces(path: str | Path) -> None:
    """Raise DataError where something is that is no file of `write_skipper`, which would be lost if one were written there."""
    place = Path(path)
    if not os.path.lexists(place):
        return
    try:
        _read(place)
    except CheckpointError:
        raise DataError(
            f"{place} is there and holds no skipper of tokens, so it is not replaced; name another file"
        ) from None


def _stored(tensors: dict[str, Tensor], content: dict[str, Any]) -> Stored:
    for name, allowed in _CHOICES.items():
        if content[name] not in allowed:
            raise ValueError(f"{name} is {content[name]!r}")
    one_pass, seed, fingerprint = content["one_pass"], content["seed"], content["fingerprint"]
    if not isinstance(one_pass, bool) or not isinstance(fingerprint, str):
        raise ValueError(f"one_pass is {shown(one_pass)}, and its fingerprint {shown(fingerprint)}")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MOST_SEED:
        raise ValueError(f"seed is {shown(seed)}")
    for name, value in tensors.items():
        if value.dtype not in _TYPES:
            raise ValueError(f"{name} is of {str(value.dtype).removeprefix('torch.')}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name} has numbers that are not finite")
    router = None
    if content["router"] is not None:
        config = from_dict(RouterConfig, content["router"])
        state = {name.removeprefix(_ROUTER): value for name, value in tensors.items() if name.startswith(_ROUTER)}
        # Before one is made: a few bytes may speak of a router that no memory holds.
        first, wanted = list(state["first.weight"].shape), [config.hidden, config.num_inputs]
        if first != wanted:
            raise ValueError(f"its router's first matrix is {first}, and its settings are of {wanted}")
        router = TokenRouter(config)
        router.load_state_dict(state)
        router.requires_grad_(False).eval()
    if (router is None) == (content["by_place"] is None):
        raise ValueError("it has no router, or two")
    values = tensors[_SCHEDULE].tolist()
    return Stored(
        check_schedule(values, len(values)),
        router,
        content["by_place"],
        content["mode"],
        content["kv"],
        one_pass,
        from_dict(FactorConfig, content["factors"]),
        seed,
        fingerprint,
    )


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    if not path.is_file():
        raise CheckpointError(f"{path} is not there; anabranch depth prune makes one")
    try:
        if path.stat().st_size > _LARGEST:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, so it is no skipper of tokens")
        data = path.read_bytes()
        tensors = load(data)
        # The header was read above, so its length and its JSON are sound.
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    except (OSError, SafetensorError, UnicodeDecodeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged or no skipper of tokens ({type(error).__name__})") from None
    stored = metadata.get(_FIELD)
    if stored is None:
        raise CheckpointError(f"{path} is no skipper of tokens: it lacks the field {_FIELD}")
    digest, _, text = str(stored).partition(" ")
    if digest != _digest(tensors, text):
        raise CheckpointError(f"{path} was changed or damaged: its content does not match its digest")
    return tensors, text


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    hashed = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        hashed.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        # By bytes: numpy has not all the types that a file may have.
        hashed.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()
