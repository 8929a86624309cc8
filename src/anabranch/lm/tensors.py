"""Named tensors on disk, read one at a time, so that a model is never in memory twice; `anabranch.lm.shards` writes them.

A *layout* says how the tensors of a file make up ours: for each of our tensors the `Piece`s it is put together of. Read forwards
it imports, read backwards it exports; formats differ in their layouts alone.
"""

import functools
import logging
import math
import os
import re
import struct
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from anabranch.bounds import shown
from anabranch.config import Config
from anabranch.errors import CheckpointError
from anabranch.files import parse_json, read_json
from anabranch.lm.stored_file import StoredFile

logger = logging.getLogger(__name__)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# What may be read, and is no model's weight by itself.
_OTHERS = {
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ENTRY = ("dtype", "shape", "data_offsets")
# Weights that one stored number can hold: quantised ones share bytes.
_MOST_PACKED = 16
# Bytes that devices read whole.
BLOCK = 4096
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Whether parameters have numbers although the model around them is built empty, see `with_memory`.
_IS_KEPT: ContextVar[bool] = ContextVar("is_kept", default=False)


@dataclass(frozen=True)
class Change:
    """Numbers that stand in another order in files: ``read`` makes ours of a stored tensor, ``write`` takes it back."""

    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Piece:
    """The tensor ``name`` of a file is the part ``where`` (an index expression) of one of ours; all of it by default."""

    name: str
    where: tuple[int | slice, ...] = ()
    change: Change | None = None

    def read(self, stored: Tensor) -> Tensor:
        """The part of ours that a stored tensor is."""
        return stored if self.change is None else self.change.read(stored)

    def write(self, ours: Tensor) -> Tensor:
        """The tensor to store of one of ours."""
        part = ours[self.where]
        return part if self.change is None else self.change.write(part)

    def stored_shape(self, ours: Tensor) -> tuple[int, ...]:
        """Shape of the stored tensor, by that of ours."""
        return tuple(self.write(torch.empty_like(ours, device="meta")).shape)


Layout = Mapping[str, Sequence[Piece]]


class TensorSource(Protocol):
    """Tensors by name, read when asked for."""

    @property
    def names(self) -> Collection[str]:
        """All names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape, without reading the tensor."""

    def dtype(self, name: str) -> torch.dtype | str:
        """Type of the stored numbers, or its name in the file where torch has none like it."""

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU; it may be a view of the file."""

    def read_one(self, name: str, index: int) -> Tensor:
        """``read(name)[index]``, where no more than that is read or unpacked."""


class SafetensorsFiles:
    """The tensors of one or more ``.safetensors`` files.

    Args:
        files: all of them.
        index: which of them holds each tensor, where an index says so; what else lies in them is not there.

    Raises:
        CheckpointError: a file is missing or corrupt, or does not hold what the index says.
    """

    def __init__(self, files: Sequence[Path], index: Mapping[str, Path] | None = None) -> None:
        self._files = {path: _Safetensors(path) for path in files}
        self._path_of = _places({path: file.entries for path, file in self._files.items()}, index)

    @property
    def names(self) -> Collection[str]:
        """All names."""
        return self._path_of.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorSource`."""
        return tuple(self._entry(name)["shape"])

    def dtype(self, name: str) -> torch.dtype | str:
        """See `TensorSource`."""
        stored = self._entry(name)["dtype"]
        return DTYPES.get(stored, stored)

    def read(self, name: str) -> Tensor:
        """See `TensorSource`; the memory is the tensor's own. Raises CheckpointError where the file was written to meanwhile."""
        return self._files[self._path_of[name]].read(name)

    def read_one(self, name: str, index: int) -> Tensor:
        """See `TensorSource`. Raises as `read`."""
        return self._files[self._path_of[name]].read(name, index)

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._path_of[name]

    def check_names(self) -> None:
        """Raise CheckpointError where a name is of another file by now than the one that is open here; see `StoredFile.check_name`."""
        for file in self._files.values():
            file.check_name()

    def _entry(self, name: str) -> dict[str, Any]:
        return self._files[self._path_of[name]].entries[name]


class _Safetensors:
    """One file that is open: ``entries`` of its header by name. Raises CheckpointError as `SafetensorsFiles`."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = StoredFile(path)
            # It knows what else a header must not be.
            with safe_open(path, framework="pt"):
                self._start, self.entries = read_header(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(_unreadable(path, error)) from None
        # Both were read by name.
        self._file.check_name()

    def check_name(self) -> None:
        """See `StoredFile`."""
        self._file.check_name()

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor, or the part ``index`` of it."""
        entry = self.entries[name]
        kind, shape = DTYPES.get(entry["dtype"], _OTHERS.get(entry["dtype"])), entry["shape"]
        if kind is None:
            raise CheckpointError(
                f"{name} in {self._file.path} is stored as {entry['dtype']}, which torch has no type for"
            )
        begin, end = entry["data_offsets"]
        if index is not None:
            size = (end - begin) // shape[0]
            begin, shape = begin + index * size, shape[1:]
            end = begin + size
        if begin == end:
            return torch.empty(shape, dtype=kind)
        return torch.from_numpy(self._file.read(self._start + begin, end - begin)).view(kind).view(shape)


class PickleFiles:
    """The tensors of ``pytorch_model.bin`` files, read without running any code of theirs. Arguments and errors as `SafetensorsFiles`."""

    def __init__(self, files: Sequence[Path], index: Mapping[str, Path] | None = None) -> None:
        held: dict[Path, dict[str, Tensor]] = {}
        self._files: dict[Path, StoredFile] = {}
        for path in files:
            try:
                self._files[path] = StoredFile(path)
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
            except Exception as error:
                # torch.load may raise anything for a broken file.
                raise CheckpointError(_unpickled(path, error)) from None
            self._files[path].check_name()
            if not isinstance(loaded, dict):
                raise CheckpointError(
                    f"cannot read {path}: it holds a {type(loaded).__name__}; it must be a table of tensors"
                )
            odd = next((name for name in loaded if not isinstance(name, str)), None)
            if odd is not None:
                raise CheckpointError(f"cannot read {path}: a key of it is {shown(odd)}; names of tensors are text")
            held[path] = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
        self._path_of = _places(held, index)
        self._tensors = {name: held[path][name] for name, path in self._path_of.items()}

    @property
    def names(self) -> Collection[str]:
        """All names."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorSource`."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """See `TensorSource`."""
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """See `TensorSource`. Raises CheckpointError where the file, which is mapped, was written to since it was opened."""
        self._files[self._path_of[name]].check()
        return self._tensors[name]

    def read_one(self, name: str, index: int) -> Tensor:
        """See `TensorSource`."""
        return self.read(name)[index]


def _places(held: Mapping[Path, Collection[str]], index: Mapping[str, Path] | None) -> dict[str, Path]:
    """The file of each tensor, of the names ``held`` in each. Raises CheckpointError if ``index`` names a file without the tensor."""
    if index is None:
        return {name: path for path, names in held.items() for name in names}
    for name, path in index.items():
        if name not in held[path]:
            raise CheckpointError(
                f"{path} lacks {shown(name)}, which the index says it holds; copy the model folder again"
            )
    return dict(index)


def _unpickled(path: Path, error: Exception) -> str:
    """Why a pickled file was not read. What torch says of it advises to run the code in it."""
    if isinstance(error, OSError) and os.path.isfile(path):
        return f"cannot read {path}: {error.strerror or error}"
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if found is not None:
        return (
            f"cannot read {path}: it holds a Python object ({found[1]}) beside tensors, which is not loaded, as that can run code; save "
            "its tensors alone, best as safetensors"
        )
    return _unreadable(path, "it is no file of tensors that torch.save wrote")


def _unreadable(path: Path, error: object) -> str:
    # Path.is_file raises for text that cannot be a name; this does not.
    if not os.path.isfile(path):
        return f"{str(path)[-300:]} is missing; copy the model folder again"
    return f"cannot read {path}: {str(error)[:300]}; it is truncated or corrupt, copy or save it again"


def _is_zip(path: Path) -> bool:
    """Whether torch can map the file; its format before version 1.6 cannot be."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


_WEIGHT_FILES: dict[str, type[SafetensorsFiles | PickleFiles]] = {
    "model.safetensors": SafetensorsFiles,
    "pytorch_model.bin": PickleFiles,
}
# Behind the name of weights in one file: says which shard holds what.
_INDEX = ".index.json"


def has_weights(folder: Path) -> bool:
    """Whether `open_tensors` would find something to read."""
    return _weights_or_index(folder) is not None


def weight_files(folder: Path) -> list[Path]:
    """The files that `open_tensors` reads: all the weights in one, or an index and its shards; empty if there are none.

    Raises CheckpointError for an index that cannot be read.
    """
    first = _weights_or_index(folder)
    if first is None or first.name in _WEIGHT_FILES:
        return [] if first is None else [first]
    return [first, *sorted(set(_read_index(first).values()))]


def _weights_or_index(folder: Path) -> Path | None:
    """What `open_tensors` begins with."""
    places = (folder / f"{name}{end}" for name in _WEIGHT_FILES for end in ("", _INDEX))
    return next((place for place in places if place.is_file()), None)


def open_tensors(folder: Path) -> TensorSource:
    """The weights of a model folder: ``model.safetensors``, else its shards by their index, else ``pytorch_model.bin``, else its shards.

    That is the order of transformers, whose ``save_pretrained`` leaves files of before where they are; a file that hides an index is
    told in a warning. Of shards the index alone says which file holds a tensor. Raises CheckpointError if there are none or they cannot
    be read.
    """
    first = _weights_or_index(folder)
    if first is None:
        raise CheckpointError(f"no weights in {folder} (looked for model.safetensors and pytorch_model.bin)")
    name = first.name.removesuffix(_INDEX)
    reader, listed = _WEIGHT_FILES[name], folder / f"{name}{_INDEX}"
    if first == listed:
        index = _read_index(listed)
        return reader(sorted(set(index.values())), index)
    if listed.is_file():
        logger.warning(
            "%s holds %s and %s: the first is read, as transformers does; remove the older of the two",
            folder,
            name,
            listed.name,
        )
    return reader([first])


def read_header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """(first byte of the tensors, entries by name: ``dtype``, ``shape``, ``data_offsets``) of a safetensors file, checked against it.

    Raises CheckpointError for a file that is missing, or whose header is no header or names bytes that the file does not have.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError(f"its header of {length} bytes does not fit in its {size}")
            table = parse_json(file.read(length))
        if not isinstance(table, dict):
            raise ValueError(f"its header is a {type(table).__name__}; it must be a table of tensors")
        entries = {name: entry for name, entry in table.items() if name != "__metadata__"}
        for name, entry in entries.items():
            _check_entry(name, entry, size - 8 - length)
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(_unreadable(path, error)) from None
    return 8 + length, entries


def _check_entry(name: str, entry: Any, room: int) -> None:
    """Raise ValueError unless an entry of a header is of the right form and lies within ``room`` bytes."""
    fields: list[Any] = [entry.get(key) for key in _ENTRY] if isinstance(entry, dict) else [None, None, None]
    dtype, shape, offsets = fields
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    is_whole = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in numbers)
    if not is_whole or len(offsets) != 2:
        raise ValueError(f"its entry {shown(name)} is {shown(entry)}; it must have {', '.join(_ENTRY)}")
    begin, end = offsets
    if not begin <= end <= room:
        raise ValueError(f"its tensor {shown(name)} lies at bytes {begin} to {end} of {room}")
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise ValueError(
            f"its tensor {shown(name)} has {end - begin} bytes, and {shown(shape)} numbers of type {dtype}"
        )


def check_amount(parameters: int, source: TensorSource, where: Path) -> None:
    """Raise CheckpointError where a config asks for far more numbers than ``source`` holds, before memory for them is taken."""
    held = sum(math.prod(source.shape(name)) for name in source.names)
    if parameters > _MOST_PACKED * held + 1_000_000:
        raise CheckpointError(
            f"{where} holds {held:,} numbers, and its config describes a model of {parameters:,}; one of the two is damaged"
        )


def _read_index(path: Path) -> dict[str, Path]:
    """The file of each tensor by the index at ``path``: files beside it, by their plain names. Raises CheckpointError for any other."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map from tensor to file; copy the model folder again")
    for name, file in weight_map.items():
        # Hugging Face's cache has links to elsewhere under such names; the names themselves lead nowhere else.
        if not isinstance(file, str) or file != Path(file).name or file == ".." or {"\\", "\0"} & set(file):
            raise CheckpointError(
                f"{path} says that {shown(name)} is in {shown(file)}; that must be the name of a file beside it"
            )
    return {name: path.parent / file for name, file in weight_map.items()}


def state_once(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; one that stands under several names only under the first."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    return {name: state[name] for name in first.values()}


@contextmanager
def with_memory() -> Iterator[None]:
    """Inside `build_empty`, modules that are made in this block have parameters with numbers."""
    before = _IS_KEPT.set(True)
    try:
        yield
    finally:
        _IS_KEPT.reset(before)


def build_empty(config: Config) -> Any:
    """``config.build()`` with parameters that take no memory (on the meta device) and buffers as they should be."""

    builder = threading.get_ident()

    def empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        # The hook sees the parameters of the whole process.
        if parameter is None or parameter.is_meta or threading.get_ident() != builder or _IS_KEPT.get():
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    # The stub of the registration forgets what the hook gives.
    hook = register_module_parameter_registration_hook(empty)  # type: ignore[arg-type]
    try:
        return config.build()
    finally:
        hook.remove()


def fill(
    model: nn.Module,
    source: TensorSource,
    layout: Layout,
    *,
    where: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    ignore: Collection[str] = (),
    hint: str = "",
) -> None:
    """Give the parameters and buffers of an empty ``model`` the values in ``source``, one tensor after the other.

    Args:
        model: from `build_empty`.
        source: the stored tensors.
        layout: how they make up the model's.
        where: the file or folder, for messages.
        dtype: of all parameters; None keeps that of each as stored, for one of several pieces the smallest that holds them all.
            Buffers keep their own.
        device: where the model shall be; default the CPU.
        ignore: names in ``source`` that the model does not need.
        hint: what would help, put after the message if the tensors do not fit.

    Raises:
        CheckpointError: tensors are missing, left over, of another shape, or not floating-point numbers.
    """
    state = state_once(model)
    check(state, source, layout, where=where, ignore=ignore, hint=hint)
    new: dict[int, Tensor] = {}
    for name, tensor in state.items():
        kind = (dtype or _stored_type(source, layout[name])) if isinstance(tensor, nn.Parameter) else tensor.dtype
        value = torch.empty(tensor.shape, dtype=kind, device=device)
        _copy(value, source, layout[name])
        new[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    every_name = model.state_dict(keep_vars=True)
    model.load_state_dict({name: new[id(tensor)] for name, tensor in every_name.items()}, assign=True)
    # What is left to move are buffers that are not stored.
    model.to(device)


def _stored_type(source: TensorSource, pieces: Sequence[Piece]) -> torch.dtype:
    """The smallest type that loses nothing of any piece. They are floating-point numbers, see `check`."""
    kinds = [kind for piece in pieces if isinstance(kind := source.dtype(piece.name), torch.dtype)]
    return functools.reduce(torch.promote_types, kinds)


@torch.no_grad()
def overwrite(model: nn.Module, source: TensorSource, layout: Layout, *, where: Path, hint: str = "") -> None:
    """Copy the values in ``source`` into a model that is already there, keeping its types and devices. Raises as `fill`."""
    state = state_once(model)
    check(state, source, layout, where=where, hint=hint)
    for name, tensor in state.items():
        _copy(tensor, source, layout[name])


def read_parts(
    source: TensorSource, layout: Layout, likes: Mapping[str, Tensor], *, where: Path, hint: str = ""
) -> dict[str, Tensor]:
    """Some tensors of a model by name, on the CPU, in the shapes and types of ``likes``. Raises as `fill` of these alone."""
    check(likes, source, layout, where=where, ignore=source.names, hint=hint)
    made = {name: torch.empty(like.shape, dtype=like.dtype) for name, like in likes.items()}
    for name, value in made.items():
        _copy(value, source, layout[name])
    return made


def _copy(target: Tensor, source: TensorSource, pieces: Sequence[Piece]) -> None:
    for piece in pieces:
        target[piece.where].copy_(piece.read(source.read(piece.name)))


def check(
    state: Mapping[str, Tensor],
    source: TensorSource,
    layout: Layout,
    *,
    where: Path,
    ignore: Collection[str] = (),
    hint: str = "",
) -> None:
    """Raise CheckpointError unless ``source`` holds exactly what ``layout`` asks for, in the shapes of ``state``."""
    hint = f"; {hint}" if hint else ""
    pieces = {piece.name: (name, piece) for name in state for piece in layout[name]}
    missing = [name for name in pieces if name not in source.names]
    if missing:
        raise CheckpointError(f"{where} lacks {some(missing)}{hint}")
    unexpected = [name for name in source.names if name not in pieces and name not in ignore]
    if unexpected:
        raise CheckpointError(
            f"{where} has {some(unexpected)}, which the model of its config.json has no place for{hint}"
        )
    for stored, (name, piece) in pieces.items():
        wanted, given = piece.stored_shape(state[name]), source.shape(stored)
        # A single number used to be stored without an axis.
        if wanted != given and (wanted, given) != ((1,), ()):
            raise CheckpointError(f"{stored} in {where} has shape {list(given)}, the model needs {list(wanted)}{hint}")
        if state[name].is_floating_point() and source.dtype(stored) not in FLOATS:
            kind = str(source.dtype(stored)).removeprefix("torch.")
            raise CheckpointError(
                f"{stored} in {where} is stored as {kind}; weights must be float64, float32, float16 or bfloat16"
            )


def some(names: Sequence[str]) -> str:
    """Up to three of ``names`` and how many more there are."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
