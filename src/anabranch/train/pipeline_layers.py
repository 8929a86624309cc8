"""A decoder as the layers that a pipeline's stages are cut from: embedding, blocks (those that share a module together), head.

What blocks emit into the context goes with what they hand on: losses and metrics as sums with their counts, and the parts of losses over
layers one by one, which the head makes losses of, once, as a pass without stages does at its end.
"""
# Shapes: B sequences, L positions, D width, V vocabulary

import base64
import pickle
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from anabranch.cluster import partition
from anabranch.cluster.gpipe.chunk import Borrowing, is_recomputing
from anabranch.errors import ConfigError, InputError
from anabranch.lm.decoder import Decoder
from anabranch.lm.layers import layer_costs, referred_to, uncut_groups
from anabranch.nn.context import ForwardContext, set_unregistered
from anabranch.routing.context import LossOverLayers

__all__ = ["METRIC", "Handed", "Part", "ends_of", "layers_of", "stages_of"]

# In front of the names of metrics among what is summed.
METRIC = "metric "

# One layer's part of a loss over layers.
Part = tuple[Tensor, ...]


class Handed(NamedTuple):
    """What goes from layer to layer.

    Attributes:
        x_BLD: of the blocks; ``[B, L, V]`` scores behind the head.
        token_BL: the tokens.
        carry: what designs carry.
        sums, counts: of what was emitted, by name.
        parts: of losses over layers that are not closed, in the order of layers, by who closes them.
    """

    x_BLD: Tensor
    token_BL: Tensor
    carry: dict[str, Tensor]
    sums: dict[str, Tensor]
    counts: dict[str, int]
    parts: dict[str, list[Part]]


def layers_of(model: Decoder, stages: int, visits: int = 1) -> tuple[list[nn.Module], list[int]]:
    """The layers that a chunk may begin with, and how many of them each chunk has. Raises ConfigError for fewer layers than chunks.

    A stage has a chunk for each visit, see `anabranch.cluster.schedules`.
    """
    config = model.config
    groups = [range(group.start - 1, group.stop - 1) for group in uncut_groups(config)]
    inside = {number for group in groups for number in group}
    parts = sorted(
        [*groups, *(range(number, number + 1) for number in range(config.num_layers) if number not in inside)],
        key=lambda part: part.start,
    )
    costs = layer_costs(config, tokens=1, sequence_length=config.max_positions, dtype=torch.float32)
    flops = [0.0, *(sum(costs[1 + number].flops for number in part) for part in parts), costs[-1].flops]
    layers: list[nn.Module] = [_Embed(model), *(_Blocks(model, part) for part in parts), _Head(model)]
    try:
        return layers, list(partition(flops, stages * visits).balance)
    except InputError as error:
        said = f"parallel.pipeline is {stages}" + (
            f" and each stage has {visits} parts of the model" if visits > 1 else ""
        )
        raise ConfigError(f"{said}, and {error}") from None


def ends_of(model: nn.Module) -> list[nn.Module]:
    """What is called before and behind the blocks and has a size: embedding and head, but not where they are one.

    Such a head reads the embedding's weight without calling it, so nobody could gather it in time.
    """
    if not isinstance(model, Decoder) or model.head is None:
        return []
    return [model.embedding, model.head]


def stages_of(
    model: Decoder, layers: Sequence[nn.Module], parts: Sequence[range], stages: int
) -> dict[str, tuple[int, ...]]:
    """By the name of a parameter or buffer, the stages whose layers have it; all, where no layer does. Stages take chunks in turns."""
    found: dict[int, list[int]] = {}
    for chunk, part in enumerate(parts):
        stage = chunk % stages
        for number in part:
            layer = layers[number]
            assert isinstance(layer, _Of)
            for module in layer.parts():
                for tensor in (*module.parameters(), *module.buffers()):
                    if stage not in found.setdefault(id(tensor), []):
                        found[id(tensor)].append(stage)
    everywhere = list(range(stages))
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tuple(found.get(id(tensor), everywhere)) for name, tensor in named}


class _Of(Borrowing):
    """A layer of a model that is registered elsewhere."""

    model: Decoder

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        set_unregistered(self, "model", model)


class _Embed(_Of):
    """Tokens to what the first block gets."""

    def forward(self, token_BL: Tensor) -> Handed:
        return Handed(self.model.embed(token_BL), token_BL, {}, {}, {}, {})

    def parts(self) -> list[nn.Module]:
        """See `Borrowing`."""
        return [self.model.embedding]


class _Blocks(_Of):
    """Blocks that stay together."""

    def __init__(self, model: Decoder, part: range) -> None:
        super().__init__(model)
        self.part = part

    def forward(self, handed: Handed) -> Handed:
        handed = Handed(*handed)
        x_BLD = handed.x_BLD
        context = self.model.context(handed.token_BL)
        context.carry.update(handed.carry)
        for number in self.part:
            x_BLD = self.model.blocks[number](x_BLD, context)
        sums, counts = dict(handed.sums), dict(handed.counts)
        for name, values in _emitted(context).items():
            sums[name] = sum(values[1:], start=values[0] if name not in sums else sums[name] + values[0])
            counts[name] = counts.get(name, 0) + len(values)
        parts = {key: list(found) for key, found in handed.parts.items()}
        for owner, part in context.parts:
            parts.setdefault(_key_of(owner, self.model), []).append(part)
        if not is_recomputing():
            context.commit()
        # How often routers were visited is counted for those who override them, which nobody does here.
        carried = {name: value for name, value in context.carry.items() if not name.startswith("visits.")}
        for name, value in carried.items():
            if not isinstance(value, Tensor):
                raise ConfigError(
                    f"block {self.part.stop - 1} hands on {name!r}, a {type(value).__name__}, and only tensors go from stage to stage"
                )
        return Handed(x_BLD, handed.token_BL, carried, sums, counts, parts)

    def parts(self) -> list[nn.Module]:
        """See `Borrowing`; with what is shared among these blocks."""
        blocks = [self.model.blocks[number] for number in self.part]
        shared = {id(module): module for module in self.model.shared.modules()}
        referred = {name for block in blocks for name in referred_to(block, set(shared))}
        return [*blocks, *(shared[name] for name in sorted(referred))]


class _Head(_Of):
    """The last norm and the scores over the vocabulary; and the losses over all layers."""

    def forward(self, handed: Handed) -> tuple[Tensor, dict[str, Tensor], dict[str, int]]:
        handed = Handed(*handed)
        sums, counts = dict(handed.sums), dict(handed.counts)
        for key, parts in handed.parts.items():
            # A tuple may have come as a list.
            name, loss = _owner_of(key, self.model).close([tuple(part) for part in parts])
            sums[name] = sums[name] + loss if name in sums else loss
            counts[name] = counts.get(name, 0) + 1
        logits_BLV = self.model.logits(self.model.norm(handed.x_BLD), self.model.context(handed.token_BL))
        return logits_BLV, sums, counts

    def parts(self) -> list[nn.Module]:
        """See `Borrowing`; the head may be the embedding."""
        return [self.model.norm, self.model.embedding if self.model.head is None else self.model.head]


def _emitted(context: ForwardContext) -> dict[str, list[Tensor]]:
    """Losses of layers, and metrics."""
    metrics = {METRIC + name: [value.float() for value in values] for name, values in context.metrics.items()}
    return {name: list(values) for name, values in context.losses.items()} | metrics


# What closes a loss is named so that each stage finds the same: a module by its place in the model, anything else by its value.
_MODULE, _VALUE = "module ", "value "


def _key_of(owner: LossOverLayers, model: Decoder) -> str:
    """A text by which `_owner_of` finds an owner in another process. Raises ConfigError where there is none."""
    if isinstance(owner, nn.Module):
        name = next((name for name, module in model.named_modules() if module is owner), None)
        if name is not None:
            return _MODULE + name
    # Two that are told apart by identity alone would be one in another process.
    if type(owner).__eq__ is object.__eq__ or isinstance(owner, nn.Module):
        raise ConfigError(
            f"a loss over layers is closed by a {type(owner).__name__}, which stages cannot tell from another: let it be a module of "
            "the model, or compare by value (a frozen dataclass); or set parallel.pipeline to 1"
        )
    try:
        return _VALUE + base64.b64encode(pickle.dumps(owner)).decode()
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"a loss over layers is closed by a {type(owner).__name__}, which cannot go to another stage: {error}"
        ) from None


def _owner_of(key: str, model: Decoder) -> LossOverLayers:
    """The owner that `_key_of` named, in another process of this run perhaps."""
    if key.startswith(_MODULE):
        return model.get_submodule(key.removeprefix(_MODULE))  # type: ignore[return-value]
    made: LossOverLayers = pickle.loads(base64.b64decode(key.removeprefix(_VALUE)))
    return made
