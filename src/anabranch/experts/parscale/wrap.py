"""Streams around a model of transformers, which stays as it is: prefixes are its cache, given before the first token.

wrapped = wrap(llama, 4, train="adapter")
wrapped(token_BL, target_BL).loss.backward()
Trainer(TaskRunConfig(task=TextTask.Config(data=...)), "runs/wrapped", model=wrapped, tokenizer=...).fit()
anabranch.lm.generate(wrapped, [[1, 2, 3]])          # it has what generation needs of a model
"""
# Shapes: B sequences, P streams, L positions, W model width, V vocabulary

import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.experts.parscale.streams import ParScale
from anabranch.extras import require
from anabranch.lm.cache import Prefix, rows_of_streams
from anabranch.lm.decoder import DecoderOutput, output_of
from anabranch.nn import BuildContext, SelfAttention
from anabranch.routing import RoutingContext

__all__ = ["WrappedModel", "wrap"]


def wrap(
    model: nn.Module, num_streams: int, *, train: Literal["all", "adapter"] = "all", seed: int = 0, **options: Any
) -> "WrappedModel":
    """Streams around ``model``, a causal language model of transformers with a key-value cache (Llama, SmolLM, Qwen2, ...).

    Args:
        model: is used, not copied; as an adapter its parameters are frozen in place.
        num_streams: P.
        train: ``all``, or the new parameters alone as an ``adapter``.
        seed: of the new parameters.
        options: other fields of `ParScale.Config`.

    Raises ConfigError for a model without such a cache, or one that changes what it sees (sliding windows) or gives (capped logits).
    """
    return WrappedModel(model, ParScale.Config(num_streams=num_streams, train=train, **options), seed=seed)


class WrappedModel(nn.Module):
    """See `wrap`. ``streams`` holds what is new; ``streams.set_streams(1)`` is the plain model."""

    def __init__(self, model: nn.Module, config: ParScale.Config, *, seed: int = 0) -> None:
        super().__init__()
        self._past_name = _check(model)
        self.model: Any = model
        # Generation asks it for vocab_size.
        self.config: Any = self.model.config
        if config.freezes_model:
            self.model.requires_grad_(False)
        theirs: Any = self.model.config
        weight = self.embedding.weight
        attention = SelfAttention.Config(
            num_heads=theirs.num_attention_heads,
            num_kv_heads=getattr(theirs, "num_key_value_heads", None),
            head_dim=getattr(theirs, "head_dim", None),
        )
        generator = torch.Generator().manual_seed(seed)
        context = BuildContext(theirs.hidden_size, theirs.num_hidden_layers, seed=seed, generator=generator)
        self.streams: ParScale = config.build(context, attention).to(weight)

    def forward(
        self,
        token_BL: Tensor,
        target_BL: Tensor | None = None,
        *,
        cache: "Past | None" = None,
        token_mask_BL: Tensor | None = None,
        last_only: bool = False,
        num_streams: int | None = None,
    ) -> DecoderOutput:
        """Logits, or the loss when ``target_BL`` is given; arguments as for `Decoder.forward`."""
        number = self._number(num_streams)
        past = cache if cache is not None else Past(self.streams.prefixes(number), number)
        if past.num_streams != number:
            raise ConfigError(
                f"the cache is for {past.num_streams} streams, the model runs {number}; make a new one with model.new_cache"
            )
        tokens = self.streams.expand(token_BL, number)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        if token_mask_BL is not None:
            mask = self.streams.expand(token_mask_BL, number)
        seen_BL = past.extend(mask, self.embedding.weight)
        position_BL = (seen_BL[:, past.num_prefix :].long().cumsum(1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
        output = self.model.get_decoder()(
            tokens, attention_mask=seen_BL.long(), position_ids=position_BL, **{self._past_name: past.cache}
        )
        x_BLW = output.last_hidden_state[:, -1:] if last_only else output.last_hidden_state
        context = RoutingContext(training=self.training, num_streams=past.num_streams)
        logits_BLV = self.model.get_output_embeddings()(self.streams.merge(x_BLW, context))
        return output_of(logits_BLV, target_BL, context)

    @property
    def embedding(self) -> nn.Embedding:
        """The model's input embedding."""
        return self.model.get_input_embeddings()

    def new_cache(self, max_length: int, num_streams: int | None = None) -> "Past":
        """An empty cache for passes of so many streams; it grows as needed, so ``max_length`` is for the caller's convenience."""
        number = self._number(num_streams)
        with torch.no_grad():
            return Past(self.streams.prefixes(number), number)

    def _number(self, num_streams: int | None) -> int:
        """P of a pass. Raises ConfigError for a number that has no gate."""
        if num_streams is None:
            return self.streams.num_streams
        self.streams.check(num_streams)
        return num_streams


class Past:
    """A cache of transformers with P rows per sequence, that begins with the prefixes."""

    def __init__(self, prefixes: list[tuple[Tensor, Tensor]], num_streams: int) -> None:
        self.cache: Any = _dynamic_cache()
        self.num_streams = num_streams
        self._prefix = Prefix(prefixes)
        self._seen_BL: Tensor | None = None

    @property
    def num_prefix(self) -> int:
        """Entries in front of every row, which are no positions."""
        return len(self._prefix)

    def extend(self, mask_BL: Tensor, weight: Tensor) -> Tensor:
        """What of prefix, past and the new positions ``mask_BL`` is real: bool ``[P B, M + L]``."""
        if self._seen_BL is None:
            rows = len(mask_BL)
            for layer in range(len(self._prefix.layers)):
                self.cache.update(*self._prefix.rows(layer, weight.new_empty(rows, 0, 0, 0)), layer)
            self._seen_BL = mask_BL.new_ones(rows, self.num_prefix)
        self._seen_BL = torch.cat((self._seen_BL, mask_BL), dim=1)
        return self._seen_BL

    def keep_rows(self, row_B: Tensor) -> None:
        """Keep, repeat or reorder sequences, with all their streams; see `KeyValueCache.keep_rows`."""
        assert self._seen_BL is not None
        rows = rows_of_streams(row_B, self.num_streams, len(self._seen_BL) // self.num_streams)
        if rows.dtype == torch.bool:
            rows = rows.nonzero().squeeze(1)
        self.cache.batch_select_indices(rows)
        self._seen_BL = self._seen_BL[rows]


def _check(model: Any) -> str:
    """What the decoder of ``model`` calls its cache. Raises ConfigError for a model that streams cannot be put around."""
    name = type(model).__name__
    if not all(hasattr(model, part) for part in ("get_decoder", "get_output_embeddings", "get_input_embeddings")):
        raise ConfigError(f"{name} is no causal language model of transformers; for a Decoder use add_streams")
    accepted = inspect.signature(model.get_decoder().forward).parameters
    found = next((word for word in ("cache", "past_key_values") if word in accepted), None)
    if found is None or model.get_output_embeddings() is None:
        raise ConfigError(
            f"{name} takes no key-value cache (cache or past_key_values), so prefixes have no place in it"
        )
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window or kinds != {"full_attention"}:
        raise ConfigError(
            f"{name} has layers that are not full attention (sliding_window={window}); the prefix would fall out"
        )
    if getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_scaling", 1) not in (None, 1):
        raise ConfigError(f"{name} changes its logits after the head, which the wrapped model would not do")
    return found


def _dynamic_cache() -> Any:
    require("transformers", by="a model of transformers")
    from transformers import DynamicCache

    return DynamicCache()
