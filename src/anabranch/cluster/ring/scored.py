"""What a model's scoring (`anabranch.nn.scored`) is over ranks: a scale and a window are told to attention, sinks come in behind it."""
# Shapes: B sequences, L positions of a rank, H query heads, D head width

from dataclasses import replace

import torch
from torch import Tensor

from anabranch.cluster.ring.attention import RingOptions
from anabranch.errors import ConfigError
from anabranch.nn.scored import Scoring

__all__ = ["options_of", "with_sinks"]


def options_of(options: RingOptions, scoring: Scoring) -> RingOptions:
    """The same options for causal attention that scores so. Raises ConfigError where values are not stored beside keys."""
    if scoring.value_width is not None:
        raise ConfigError("keys and values that share their numbers (latent attention) are not cut over ranks")
    return replace(options, causal=True, window=scoring.window, softmax_scale=scoring.scale)


def with_sinks(out_BLHD: Tensor, lse_BLH: Tensor, scoring: Scoring) -> Tensor:
    """A sink's weight joins the sum of the softmax: what others give becomes less by exp(lse) / (exp(lse) + exp(sink))."""
    if scoring.sink_H is None:
        return out_BLHD
    kept_BLH = torch.sigmoid(lse_BLH - scoring.sink_H.to(lse_BLH.dtype))
    return out_BLHD * kept_BLH[..., None].to(out_BLHD.dtype)
