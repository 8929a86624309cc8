"""What an adapter puts around a model, besides the layers beside its matrices: virtual tokens in front of it, a ladder along it.

model.requires_grad_(False)
put_around(model, front=Front.Config(num_tokens=20, of="keys"), seed=0)     # nothing but the virtual tokens learns
put_around(model, ladder=Ladder.Config(reduction=8))
take_around(model)                                                          # the base again
"""
# Shapes: M virtual tokens, W numbers of each, V vocabulary, D width

from typing import Any

import torch
from torch import Tensor

from anabranch.adapters.front import Front, check_gates
from anabranch.adapters.graft import check_decoder
from anabranch.adapters.ladder import LADDERED, Ladder
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import build_empty
from anabranch.routing.fixed import fix, release

__all__ = ["around_config", "bare_config", "bare_name", "put_around", "take_around"]

_AROUND = "tokens in front or a ladder"


def bare_config(config: Decoder.Config) -> Decoder.Config:
    """The config of the base: without layers beside its matrices, virtual tokens and ladder."""
    bare = config.replace(linears={})
    if isinstance(bare.streams, Front.Config):
        bare = bare.replace(streams=None)
    return bare.replace(block=bare.block.inner) if isinstance(bare.block, Ladder.Config) else bare


def bare_name(name: str) -> str:
    """What a parameter of the base is called in the base."""
    return name.replace(".matrix.", ".").replace(LADDERED, ".")


def put_around(
    model: Decoder, *, front: Front.Config | None = None, ladder: Ladder.Config | None = None, seed: int = 0
) -> Decoder:
    """Put virtual tokens in front of ``model``, or a ladder along it, in place; these learn.

    The base is fixed until `take_around`: no step hook moves it. Which of its parameters learn is left to who calls.

    Virtual embeddings start as those of tokens that are drawn, which learn much better than random ones; keys and values start near zero.

    Raises ConfigError where the model has streams or a ladder already, or its attention cannot meet keys that are no tokens'.
    """
    check_decoder(model)
    config = around_config(model.config, front, ladder)
    generator = torch.Generator().manual_seed(seed)
    # All that may fail is made before the model is touched.
    streams = None if front is None else _tokens(model, config, generator)
    rungs = [] if ladder is None else _rungs(model, config, generator)
    if front is not None or ladder is not None:
        fix(model, _AROUND)
    if streams is not None:
        model.streams = streams
    for number, rung in enumerate(rungs):
        model.blocks[number] = rung
    model.config = config
    return model


def _tokens(model: Decoder, config: Decoder.Config, generator: torch.Generator) -> Front:
    streams = build_empty(config).streams
    assert isinstance(streams, Front)
    streams.put(_first(model, streams, generator), model.embedding.weight.device, trainable=True)
    return streams.train(model.training)


def _rungs(model: Decoder, config: Decoder.Config, generator: torch.Generator) -> list[Ladder]:
    made: Any = config.block
    device, rungs = model.embedding.weight.device, []
    for number, context in enumerate(config.contexts(generator=generator, shared=model.shared)):
        rung = Ladder(made, context, model.blocks[number]).train(model.training)
        # What is the model's stays where it is, be it nowhere yet.
        rung.rung.to(device)
        rung.alpha.data = rung.alpha.data.to(device)
        rungs.append(rung)
    return rungs


def around_config(config: Decoder.Config, front: Front.Config | None, ladder: Ladder.Config | None) -> Decoder.Config:
    """The config of a model with these around it. Raises as `put_around`."""
    if front is not None and config.streams is not None:
        raise ConfigError("the model has streams already, and virtual tokens are put in front of a plain one")
    if ladder is not None and isinstance(config.block, Ladder.Config):
        raise ConfigError("the model has a ladder already; take it off first")
    if front is not None and front.gated:
        for layer in range(config.num_layers):
            check_gates(config.attention_of(layer))
    if front is not None:
        config = config.replace(streams=front)
    return config if ladder is None else config.replace(block=ladder.replace(inner=config.block))


def take_around(model: Decoder) -> Decoder:
    """Take virtual tokens and ladder off, in place, and return the model; there may be none."""
    release(model, _AROUND)
    if isinstance(model.streams, Front):
        model.streams, model.config = None, model.config.replace(streams=None)
    if isinstance(model.config.block, Ladder.Config):
        for number, block in enumerate(model.blocks):
            assert isinstance(block, Ladder)
            model.blocks[number] = block.laddered
        model.config = model.config.replace(block=model.config.block.inner)
    return model


def _first(model: Decoder, front: Front, generator: torch.Generator) -> Tensor:
    """weight_MW of virtual tokens that have not learned."""
    tokens, width = front.weight.shape
    if front.config.of == "embeddings":
        drawn_M = torch.randint(model.config.vocab_size, (tokens,), generator=generator)
        return model.embedding(drawn_M.to(model.embedding.weight.device)).detach().float()
    return torch.randn(tokens, width, generator=generator) * model.config.init_std
