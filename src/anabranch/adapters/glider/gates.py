"""PHATGOOSE's gates: the second stage of an expert, trained alone with everything else frozen.

    y = W u + sigmoid(v . u) scale B A u            v from 0

    anabranch adapt MODEL rows.jsonl --method gate --set method.adapter=sql-lora --steps 100 --out runs/gate

writes the adapter and its gates as one folder, which a `GliderPool` takes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from anabranch.adapters.adapt.method import Method, Written
from anabranch.adapters.attached import attached_on, begin, check_bare, our_layers
from anabranch.adapters.copies import without_copies
from anabranch.adapters.fits import check_fits
from anabranch.adapters.gated import GatedLowRank
from anabranch.adapters.glider.folder import describe_expert, read_instructions
from anabranch.adapters.graft import check_pools, graft, layers_of, with_layers
from anabranch.adapters.names import names_of
from anabranch.adapters.peft_folder import read_peft, write_peft
from anabranch.adapters.whole import with_parted_head
from anabranch.config import configclass
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.nn import Linear

__all__ = ["GateMethod"]


class GateMethod(Method, kind="gate"):
    """Gates of an adapter that is there (arXiv 2402.05859)."""

    summary: ClassVar[str] = "gates of an adapter, by which a pool of several routes"
    folders: ClassVar[tuple[str, ...]] = ("adapter",)

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
        write_peft(folder, adapter.of_base(base))
        describe_expert(folder, gate=gates, instruction=texts or None)
        return Written(folder, "peft", "with its gates, for a GliderPool")
