"""Streams for a model that is there: added, switched, folded, taken away again.

grown = add_streams(model, 4)                           # second stage: train all of it for a short while
grown = add_streams(model, 4, train="adapter")          # or prefixes and gate alone; the model stays as it is
Trainer(run.replace(model=grown.config), "runs/second", model=grown).fit()
set_streams(grown, 1)                                   # the plain model again, whenever there is no time
"""
# Shapes: P streams, H key-value heads, M prefix entries, D head width, V vocabulary

from typing import Any, Literal

import torch
from torch import Tensor

from anabranch.errors import ConfigError
from anabranch.experts.parscale.streams import ParScale, PrefixTable
from anabranch.lm.cache import KeyValueCache
from anabranch.lm.decoder import Decoder
from anabranch.lm.recipes import Material, fields_beyond, recipe
from anabranch.lm.tensors import build_empty
from anabranch.nn.context import BuildContext

__all__ = ["add_streams", "fold", "init_from_tokens", "remove_streams", "set_streams"]


@torch.no_grad()
def add_streams(
    model: Decoder,
    num_streams: int,
    *,
    train: Literal["all", "adapter"] = "all",
    init: Literal["mlp", "normal", "tokens"] = "mlp",
    text_PM: Tensor | None = None,
    seed: int = 0,
    **options: Any,
) -> Decoder:
    """A model that runs the weights of ``model`` in parallel streams; ``model`` stays as it is.

    Args:
        model: a decoder without streams.
        num_streams: P.
        train: ``all``, or as an ``adapter`` the new parameters alone.
        init: prefixes made by a network (``mlp``), or as parameters, from N(0, 0.02) (``normal``) or the model's own keys and
            values of a text (``tokens``).
        text_PM: int64 ``[P, prefix_len]``, the text for ``tokens``; None draws tokens at random.
        seed: of all that is drawn.
        options: other fields of `ParScale.Config`.

    Raises:
        ConfigError: ``model`` is no decoder of ours or has streams already, or an option is out of range.
    """
    if not isinstance(model, Decoder):
        raise ConfigError(
            f"model is a {type(model).__name__}; streams need a Decoder, whose attention takes a key-value cache: load the "
            "weights with anabranch.lm.load_model"
        )
    if model.streams is not None:
        raise ConfigError(
            "the model has streams already; take them away with remove_streams, or choose with set_streams"
        )
    if init not in ("mlp", "normal", "tokens"):
        raise ConfigError(f"init is {init!r}; it must be 'mlp', 'normal' or 'tokens'")
    prefix: Literal["mlp", "direct"] = "mlp" if init == "mlp" else "direct"
    config = ParScale.Config(num_streams=num_streams, train=train, prefix=prefix, **options)
    made = _with_streams(model, config, seed)
    if init == "tokens":
        init_from_tokens(made, text_PM, seed=seed)
    return made


@torch.no_grad()
def init_from_tokens(model: Decoder, text_PM: Tensor | None = None, *, seed: int = 0) -> None:
    """Set direct prefixes, in place, to the keys and values that the plain model has for a text of each stream.

    Args:
        model: with `ParScale` streams whose ``prefix`` is ``direct``.
        text_PM: int64 ``[P, prefix_len]``; None draws tokens at random with ``seed``.
        seed: see ``text_PM``.

    Raises ConfigError if the prefixes are not direct, or the text is of another shape.
    """
    config = _streams(model).config
    table = _streams(model).prefix
    if not isinstance(table, PrefixTable):
        raise ConfigError(
            f"prefix is {config.prefix!r} with prefix_len={config.prefix_len}; tokens can only set 'direct' prefixes"
        )
    shape = (config.num_streams, config.prefix_len)
    if text_PM is None:
        text_PM = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    if tuple(text_PM.shape) != shape:
        raise ConfigError(f"text_PM has shape {list(text_PM.shape)}; the prefixes need {list(shape)}")
    plain = remove_streams(model).eval()
    cache = _Remembering(model.config.num_layers, config.prefix_len)
    plain(text_PM.to(model.embedding.weight.device), cache=cache, last_only=True)
    for layer, (key_PHMD, value_PHMD) in enumerate(cache.layers):
        table.key[layer].copy_(key_PHMD)
        table.value[layer].copy_(value_PHMD)


class _Remembering(KeyValueCache):
    """A cache that says what it holds; the first layer's entry comes first."""

    def __init__(self, num_layers: int, max_length: int) -> None:
        super().__init__(num_layers, max_length)
        self.layers: list[tuple[Tensor, Tensor]] = []

    def append(
        self, layer: int, key_BHLD: Tensor, value_BHLD: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        stored = super().append(layer, key_BHLD, value_BHLD, **options)
        self.layers.append(stored[:2])
        return stored


def set_streams(model: Decoder, num_streams: int) -> None:
    """Run ``model`` with this many of its streams from now on: 1 is the plain model, others are listed in ``switchable``.

    It is saved with the model. A single call chooses by ``model(token_BL, num_streams=2)`` or ``generate(..., num_streams=2)``.

    Raises ConfigError for a model without streams, or a number that has no gate.
    """
    _streams(model).set_streams(num_streams)


@torch.no_grad()
def fold(model: Decoder, num_streams: int | None = None) -> Decoder:
    """The same model with its prefixes as parameters, without the network that made them (what released weights hold).

    Args:
        model: with `ParScale` streams.
        num_streams: keep this number of streams and its gate alone, of a model with several (`ParScale.Config.switchable`);
            None keeps all.

    Raises ConfigError for a model without prefixes, or a number that has no gate.
    """
    streams = _streams(model)
    if streams.prefix is None:
        raise ConfigError("the model has no prefixes to fold")
    config = streams.config.replace(prefix="direct")
    if num_streams is not None:
        streams.check(num_streams)
        if num_streams == 1:
            return remove_streams(model)
        config = config.replace(num_streams=num_streams, switchable=(), in_use=None)
    folded = _with_streams(model, config, 0)
    ours = _streams(folded)
    assert isinstance(ours.prefix, PrefixTable)
    for layer, (key_PHMD, value_PHMD) in enumerate(streams.prefix()):
        ours.prefix.key[layer].copy_(key_PHMD[: config.num_streams])
        ours.prefix.value[layer].copy_(value_PHMD[: config.num_streams])
    for name, gate in ours.gates.items():
        gate.load_state_dict(streams.gates[name].state_dict())
    if num_streams is None:
        ours.set_streams(streams.chosen)
    return folded


def remove_streams(model: Decoder) -> Decoder:
    """The plain model, of the same weights (copied); all of it learns."""
    _streams(model)
    return _built(model, None, {})


def _streams(model: Decoder) -> ParScale:
    if not isinstance(model.streams, ParScale):
        raise ConfigError("the model has no ParScale streams; add them with add_streams")
    return model.streams


def _with_streams(model: Decoder, config: ParScale.Config, seed: int) -> Decoder:
    """``model`` with fresh streams (in the place of those it has)."""
    context = BuildContext(
        model.config.dim,
        model.config.num_layers,
        init_std=model.config.init_std,
        seed=seed,
        generator=torch.Generator().manual_seed(seed),
    )
    fresh = config.build(context, model.config.attention)
    state = {f"streams.{name}": value for name, value in fresh.state_dict().items()}
    return _built(model, config, state)


def _built(model: Decoder, config: ParScale.Config | None, streams: dict[str, Tensor]) -> Decoder:
    weight = model.embedding.weight
    state = {
        name: value.detach().clone() for name, value in model.state_dict().items() if not name.startswith("streams.")
    }
    made: Decoder = build_empty(model.config.replace(streams=config))
    made.load_state_dict(state | {name: value.to(weight.dtype) for name, value in streams.items()}, assign=True)
    return made.to(weight.device).train(model.training)


@recipe(
    "add_streams",
    makes=lambda config: isinstance(config.streams, ParScale.Config),
    takes=lambda config: config.streams is None,
    needs="a model without streams",
)
def _to_plain(model: Decoder, config: Decoder.Config, material: Material) -> Decoder:
    streams = config.streams
    assert isinstance(streams, ParScale.Config)
    init: Literal["mlp", "normal"] = "mlp" if streams.prefix == "mlp" else "normal"
    options = fields_beyond(streams, without=("prefix",))
    return add_streams(model, init=init, seed=material.seed, **options)
