"""Tensors that an adapter brings whole (``modules_to_save``, biases): exchanged for those of the model, and given back."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.adapters.ladder import LADDERED
from anabranch.adapters.names import Names
from anabranch.adapters.peft_folder import Adapter
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import build_empty

__all__ = [
    "EMBEDDING",
    "HEAD",
    "exchange",
    "part_head",
    "parts_head",
    "saved_now",
    "tensor_in",
    "tensor_of",
    "with_parted_head",
]

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def parts_head(adapter: Adapter) -> bool:
    """Whether head and embedding, one matrix so far, are two with this adapter, or may be: its copies say so where they are others."""
    return bool({HEAD, EMBEDDING} & {*adapter.saved, *adapter.copies}) or "lm_head" in adapter.layers


def with_parted_head(config: Decoder.Config, adapters: Iterable[Adapter]) -> Decoder.Config:
    """The config of a model with these adapters, whose head is no longer its embedding where one of them `parts_head`."""
    parts = config.tie_embeddings and any(map(parts_head, adapters))
    return config.replace(tie_embeddings=False) if parts else config


@torch.no_grad()
def part_head(model: Decoder, config: Decoder.Config) -> None:
    """Give a model whose head is its embedding a head of its own, with the same numbers."""
    if model.head is None:
        model.head = build_empty(config).head
        model.head.weight = nn.Parameter(model.embedding.weight.detach().clone(), requires_grad=False)
    model.config = config


def tensor_in(state: Mapping[str, Any], name: str) -> Tensor:
    """One of the tensors of a state dict by its name in a model without adapters. Raises ConfigError where it is stored in few bits."""
    owner, _, leaf = name.rpartition(".")
    found = state.get(name, state.get(f"{owner}.matrix.{leaf}"))
    if found is None or not found.is_floating_point():
        raise ConfigError(f"{name} is stored in few bits, which cannot be added to; dequantise the model first")
    return found


def state_of(model: Decoder) -> dict[str, Tensor]:
    """The tensors of ``model`` themselves, for `tensor_in`; what stands along a ladder by the names that it has without."""
    return {name.replace(LADDERED, "."): value for name, value in model.state_dict(keep_vars=True).items()}


def tensor_of(model: Decoder, name: str) -> Tensor:
    """`tensor_in` the state of ``model``."""
    return tensor_in(state_of(model), name)


@torch.no_grad()
def exchange(model: Decoder, names: Names, name: str, tensor: Tensor) -> Tensor:
    """Put ``tensor`` in the place that transformers calls ``name``, and return what was there."""
    stored = names.tensors[name]
    piece, target = stored.piece, tensor_of(model, stored.tensor)
    before = piece.write(target).detach().clone()
    target[piece.where].copy_(piece.read(tensor))
    return before


def saved_now(model: Decoder, names: Names, adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's whole tensors as they are now; those that did not change as they were read, whatever type the model has."""
    found = {}
    for name, given in adapter.saved.items():
        stored = names.tensors[name]
        now = stored.piece.write(tensor_of(model, stored.tensor)).detach()
        found[name] = given if torch.equal(now, given.to(now)) else now
    return found
