"""`AdapterReader`: a folder of peft's, one of our own form, or a pool of the former, as what can be served."""

import functools
import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from anabranch.adapters import Adapter, Pair, read_peft
from anabranch.adapters.attached import our_layers
from anabranch.adapters.base_digest import Digest
from anabranch.adapters.copies import without_copies
from anabranch.adapters.fits import check_fits
from anabranch.adapters.names import Names, names_of
from anabranch.adapters.numbers import Numbers
from anabranch.adapters.peft_kinds import ByPeftTable
from anabranch.adapters.peft_tables import table_in
from anabranch.adapters.scaling import Scale
from anabranch.adapters.skills import Skills
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import some
from anabranch.serving.engine.adapter_parts import SERVED, ServedPart, part_bytes, part_of
from anabranch.serving.engine.adapter_place import Folder, check_small, folder_of, root_untold, size_of
from anabranch.serving.engine.adapter_rows import HEAD, Sites
from anabranch.serving.engine.layer_reader import NOT_FOR_SOME, LayerReader
from anabranch.serving.engine.pass_adapters import ServedAdapter
from anabranch.serving.engine.served_layers import ServedLayers

__all__ = ["AdapterReader", "Looked", "Served", "kept_as"]

Served = ServedAdapter | ServedLayers

# A request adapter's numbers by the part of a matrix that they are for.
_Layers = Mapping[str, Numbers]


def kept_as(dtype: torch.dtype) -> torch.dtype:
    """What adapters of a model in ``dtype`` are kept in: its bfloat16, since a step reads all of their numbers, or float32."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


@dataclass(frozen=True)
class Looked:
    """An adapter that was looked at and is not kept; ``nbytes`` it would take."""

    nbytes: int
    version: str = ""
    told: dict[str, Any] = field(default_factory=dict)


class AdapterReader:
    """Reads adapters of one model.

    Args:
        config: the model's, without adapters.
        sites: its matrices where it is served; None to `look` alone.
        device: where the numbers shall be.
        dtype: what they are kept in, see `kept_as`; layers are in float32.
        stored, is_steady, states: see `LayerReader`.
    """

    def __init__(
        self,
        config: Decoder.Config,
        sites: Sites | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        stored: Callable[[], Digest] | None = None,
        is_steady: bool = False,
        states: Any = None,
    ) -> None:
        if config.linears:
            first = next(iter(config.linears))
            raise ConfigError(
                f"linears of the model has {first!r} already, and adapters are served beside plain matrices alone"
            )
        # A head that is the embedding is a layer too, which adapters may add to.
        self._config = config.replace(tie_embeddings=False)
        self._sites, self._device, self._dtype = sites, torch.device(device), dtype
        self._names: Names | None = None
        self._of_layers = LayerReader(config, sites, self._device, stored=stored, is_steady=is_steady, states=states)

    def __call__(self, folder: str, root: str | None = None, check: Callable[[int], None] | None = None) -> Served:
        """What is in ``folder``.

        Args:
            folder: its path, from ``root`` where there is one; of a pool also with its kind in front (`PoolKind`), ``arrow:pool``.
            root: folder that it has to be below, links followed; None where it may be anywhere.
            check: called with the bytes that it will take in memory before any number is read; what it raises is raised.

        Raises:
            CheckpointError: as `anabranch.adapters.load_peft`: there is none, it is damaged, or it is of another model; it is not below
                ``root``, or its config is larger than `MOST_CONFIG`. Where there is a ``root``, paths in messages begin below it.
            ConfigError: it is of a kind, or changes what cannot be changed for some rows alone: whole tensors, or experts.
        """
        assert self._sites is not None, "a reader without sites only checks"
        with root_untold(root):
            found = self._found(folder, root, check)
            made = self._made_of(found)
            if not isinstance(made, Adapter):
                return made
            layers, kind = self._layers(made, found.path, self._sites)
            return self._served(layers, self._sites, str(found.path), kind)

    def look(self, folder: str, root: str | None = None, check: Callable[[int], None] | None = None) -> Looked:
        """How large what is in ``folder`` will be. Arguments and errors as of a call, but for what the numbers of sites say."""
        found = self._found(folder, root, check)
        made = self._made_of(found)
        if not isinstance(made, Adapter):
            return Looked(made.nbytes)
        layers, _ = self._layers(made, found.path, None)
        return Looked(sum(part_bytes(numbers, self._dtype) for numbers in layers.values()))

    def _found(self, folder: str, root: str | None, check: Callable[[int], None] | None) -> Folder:
        found = folder_of(folder, root)
        check_small(found)
        if check is not None:
            check(size_of(found, self._dtype.itemsize, (self._config.vocab_size, self._config.dim)))
        return found

    def _made_of(self, found: Folder) -> ServedLayers | Adapter:
        """The layers of a pool, of an adapter of our own form, of a Poly of peft's; the numbers of any other."""
        place = found.path
        if found.experts:
            return self._of_layers.pool(found)
        if found.kind is not None:
            raise CheckpointError(
                f"{place} has no folders of adapters, so there is nothing that {found.kind} could choose from"
            )
        if found.is_own:
            return self._of_layers.own(place)
        table = table_in(place)
        if isinstance(table, ByPeftTable):
            return self._of_layers.tuned(place, table)
        adapter = read_peft(place)
        is_poly = adapter.layers and all(isinstance(one, Skills) for one in adapter.layers.values())
        return self._of_layers.skills(place) if is_poly and not adapter.saved else adapter

    def _layers(self, adapter: Adapter, place: Path, sites: Sites | None) -> tuple[_Layers, str]:
        folder = str(place)
        why = "which all requests would get; serve the model that it was merged into"
        if adapter.saved:
            raise ConfigError(f"{folder} brings {next(iter(adapter.saved))} whole, {why}")
        if adapter.prompt_MW is not None or not all(isinstance(one, SERVED) for one in adapter.layers.values()):
            raise ConfigError(f"{folder} is {adapter.what}, {NOT_FOR_SOME}")
        names = self._names_for(adapter)
        check_fits(adapter, names, self._config, place)
        if sites is not None:
            adapter = without_copies(adapter, names, sites.model, folder, why)
        layers = our_layers(names, adapter, self._config)
        _check_parts(layers, None if sites is None else sites.parts, folder)
        return layers, adapter.what

    def _names_for(self, adapter: Adapter) -> Names:
        """Of the family that has all of the adapter's layers, which those of one model share: to find it takes a while."""
        if self._names is None or not self._names.places.keys() >= adapter.layers.keys():
            self._names = names_of(self._config, adapter.layers)
        return self._names

    def _served(self, layers: _Layers, sites: Sites, folder: str, kind: str) -> ServedAdapter:
        digest = hashlib.sha256()
        parts: dict[str, ServedPart] = {}
        for part, numbers in sorted(layers.items()):
            _digest(digest.update, part, numbers)
            try:
                parts[part] = part_of(numbers, self._device, self._dtype, functools.partial(sites.numbers, part))
            except ConfigError as error:
                raise ConfigError(f"{folder} adapts {part}: {error}") from None
        return ServedAdapter(parts, digest.hexdigest(), kind.lower())


def _digest(update: Callable[[bytes | memoryview], None], part: str, numbers: Numbers) -> None:
    """Tell a digest the numbers of a part, whatever type they are stored in."""
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in numbers.tensors().items()
    }
    told: list[object] = [part, numbers.what]
    if not isinstance(numbers, Scale):
        told += [numbers.alpha, numbers.rslora]  # type: ignore[attr-defined]
    update(f"{told!r} {[(name, list(tensor.shape)) for name, tensor in tensors.items()]}\n".encode())
    for tensor in tensors.values():
        update(tensor.numpy().data)


def _check_parts(layers: _Layers, known: Collection[str] | None, folder: str) -> None:
    """Raise ConfigError for layers that cannot be adapted for some rows alone; ``known`` are those that can, None to say so of all."""
    head = layers.get(HEAD)
    if isinstance(head, Scale) and head.is_input:
        raise ConfigError(
            f"{folder} multiplies what goes into the head, which all requests share; serve the model that it was merged into"
        )
    other = [part for part, numbers in layers.items() if ".experts." in part and not isinstance(numbers, Pair)]
    if other:
        raise ConfigError(
            f"{folder} is {layers[other[0]].what} and adapts {some(other)}; experts are served with plain LoRA alone"
        )
    homeless = [part for part in layers if known is not None and part != HEAD and part not in known]
    if not homeless:
        return
    if any(".experts." in part for part in homeless):
        raise ConfigError(_OF_EXPERTS.format(folder=folder, name=some(homeless)))
    raise ConfigError(
        f"{folder} adapts {some(homeless)}, which is computed with as a matrix of all rows; serve the model that it was merged into"
    )


_OF_EXPERTS = (
    "{folder} adapts experts ({name}), which this engine has not whole in its memory and serves as they are; serve the model that it was "
    "merged into, an adapter of attention and dense layers, or leave out the expert budget"
)
