"""Models of transformers over ranks: attention is replaced by a function that they let one register.

    from anabranch.cluster.ring import ContextParallel

    model = ContextParallel(AutoModelForCausalLM.from_pretrained(...))        # layout="zigzag"

Positions are passed to the model, masks are not: what a query sees is given by the layout, causal, in the window of each layer. What a
model does to scores beside that (soft caps, biases, chunks) is refused, since it would be left out in silence.
"""
# Shapes: B sequences, L positions of a rank, H query heads, G key heads, D head width

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from anabranch.cluster.ring.layout import Layout
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.nn.scored import Scoring

__all__ = ["NAME", "TransformersForm"]

# Of the attention function among those of transformers.
NAME = "anabranch_ring"
# Layers of other kinds mix positions by masks or states of their own.
KNOWN_LAYERS = {"full_attention", "sliding_attention"}


@dataclass
class _Current:
    """What the attention modules of a model share.

    Attributes:
        store: of the pass that runs, or ran last: its backward may run parts again.
        num_calls: of attention in it.
    """

    store: Any = None
    num_calls: int = 0


class TransformersForm:
    """How a causal language model of transformers is run on a share of a sequence. It is changed in place.

    Raises ConfigError for models that are not decoders alone, or whose layers mix positions otherwise.
    """

    def __init__(self, model: Any) -> None:
        require("huggingface", by="a model of transformers over ranks")
        from transformers import AttentionInterface

        config = model.config.get_text_config()
        others = sorted(set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS)
        if config.is_encoder_decoder or others:
            what = f"layers of kind {others[0]!r}" if others else "an encoder"
            raise ConfigError(
                f"{type(model).__name__} has {what}, which is not cut over ranks; only causal attention is"
            )
        AttentionInterface.register(NAME, _attend)
        model.set_attn_implementation(NAME)
        self.model, self._current = model, _Current()
        for module in model.modules():
            module._anabranch_ring = self._current

    def run(
        self, token_BL: Tensor, position_L: Tensor, layout: Layout, rank: int, store: Any, state: dict[str, Any] | None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """(logits_BLV, no losses, no metrics)."""
        if state:
            raise ConfigError("state is for decoders of ours; leave it out")
        self._current.store, self._current.num_calls = store, 0
        position_BL = position_L.expand(len(token_BL), -1)
        made = self.model(input_ids=token_BL, position_ids=position_BL, use_cache=False)
        layers = self.model.config.get_text_config().num_hidden_layers
        if self._current.num_calls < layers:
            raise ConfigError(
                f"{self._current.num_calls} of {layers} layers of {type(self.model).__name__} asked for attention; the others may mix "
                "positions by themselves, which is not cut over ranks"
            )
        return made.logits, {}, {}


def _attend(
    module: nn.Module,
    query_BHLD: Tensor,
    key_BGLD: Tensor,
    value_BGLD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """(y_BLHD, None), as transformers want it."""
    current = getattr(module, "_anabranch_ring", None)
    if current is None or current.store is None:
        raise ConfigError(
            f"attention is {NAME!r}, which works inside of ContextParallel only; see anabranch.cluster.ring"
        )
    refused = [name for name in ("softcap", "position_bias") if others.get(name) is not None]
    if attention_mask is not None:
        refused.append("attention_mask")
    if dropout:
        refused.append("dropout")
    if refused or not getattr(module, "is_causal", True):
        what = refused[0] if refused else "attention to later positions"
        raise ConfigError(f"{type(module).__name__} asks for {what}, which attention over ranks has not")
    current.num_calls += 1
    scoring = Scoring(scale=scaling, window=sliding_window, sink_H=s_aux)
    y_BHLD = current.store.attend(0, query_BHLD, key_BGLD, value_BGLD, scoring=scoring)
    return y_BHLD.transpose(1, 2).contiguous(), None
