"""`LayerReader`: pools of adapters with their routers, and adapters that go by task, from folders to layers that can be served."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.adapters import load_peft
from anabranch.adapters.attach import attach
from anabranch.adapters.base_digest import Digest
from anabranch.adapters.fits import check_fits
from anabranch.adapters.glider import GliderPool, PoolSettings, TextFeatures
from anabranch.adapters.glider.pool_file import named_by, settings_in
from anabranch.adapters.graft import layers_of
from anabranch.adapters.names import Place, names_of
from anabranch.adapters.own_folder import read_own
from anabranch.adapters.peft_kinds import ByPeftTable
from anabranch.adapters.pool import LowRankPool
from anabranch.adapters.put_on import added_names
from anabranch.adapters.routed import RoutedLowRank
from anabranch.adapters.tasks import goes_by_task, needs_task, task_names
from anabranch.adapters.tuners.build import read_tuned
from anabranch.config import to_dict
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import build_empty, some
from anabranch.nn.quantize import PackedEmbedding
from anabranch.serving.engine.adapter_place import Folder
from anabranch.serving.engine.adapter_rows import HEAD, Sites
from anabranch.serving.engine.asking import Asking
from anabranch.serving.engine.served_layers import ServedLayers

__all__ = ["NOT_FOR_SOME", "LayerReader", "pool_of", "settings_of"]

# The end of what is said of an adapter of a kind that is for all requests or for none.
NOT_FOR_SOME = "which no request can have for itself; serve the model with it (anabranch adapters fuse)"
_OF_EXPERTS = (
    "{folder} adapts experts ({name}), which are served as they are; serve the model that it was merged into, or an adapter of attention "
    "and dense layers"
)
# Queries of a pool whose vectors are kept, some ten kilobytes each at most.
QUERIES = 64


class LayerReader:
    """Reads layers for one model.

    They are put onto a frame of its sizes, which has none of its matrices, and taken from there.

    Args:
        config: the model's, without adapters.
        sites: its matrices where it is served, whose numbers adapters of our own form know; None where there are none to compare with,
            and all can be adapted.
        device: where the numbers shall be.
        stored: gives the digest of the model's numbers where there are no sites; None where nobody has them.
        is_steady: a row's sums must not depend on how many rows there are, to the bit.
        states: embeds texts by the model that is served; None where nothing runs it.
    """

    def __init__(
        self,
        config: Decoder.Config,
        sites: Sites | None,
        device: torch.device,
        *,
        stored: Callable[[], Digest] | None = None,
        is_steady: bool = False,
        states: Any = None,
    ) -> None:
        self._config, self._device, self._sites, self._states = config, device, sites, states
        self._parts = None if sites is None else sites.parts
        self._base = None if sites is None else sites.model
        self._known = stored if self._base is None else self._base
        self._is_steady = is_steady

    def pool(self, found: Folder) -> ServedLayers:
        """A router over these adapters of peft's, each with what `anabranch.adapters.glider.describe_expert` wrote.

        Args:
            found: the folder of them all. Its kind is ``glider`` (by what a request asks for, and token by token), ``phatgoose`` (by gates,
                and prototypes where there are none), ``arrow`` (by prototypes); None for the first.

        Raises CheckpointError and ConfigError as `GliderPool.add` and `GliderPool.onto`, ConfigError for what cannot be served, DataError
        where an endpoint that its file names makes no vectors of instructions.
        """
        settings = settings_of(found)
        pool = pool_of(found, settings, states=self._states, is_looked_at=self._parts is None)
        frame = self._frame()
        pool.onto(frame)
        pool.leave()
        if pool.config.instruction and len(pool.matcher.members()[0]) > 1:
            # Now, and not while the first request waits.
            pool.calibrate()
        asked = Asking(pool, settings, str(found.path))
        return self._served(frame, found.path, found.kind or "glider", experts=tuple(found.experts), asked=asked)

    def own(self, folder: Path) -> ServedLayers:
        """An adapter in our own form. Raises as `read_own`, ConfigError for what cannot be served."""
        frame = read_own(folder, self._frame(), base=self._known, is_base_known=self._known is not None)
        if frame.config.replace(linears={}) != self._config.replace(linears={}):
            raise ConfigError(
                f"{folder} has virtual tokens in front of the model, or a ladder along it, {NOT_FOR_SOME}"
            )
        layers = layers_of(frame)
        most = max(
            (len(layer.config.ranks) for layer in layers.values() if isinstance(layer, RoutedLowRank)), default=0
        )
        kind = next(iter(frame.config.linears.values())).owner.kind
        return self._served(frame, folder, kind, experts=tuple(map(str, range(most))))

    def skills(self, folder: Path) -> ServedLayers:
        """A Poly of peft's, whose tasks are numbers. Raises as `load_peft`, ConfigError for what cannot be served."""
        return self._served(load_peft(folder, self._frame()), folder, "poly")

    def tuned(self, folder: Path, table: ByPeftTable) -> ServedLayers:
        """An adapter that peft computes, around the matrices that are served. Raises as `load_peft`, ConfigError for what cannot be
        served."""
        frame = self._frame()
        names = names_of(frame.config, ())
        adapter = read_tuned(folder, frame, table, weights=self._numbers)
        check_fits(adapter, names, frame.config, folder)
        return self._served(attach(adapter, frame, names), folder, table.kind.name.lower())

    def _numbers(self, place: Place) -> tuple[Tensor, Tensor | None]:
        """Those of a matrix where it is served; zeros for a look at what adds to it, or at what is none of these."""
        if self._sites is None or place.part not in self._sites.parts:
            return torch.zeros(place.out_dim, place.in_dim, device=self._device), None
        return self._sites.numbers(place.part)

    def _frame(self) -> Decoder:
        made: Decoder = build_empty(self._config)
        # What is put on is made where the embedding is; it takes no memory of its own.
        if self._base is None:
            weight = torch.empty(self._config.vocab_size, self._config.dim, device=self._device)
        elif isinstance(self._base.embedding, PackedEmbedding):
            made.embedding = self._base.embedding
            return made
        else:
            weight = self._base.embedding.weight.detach()
        made.embedding.weight = nn.Parameter(weight, requires_grad=False)
        return made

    def _served(
        self,
        frame: Decoder,
        folder: Path,
        kind: str,
        *,
        experts: tuple[str, ...] = (),
        asked: Asking | None = None,
    ) -> ServedLayers:
        layers: dict[str, Any] = layers_of(frame)
        self._check(layers, folder)
        # All of it: tables that layers share are none of theirs.
        frame.eval().requires_grad_(False)
        for layer in layers.values():
            layer.to(self._device)
            for module in layer.modules():
                if self._is_steady and isinstance(module, LowRankPool):
                    # A product for each adapter, which is then made of tiles.
                    module.backend = "reference"
        state = frame.state_dict()
        tensors = {name: state[name] for name in added_names(frame)}
        tasks = task_names(frame) if goes_by_task(frame) else ()
        return ServedLayers(
            layers,
            version=_digest(frame.config, tensors, tasks, () if asked is None else asked.chosen_by),
            nbytes=sum(tensor.nbytes for tensor in tensors.values()),
            kind=kind,
            experts=experts,
            tasks=tasks,
            needs_task=needs_task(frame),
            asked=asked,
        )

    def _check(self, layers: Mapping[str, Any], folder: Path) -> None:
        """Raise ConfigError for layers that cannot be added for some rows alone."""
        homeless = [part for part in layers if part == HEAD or ".experts." in part]
        if self._parts is not None:
            homeless = [part for part in layers if part in homeless or part not in self._parts]
        if any(".experts." in part for part in homeless):
            raise ConfigError(_OF_EXPERTS.format(folder=folder, name=some(homeless)))
        if homeless:
            raise ConfigError(
                f"{folder} adapts {some(homeless)}, which is computed behind the pass or as a matrix of all rows; of it requests may have "
                "plain LoRA alone"
            )
        for part, layer in layers.items():
            kind = layer.config.owner.kind
            if not layer.only_adds():
                raise ConfigError(
                    f"{folder} has a layer of kind {kind!r} at {part} that does more than add to what its matrix makes, {NOT_FOR_SOME}"
                )
            if isinstance(layer, RoutedLowRank) and layer.router is None:
                raise ConfigError(
                    f"{folder} has a pool at {part} and no router, so nobody chooses; name its adapters one by one instead"
                )


def pool_of(
    found: Folder, settings: PoolSettings | None = None, *, states: Any = None, is_looked_at: bool = False
) -> GliderPool:
    """A pool of the adapters in a folder, each with what was written beside it; on no model yet. See `LayerReader.pool`.

    It chooses, and compares queries, as its ``pool.json`` says.

    Args:
        found: the folder.
        settings: of it; None for `settings_of`.
        states: the `HiddenStates` of the model that it is for; None where there is none.
        is_looked_at: endpoints are not asked, nor the model run; what is made of that is for nobody to choose by.

    Raises CheckpointError for a file that cannot be read, ConfigError for settings that cannot be, DataError for an endpoint that makes no
    vectors of instructions.
    """
    settings = settings_of(found) if settings is None else settings
    with named_by(found.settings):
        plugins = settings.plugins(TextFeatures() if is_looked_at else states)
    pool = GliderPool.of(
        found.experts,
        settings.choice,
        cached=QUERIES,
        embedder=None if is_looked_at else plugins.embedder,
        writer=plugins.writer,
    )
    pool.matcher.warns = False
    return pool


def settings_of(found: Folder) -> PoolSettings:
    """What the ``pool.json`` of a pool says, and what its kind decides before that. Raises as `settings_in`."""
    return settings_in(found.path, len(found.experts), found.kind)


def _digest(config: Decoder.Config, tensors: Mapping[str, Tensor], *beside: object) -> str:
    """Equal where layers and numbers are, and what is told ``beside``."""
    digest = hashlib.sha256(repr((to_dict(config)["linears"], *beside)).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
