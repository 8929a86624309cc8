"""`AdapterReader`: a folder of peft's as an adapter that can be served."""

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor

from anabranch.adapters import Adapter, Pair, read_peft
from anabranch.adapters.fits import check_fits
from anabranch.adapters.names import Names, names_of
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import some
from anabranch.serving.engine.adapter_place import check_small, place_of, size_of
from anabranch.serving.engine.adapter_rows import ServedAdapter

__all__ = ["HEAD", "AdapterReader", "kept_as"]

# Our name of the head, which every row that samples goes through behind the pass, and transformers' name.
HEAD, _HEAD = "head", "lm_head"


def kept_as(dtype: torch.dtype) -> torch.dtype:
    """What adapters of a model in ``dtype`` are kept in: its bfloat16, since a step reads all of their numbers, or float32."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


class AdapterReader:
    """Reads adapters of one model.

    Args:
        config: the model's, without adapters.
        parts: of its linear layers, those that can be adapted where it is served; None to say so of all.
        device: where the numbers shall be.
        dtype: what they are kept in, see `kept_as`.
    """

    def __init__(
        self,
        config: Decoder.Config,
        parts: Collection[str] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if config.linears:
            first = next(iter(config.linears))
            raise ConfigError(
                f"linears of the model has {first!r} already, and adapters are served beside plain matrices alone"
            )
        self._config, self._parts, self._device, self._dtype = config, parts, torch.device(device), dtype
        self._names: Names | None = None

    def __call__(
        self, folder: str, root: str | None = None, check: Callable[[int], None] | None = None
    ) -> ServedAdapter:
        """The adapter in ``folder``.

        Args:
            folder: its path, from ``root`` where there is one.
            root: folder that it has to be below, links followed; None where it may be anywhere.
            check: called with the bytes that it will take in memory before any number is read; what it raises is raised.

        Raises:
            CheckpointError: as `anabranch.adapters.load_peft`: there is none, it is damaged, or it is of another model; it is not below
                ``root``, or its config is larger than `MOST_CONFIG`.
            ConfigError: it changes what cannot be changed for some rows alone: whole tensors, or experts.
        """
        place = place_of(folder, root)
        check_small(place)
        if check is not None:
            check(size_of(place, self._dtype.itemsize))
        return self._read(place)

    def _read(self, place: Path) -> ServedAdapter:
        folder = str(place)
        adapter = read_peft(place)
        adapter.check_low_rank("requests choose among plain LoRA alone; serve a model that it was merged into", folder)
        if adapter.saved:
            raise ConfigError(
                f"{folder} brings {next(iter(adapter.saved))} whole, which all requests would get; serve the model that it was merged into"
            )
        if adapter.stacks:
            raise ConfigError(_OF_EXPERTS.format(folder=folder, name=next(iter(adapter.stacks))))
        names = self._names_for(adapter)
        check_fits(adapter, names, self._config, place)
        pairs = {names.places[module].part: names.places[module].ours(pair) for module, pair in adapter.pairs.items()}
        self._check_parts(pairs, folder)
        return self._served(pairs, folder)

    def _names_for(self, adapter: Adapter) -> Names:
        """Of the family that has all of the adapter's layers, which those of one model share: to find it takes a while."""
        if self._names is None or not self._names.places.keys() >= adapter.pairs.keys():
            # A head that is the embedding is a layer too, which adapters may add to.
            config = self._config.replace(tie_embeddings=False)
            self._names = names_of(config, adapter.pairs)
        return self._names

    def _check_parts(self, pairs: Collection[str], folder: str) -> None:
        """Raise ConfigError for layers that cannot be adapted for some rows alone."""
        if self._parts is None:
            return
        homeless = [part for part in pairs if part != HEAD and part not in self._parts]
        if not homeless:
            return
        if any(".experts." in part for part in homeless):
            raise ConfigError(_OF_EXPERTS.format(folder=folder, name=some(homeless)))
        raise ConfigError(
            f"{folder} adapts {some(homeless)}, which is computed with as a matrix of all rows; serve the model that it was merged into"
        )

    def _served(self, pairs: dict[str, Pair], folder: str) -> ServedAdapter:
        digest = hashlib.sha256()
        parts: dict[str, tuple[Tensor, Tensor, float]] = {}
        for part, pair in sorted(pairs.items()):
            # Before any is rounded, so that two that differ keep their keys and values apart.
            a_RC, b_RO = (half.detach().to("cpu", torch.float32).contiguous() for half in (pair.a_RC, pair.b_OR.T))
            digest.update(f"{part} {list(a_RC.shape)} {list(b_RO.shape)} {pair.scale!r}\n".encode())
            for half in (a_RC, b_RO):
                digest.update(half.numpy().data)
            parts[part] = a_RC.to(self._device, self._dtype), b_RO.to(self._device, self._dtype), pair.scale
        return ServedAdapter(parts, digest.hexdigest(), max(pair.rank for pair in pairs.values()))


_OF_EXPERTS = (
    "{folder} adapts experts ({name}), which are served as they are; serve the model that it was merged into, or an adapter of attention "
    "and dense layers"
)
