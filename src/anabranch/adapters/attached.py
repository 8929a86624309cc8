"""What has been put onto a model, which the model remembers: adapters by name, and all that takes them off again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from anabranch.adapters.graft import check_decoder, graft
from anabranch.adapters.ladder import LADDERED
from anabranch.adapters.names import Names
from anabranch.adapters.numbers import Numbers
from anabranch.adapters.peft_folder import Adapter
from anabranch.adapters.stacked import expanded
from anabranch.adapters.whole import part_head
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.nn import Linear
from anabranch.routing.fixed import fix, release

__all__ = ["ATTACHED", "Attached", "attached_on", "begin", "check_bare", "configs_of", "forget", "our_layers", "put_on"]

# How a model remembers what was put onto it.
ATTACHED = "_attached_adapter"


@dataclass(eq=False)
class Attached:
    """What was put onto a model.

    Attributes:
        adapters: as they were read, by name; several share a pool.
        names: of the model's layers.
        config: of the model before.
        before: what stood where the adapter's whole tensors are now, by the names of transformers.
        learned: whether a parameter of the base learned before, by its name then.
        head: of the model before.
        merged: the adapter that is in the matrices; None where it stands beside them.
        base: the numbers that it took the place of: (tensor of ours, where in it, what was there).
        is_pool: whether rows choose from the adapters, be it one.
        trainable: whether the adapter learns while it stands beside.
    """

    adapters: Mapping[str, Adapter]
    names: Names
    config: Decoder.Config
    before: dict[str, Tensor] = field(default_factory=dict)
    learned: dict[str, bool] = field(default_factory=dict)
    head: Any = None
    merged: Adapter | None = None
    base: list[tuple[str, tuple[int | slice, ...], Tensor]] = field(default_factory=list)
    is_pool: bool = False
    trainable: bool = False

    @property
    def adapter(self) -> Adapter:
        """The one that there is for all rows. Raises ConfigError for a pool."""
        if self.is_pool:
            many = f"{len(self.adapters)} adapters" if len(self.adapters) > 1 else "a pool of one adapter"
            ways = "combine makes one of them" if len(self.adapters) > 1 else "load_peft puts it on for all"
            raise ConfigError(f"the model has {many} ({', '.join(self.adapters)}), for rows to choose from; {ways}")
        return next(iter(self.adapters.values()))


def attached_on(model: Decoder) -> Attached:
    """What was put onto ``model``. Raises ConfigError where nothing was."""
    attached = getattr(model, ATTACHED, None)
    if attached is None:
        raise ConfigError("the model has no adapter that load_peft put onto it")
    return attached


def begin(model: Decoder, adapters: Mapping[str, Adapter], names: Names, config: Decoder.Config) -> Attached:
    """Note what the model is, freeze it, and give it the head of its own that ``config`` may say."""
    attached = Attached(adapters, names, model.config, head=model.head)
    attached.learned = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    fix(model, ATTACHED)
    if model.config.tie_embeddings and not config.tie_embeddings:
        part_head(model, config)
        # A head that came with the adapter is not the base's.
        attached.learned = dict.fromkeys((name for name, _ in model.named_parameters()), False) | attached.learned
    object.__setattr__(model, ATTACHED, attached)
    return attached


def forget(model: Decoder) -> None:
    """Let parameters of the base learn that learned before, and the model not know of an adapter any more. What was put around it since
    learns as it did."""
    attached = attached_on(model)
    for name, parameter in model.named_parameters():
        if (learned := attached.learned.get(name.replace(LADDERED, "."))) is not None:
            parameter.requires_grad_(learned)
    release(model, ATTACHED)
    object.__delattr__(model, ATTACHED)


def our_layers(names: Names, adapter: Adapter, config: Decoder.Config) -> dict[str, Numbers]:
    """The numbers by our parts, with outputs in our order; those of stacked experts one by one."""
    own = {names.places[module].part: names.places[module].ours(one) for module, one in adapter.layers.items()}
    return own | expanded(adapter.stacks, config, "the adapter")


def configs_of(adapter: Adapter, layers: Mapping[str, Numbers], *, trainable: bool = False) -> dict[str, Linear.Config]:
    """The layers that hold the numbers of ``adapter``, by our parts; those that learn have its dropout."""
    dropout = float(adapter.table.get("lora_dropout") or 0.0) if trainable else 0.0
    return {part: numbers.config(dropout=dropout, learns=trainable) for part, numbers in layers.items()}


def put_on(model: Decoder, made: Decoder, layers: Mapping[str, Numbers], *, trainable: bool = False) -> None:
    """Put the layers of ``made`` beside the matrices of ``model``, with the numbers of ``layers``."""
    device = model.embedding.weight.device
    graft(model, made, lambda part, layer: layer.put(layers[part], device, trainable=trainable))


def check_bare(model: Decoder) -> None:
    """Raise ConfigError where something stands beside, or instead of, matrices of the model already."""
    check_decoder(model)
    if getattr(model, ATTACHED, None) is not None:
        raise ConfigError("the model has an adapter already; unload it first, or make one adapter of both (combine)")
    if model.config.linears:
        first = next(iter(model.config.linears))
        raise ConfigError(
            f"linears of the model has {first!r} already, and an adapter is put onto plain matrices alone"
        )
    if model.streams is not None:
        raise ConfigError(
            f"the model has streams ({model.streams.kind}) already, and an adapter is put onto a plain one"
        )
