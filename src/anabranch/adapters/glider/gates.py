"""PHATGOOSE's gates: the second stage of an expert, trained alone with everything else frozen.

    y = W u + sigmoid(v . u) scale B A u            v from 0

    anabranch adapt MODEL rows.jsonl --method gate --set method.adapter=sql-lora --steps 100 --out runs/gate

writes the adapter and its gates as one folder, which a `GliderPool` takes.
"""
# Shapes: C inputs, R rank

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from anabranch.adapters.adapt.method import Method, Written
from anabranch.adapters.attached import attached_on, begin, check_bare, our_layers
from anabranch.adapters.copies import without_copies
from anabranch.adapters.fits import check_fits
from anabranch.adapters.glider.folder import describe_expert, read_instructions
from anabranch.adapters.graft import check_pools, graft, layers_of, with_layers
from anabranch.adapters.low_rank import LowRank, Pair
from anabranch.adapters.names import names_of
from anabranch.adapters.peft_folder import read_peft, write_peft
from anabranch.adapters.whole import with_parted_head
from anabranch.config import configclass
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.nn import BuildContext, Count, Linear
from anabranch.nn.linear import Projection

__all__ = ["GateMethod", "GatedLowRank"]


class GatedLowRank(LowRank, kind="gated_low_rank"):
    """sigmoid(v . x) scale B A x.

    Attributes:
        gate: parameter [C], v; 0 at first, which halves what the adapter adds.
    """

    @configclass
    class Config(LowRank.Config):
        """As of `LowRank`."""

        def count(self, projection: Projection, context: BuildContext) -> Count:
            """R (C + O) weights, and C of the gate."""
            return Count.dense(self.rank * (projection.in_dim + projection.out_dim) + projection.in_dim)

    def __init__(self, config: Config, projection: Projection, context: BuildContext) -> None:
        super().__init__(config, projection, context)
        self.gate = nn.Parameter(torch.zeros(projection.in_dim))

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """What is added to y."""
        wide = x.to(self.gate.dtype)
        return (wide @ self.gate).sigmoid().unsqueeze(-1) * self.product(self.dropped(x))

    def put(self, pair: Pair, device: torch.device | None = None, *, trainable: bool = False) -> None:
        """Take over the numbers of a pair; the gate is 0 and learns, the pair does so if ``trainable``."""
        super().put(pair, device, trainable=trainable)
        self.gate = nn.Parameter(torch.zeros(self.a.shape[1], device=device))


class GateMethod(Method, kind="gate"):
    """Gates of an adapter that is there (arXiv 2402.05859)."""

    summary: ClassVar[str] = "gates of an adapter, by which a pool of several routes"

    @configclass
    class Config(Method.Config):
        """Attributes: ``adapter``, a folder of peft's with plain LoRA, all of whose layers get a gate (``targets`` do not matter)."""

        adapter: str | None = None

    config: Config

    def layer(self, tasks: Sequence[str]) -> Linear.Config:
        """Of no use alone: layers are those of the adapter."""
        return GatedLowRank.Config()

    def begin(self, model: Decoder, tasks: Sequence[str], *, seed: int) -> Decoder:
        """The adapter, frozen, and its gates. Raises as `load_peft`, ConfigError for no adapter, or one with whole tensors or stacks."""
        folder = self.config.adapter
        if folder is None:
            raise ConfigError("method gate needs an adapter to train gates of: --set method.adapter=FOLDER")
        adapter = read_peft(folder)
        adapter.check_low_rank("gates are of plain LoRA alone", folder)
        if adapter.saved or adapter.stacks:
            name = next(iter([*adapter.saved, *adapter.stacks]))
            raise ConfigError(f"{folder} brings {name}, which has no gate; train gates of plain LoRA")
        # Written beside the gates in the end, and told now where they cannot be.
        read_instructions(folder)
        check_bare(model)
        config = with_parted_head(model.config, [adapter])
        names = names_of(config, adapter.layers, None)
        check_fits(adapter, names, config, Path(folder))
        adapter = without_copies(adapter, names, model, folder, "which has no gate; train gates of plain LoRA")
        config = with_parted_head(model.config, [adapter])
        pairs: dict[str, Any] = our_layers(names, adapter, config)
        configs = {
            part: GatedLowRank.Config(rank=pair.rank, alpha=float(pair.alpha), rslora=pair.rslora)
            for part, pair in pairs.items()
        }
        made = with_layers(config, configs, names.parts)
        check_pools(model, made)
        begin(model, {"adapter": adapter}, names, config)
        device = model.embedding.weight.device
        graft(model, made, lambda part, layer: layer.put(pairs[part], device))
        return model

    def write(self, folder: Path, model: Decoder, base: str) -> Written:
        """The adapter as it was, with its gates beside it, and its instructions where it has some."""
        attached = attached_on(model)
        layers = layers_of(model)
        adapter = attached.adapter
        places = attached.names.places
        gates = {module: layers[places[module].part].gate.detach().cpu() for module in adapter.layers}
        assert self.config.adapter is not None
        texts = read_instructions(self.config.adapter)
        write_peft(folder, adapter)
        describe_expert(folder, gate=gates, instruction=texts or None)
        return Written(folder, "peft", "with its gates, for a GliderPool")
