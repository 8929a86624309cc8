"""Folders of adapters of any kind that stands beside matrices, in front of a model or along it: what there is, and its numbers; no base.

    write_own("my-adapter", model)              # of a model with layers that were put on
    read_own("my-adapter", base)                # onto the same base, in place

    adapter.json            the linear layers by pattern, as in a model's config, virtual tokens and ladder; what the base was, by name
                            and by content
    adapter.safetensors     their numbers, by our names

LoRA is better kept as peft keeps it (`save_peft`), which other programs read; these are for what peft has no form for.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from anabranch.adapters.around import around_config, put_around, take_around
from anabranch.adapters.base_digest import Digest, base_digest, is_same_base
from anabranch.adapters.folder_files import NUMBERS, OWN, OWN_FORM, adapter_folder
from anabranch.adapters.front import Front
from anabranch.adapters.ladder import Ladder
from anabranch.adapters.onto_module import check_module, chosen, count_beside
from anabranch.adapters.put_on import added_names, linears_on, put_on, take_off
from anabranch.bounds import shown
from anabranch.config import Config, Field, configclass, from_dict, to_dict
from anabranch.errors import CheckpointError, ConfigError
from anabranch.files import atomic_write_json, read_json
from anabranch.lm.decoder import Decoder
from anabranch.lm.shards import write_file
from anabranch.lm.tensors import FLOATS, SafetensorsFiles, some
from anabranch.nn import Linear

__all__ = ["OWN", "OwnAdapter", "described_in", "is_own", "load_numbers", "own_of", "read_own", "write_own"]

FORMAT, SCHEMA = "anabranch-adapter", 1
M = TypeVar("M", bound=nn.Module)


@configclass
class _Parts(Config):
    """Of adapter.json: what the adapter is made of."""

    linears: dict[str, Linear.Config] = Field(default_factory=dict)
    streams: Front.Config | None = None
    block: Ladder.Config | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "_Parts":
        """What is on a model."""
        if not isinstance(model, Decoder):
            return cls(linears=linears_on(model))
        config = model.config
        streams = config.streams if isinstance(config.streams, Front.Config) else None
        block = config.block if isinstance(config.block, Ladder.Config) else None
        return cls(linears=config.linears, streams=streams, block=block)

    def count_on(self, base: nn.Module) -> int:
        """Numbers of all of it. Raises ConfigError where it cannot be on this base."""
        if isinstance(base, Decoder):
            made = around_config(base.config.replace(linears=self.linears), self.streams, self.block)
            return made.count().parameters - base.config.count().parameters
        if self.streams is not None or self.block is not None:
            raise ConfigError(
                f"tokens in front and ladders are for models of ours, and this one is a {type(base).__name__}"
            )
        return count_beside(base, chosen(base, self.linears))

    def put(self, model: nn.Module) -> None:
        """All of it onto the base."""
        if self.linears:
            put_on(model, self.linears)
        else:
            model.requires_grad_(False)
        if isinstance(model, Decoder):
            put_around(model, front=self.streams, ladder=self.block)

    def take_off(self, model: nn.Module) -> None:
        """The base again."""
        if isinstance(model, Decoder):
            take_around(model)
        if self.linears:
            take_off(model)


@dataclass(frozen=True, eq=False)
class OwnAdapter:
    """What is in a folder of this form, without a model.

    Attributes:
        table: its adapter.json.
        parts: what the adapter is made of.
        numbers: by our names.
    """

    table: Mapping[str, Any]
    parts: _Parts
    numbers: Mapping[str, Tensor]

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Raises CheckpointError where there is none, or it is damaged."""
        place = Path(folder)
        table = _table_of(place)
        parts, source = _parts_of(place, table), _opened(place / NUMBERS)
        numbers = {name: source.read(name).clone() for name in source.names}
        for name, value in numbers.items():
            _check_finite(name, value, place / NUMBERS)
        return cls(table, parts, numbers)

    def with_numbers(self, numbers: Mapping[str, Tensor]) -> Self:
        """The same adapter of other numbers."""
        return replace(self, numbers=numbers)

    def write(self, folder: str | Path) -> None:
        """As `write_own`."""
        for name, value in self.numbers.items():
            _check_finite(name, value, f"what would go to {folder}")
        with adapter_folder(folder, [OWN_FORM]) as temporary:
            atomic_write_json(temporary / OWN, dict(self.table))
            write_file(temporary / NUMBERS, {name: value.contiguous() for name, value in self.numbers.items()})


def is_own(folder: str | Path) -> bool:
    """Whether ``folder`` holds an adapter of this form."""
    return (Path(folder) / OWN).is_file()


def write_own(folder: str | Path, model: nn.Module, *, base: str | None = None) -> None:
    """Write the layers beside the matrices of ``model``, all or nothing.

    Args:
        folder: not there, empty, or with an adapter of this form, whose settings and numbers are replaced; what people said of it stays,
            see `anabranch.adapters.folder_files`.
        model: with layers: one of ours, or any that `put_on` put them onto.
        base: what the model was without, for the record.

    Raises ConfigError for a model without any, CheckpointError for numbers that are not finite, DataError where the folder holds something
    else or cannot be written, CapacityError where the disk is full.
    """
    check_module(model)
    if _Parts.of(model) == _Parts():
        raise ConfigError("the model has no adapter to save; put layers onto it first")
    told = {
        "format": FORMAT,
        "schema": SCHEMA,
        "base": base,
        **_sizes_of(model),
        "base_digest": base_digest(model),
    }
    own_of(model, told).write(folder)


def own_of(model: nn.Module, told: Mapping[str, Any]) -> OwnAdapter:
    """What is on ``model``, with ``told`` of the base in its table."""
    parts, state = _Parts.of(model), model.state_dict()
    return OwnAdapter({**told, **to_dict(parts)}, parts, {name: state[name].detach() for name in added_names(model)})


def read_own(
    folder: str | Path,
    model: M,
    *,
    trainable: bool = False,
    base: nn.Module | Callable[[], Digest] | None = None,
    is_base_known: bool = True,
) -> M:
    """Put the adapter in ``folder`` onto ``model``, in place, and return it.

    Args:
        folder: as `write_own` wrote it.
        model: the base: one of ours, or any module of torch that has the layers by the same names.
        trainable: whether the adapter learns. The base does not.
        base: whose numbers the adapter has to know, where ``model`` has but their sizes, or what gives the digest of these; None for
            ``model``.
        is_base_known: False where there are no such numbers, for a look at the folder alone.

    Raises CheckpointError where there is none, it is damaged or of another model, by sizes or by content; ConfigError as `put_on`. The
    model is then as it was. Of one whose matrices are quantized or elsewhere the content is looked at only where it is as it was.
    """
    check_module(model)
    place = Path(folder)
    table = _table_of(place)
    is_ours = isinstance(model, Decoder)
    if is_ours != ("model" not in table):
        whose = "one of ours" if "model" not in table else f"a {shown(table['model'])}"
        raise CheckpointError(
            f"{place} is of {whose}, whose layers have other names than those of this {type(model).__name__}"
        )
    for name, ours in _sizes_of(model).items():
        if is_ours and table.get(name) != ours:
            raise CheckpointError(
                f"{place} is of a model whose {name} is {table.get(name)!r}, and this one's is {ours}"
            )
    if is_base_known:
        _check_base(place, table, model if base is None else base)
    parts = _parts_of(place, table)
    # A few words may ask for any number of numbers; far more than the file has are never made. What else is wrong is told by name below.
    asked = parts.count_on(model)
    if asked > 16 * (held := _numbers_in(place / NUMBERS)) + 2**20:
        raise CheckpointError(
            f"{place / NUMBERS} holds {held:,} numbers, and {OWN} describes an adapter of {asked:,}; copy the folder again"
        )
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts.put(model)
    try:
        load_numbers(model, place / NUMBERS)
    except BaseException:
        parts.take_off(model)
        for parameter in learned:
            parameter.requires_grad_(True)
        raise
    if not trainable:
        model.requires_grad_(False)
    return model


def _sizes_of(model: nn.Module) -> dict[str, Any]:
    """What is told of a base besides its digest."""
    if isinstance(model, Decoder):
        return {"dim": model.config.dim, "num_layers": model.config.num_layers}
    return {"model": type(model).__name__}


def described_in(folder: str | Path) -> dict[str, Any]:
    """What an adapter of ours is, by its files alone: ``base``, ``kinds``, ``layers`` (pattern: kind), ``tasks``, ``parameters`` and
    ``size_bytes``.

    All numbers are read. Raises CheckpointError where there is none, or it is damaged.
    """
    place = Path(folder)
    table = _table_of(place)
    parts, source = _parts_of(place, table), _opened(place / NUMBERS)
    for name in source.names:
        _check_finite(name, source.read(name), place / NUMBERS)
    around = [part for part in (parts.streams, parts.block) if part is not None]
    kinds = [config.owner.kind for config in (*parts.linears.values(), *around)]
    tasks = dict.fromkeys(task for config in parts.linears.values() for task in getattr(config, "tasks", ()))
    base = table.get("base")
    return {
        "base": base if isinstance(base, str) else None,
        "kinds": list(dict.fromkeys(map(str, kinds))),
        "layers": {pattern: str(config.owner.kind) for pattern, config in parts.linears.items()},
        "tasks": list(tasks),
        "parameters": sum(math.prod(source.shape(name)) for name in source.names),
        "size_bytes": sum((place / name).stat().st_size for name in (OWN, NUMBERS)),
    }


def _table_of(place: Path) -> dict[str, Any]:
    """adapter.json. Raises CheckpointError for none, or one of another format."""
    if not is_own(place):
        raise CheckpointError(f"no adapter of anabranch's in {place} (looked for {OWN})")
    table = read_json(place / OWN)
    if table.get("format") != FORMAT or table.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{place / OWN} is of format {table.get('format')!r}, schema {table.get('schema')!r}; this version reads {FORMAT!r}, {SCHEMA}"
        )
    return table


def _parts_of(place: Path, table: dict[str, Any]) -> _Parts:
    try:
        parts = from_dict(_Parts, {name: table[name] for name in ("linears", "streams", "block") if name in table})
    except ConfigError as error:
        raise CheckpointError(f"{place / OWN} does not describe an adapter: {error}") from None
    if parts == _Parts():
        raise CheckpointError(f"{place / OWN} describes an adapter of nothing: it has no linears, streams or block")
    return parts


def _check_base(place: Path, table: dict[str, Any], base: nn.Module | Callable[[], Digest]) -> None:
    """Raise CheckpointError where the adapter is of another base; those of earlier versions do not say."""
    told = table.get("base_digest")
    if told is None:
        return
    ours = base_digest(base) if isinstance(base, nn.Module) else base()
    try:
        is_same = is_same_base(told, ours)
    except (AttributeError, KeyError, TypeError):
        raise CheckpointError(f"base_digest in {place / OWN} is no digest of a base; copy the folder again") from None
    if not is_same:
        named = table.get("base")
        raise CheckpointError(
            f"{place} was trained on another base{f', {named}' if named else ''}, with other numbers than this model's; give that one (to "
            f"put it onto this one all the same, take base_digest out of {OWN})"
        )


@torch.no_grad()
def load_numbers(model: Any, path: Path, *, prefix: str = "", names: Sequence[str] | None = None) -> None:
    """Copy the numbers of a file into the layers of ``model``, or into what is named of it.

    Raises CheckpointError for others than it has, or that are not finite.
    """
    source, state = _opened(path), model.state_dict()
    names = added_names(model) if names is None else names
    missing = sorted(set(names) - {name.removeprefix(prefix) for name in source.names})
    extra = sorted({name.removeprefix(prefix) for name in source.names} - set(names))
    if missing or extra:
        what = f"lacks {some(missing)}" if missing else f"has {some(extra)}, for which the model has no layer"
        raise CheckpointError(f"{path} {what}; is it of another model, of a version before this one, or damaged?")
    for name in names:
        value, target = source.read(prefix + name), state[name]
        # A single number used to be stored without an axis.
        if value.shape != target.shape and (value.shape, target.shape) != ((), (1,)):
            raise CheckpointError(
                f"{name} in {path} has shape {list(value.shape)}, and the model's {list(target.shape)}; is it of another model?"
            )
        _check_finite(name, value, path)
        target.copy_(value)


def _check_finite(name: str, value: Tensor, path: Path | str) -> None:
    if value.dtype in FLOATS and not bool(torch.isfinite(value).all()):
        raise CheckpointError(f"{name} in {path} holds NaN or infinity; the adapter is damaged, or its training failed")


def _opened(path: Path) -> SafetensorsFiles:
    if not path.is_file():
        raise CheckpointError(f"no numbers of an adapter at {path}; copy the folder again")
    return SafetensorsFiles([path])


def _numbers_in(path: Path) -> int:
    """How many numbers a file has; only its header is read."""
    source = _opened(path)
    return sum(math.prod(source.shape(name)) for name in source.names)
