"""Language modelling as a task: `LanguageModel` trains a decoder on text, `TextTask` any module that is called like one."""
# Shapes: B sequences, L positions

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from anabranch.cluster.ring import ContextParallel
from anabranch.config import Field, configclass
from anabranch.data import Batch, DataConfig, Tokenizer
from anabranch.data.stream import TokenStream
from anabranch.data.windows import Windows
from anabranch.errors import ConfigError
from anabranch.lm.checkpoint import load_weights, write_model
from anabranch.lm.decoder import Decoder
from anabranch.nn.pool import ExpertPool
from anabranch.nn.streams import Streams
from anabranch.train.evaluate import evaluate
from anabranch.train.task import Losses, Task, TaskContext

__all__ = ["DecoderTask", "LanguageModel", "TextTask", "decoder_parts"]

logger = logging.getLogger(__name__)


class DecoderTask(Task):
    """A task whose model is a `Decoder`: built, saved and loaded as a model folder.
    Attributes:
        tokenizer: saved beside the model; None for none.
    """

    @configclass
    class Config(Task.Config):
        """Attributes: ``model``, the decoder's shape."""

        model: Decoder.Config = Field(default_factory=Decoder.Config)

    config: Config
    tokenizer: Tokenizer | None = None

    def build_model(self, context: TaskContext) -> nn.Module:
        """A fresh decoder, or the one that was given. Raises ConfigError if that has another config."""
        if self.model is None:
            if not self.config.model.block.passes_gradient and context.checkpoint is None:
                logger.warning(
                    "block is %r, through which no gradient goes, and the model is new: what it wraps learns nothing and stays as it was "
                    "drawn; start from a trained model (--from)",
                    self.config.model.block.owner.kind,
                )
            return self.config.model.build(seed=context.settings.seed)
        if getattr(self.model, "config", None) != self.config.model:
            raise ConfigError(
                "the given model has another config than config.model; pass config.replace(model=model.config)"
            )
        return self.model

    def sharded_parts(self, model: nn.Module) -> Iterable[nn.Module]:
        """See `decoder_parts`."""
        return decoder_parts(model)

    def save(self, folder: Path, model: Any, tensors: Mapping[str, Tensor]) -> None:
        """A model folder, see `anabranch.lm.save_model`."""
        write_model(folder, model, self.tokenizer, state=tensors)

    def load(self, folder: Path, model: Any) -> None:
        """The weights of a model folder."""
        load_weights(model, folder)


class TextTask(Task, kind="text"):
    """The next token of text, learned by a module that is given and called like a `Decoder`.

    ``model(token_BL, target_BL)`` gives a `DecoderOutput` with losses, ``model(token_BL)`` one with logits. Evaluations are in nats per
    token and bits per byte.

    Args:
        config: says the data.
        model: the module.
        tokenizer: that of ``model``; takes the place of the configured one.

    Attributes:
        data: the text, tokenised.

    Raises DataError if the text is missing or empty, TokenizerError if the tokenizer is, ConfigError if it has more tokens than the model.
    """

    headline: ClassVar[str] = "nats_per_token"
    better: ClassVar[Literal["lower", "higher"] | None] = "lower"
    holds_out: ClassVar[str] = "set data.validation_fraction above 0"
    unit: ClassVar[str] = "tokens"
    material: ClassVar[str] = "text"
    cuts_sequences: ClassVar[bool] = True

    @configclass
    class Config(Task.Config):
        """Attributes: ``data``, the text, how it is tokenised and cut."""

        data: DataConfig = Field(default_factory=DataConfig)

    config: Config

    def __init__(self, config: Config, *, model: nn.Module | None = None, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(config, model=model)
        self.data = config.data.build(tokenizer)
        self.tokenizer = self.data.tokenizer
        self._check_vocabulary(getattr(getattr(model, "config", None), "vocab_size", None))

    def _check_vocabulary(self, size: int | None) -> None:
        if size is not None and self.tokenizer.vocab_size > size:
            raise ConfigError(
                f"model.vocab_size is {size}, but the tokenizer has {self.tokenizer.vocab_size} tokens; "
                f"set model.vocab_size={self.tokenizer.vocab_size}"
            )

    def training_data(self, context: TaskContext) -> TokenStream:
        """Sequences of the training split."""
        return self.data.train(seed=context.settings.seed, rank=context.rank, world_size=context.world_size)

    def validation_data(self, context: TaskContext) -> Windows | None:
        """This process's windows of the held-out split, None if nothing is held out."""
        if self.config.data.validation_fraction == 0:
            return None
        tokens, length = context.settings.eval_tokens, self.config.data.sequence_length
        return self.data.validation(
            batch_size=context.batch_size,
            num_windows=None if tokens is None else max(1, tokens // length),
            rank=context.rank,
            world_size=context.world_size,
        )

    def save(self, folder: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """All tensors, the task's config, and the tokenizer."""
        super().save(folder, model, tensors)
        self.tokenizer.save(folder)

    def units_per_item(self, context: TaskContext) -> int:
        """Tokens of a sequence."""
        return self.config.data.sequence_length

    def fingerprint(self) -> str:
        """Of both splits, the bytes under their tokens and the tokenizer, by content."""
        return self.data.fingerprint()

    def earlier_fingerprints(self) -> tuple[str, ...]:
        """Without the bytes under the tokens: all that checkpoints said before."""
        return (self.data.fingerprint(byte_lengths=False),)

    def step(self, model: nn.Module, batch: Batch, context: TaskContext) -> Losses:
        """Cross-entropy, and what layers add to it."""
        output = model(batch.token_BL, batch.target_BL, **self._options_of(context.step))
        return Losses(output.loss, {"cross_entropy": output.cross_entropy, **output.auxiliary}, output.metrics)

    def _options_of(self, step: int) -> dict[str, Any]:
        """What the forward passes of a step are given beside the batch: how many parallel streams, where that changes by step."""
        streams = self._streams()
        number = None if streams is None else streams.of_step(step)
        return {} if number is None else {"num_streams": number}

    def _streams(self) -> Streams.Config | None:
        """Parallel streams of the model."""
        streams = getattr(self.model, "streams", None)
        return getattr(streams, "config", None) if isinstance(streams, Streams) else None

    def evaluate(self, model: nn.Module, data: Windows, context: TaskContext) -> dict[str, Any]:
        """See `Evaluation`."""
        settings = context.settings
        is_sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        copies = model.world if isinstance(model, ContextParallel) else 1
        found = evaluate(model, data, precision=settings.precision, equal_passes=is_sharded, copies=copies)
        return found.to_dict()


class LanguageModel(DecoderTask, TextTask, kind="language_model"):
    """The next token of text, learned by a `Decoder`. What a `RunConfig` trains.

    Arguments as of `TextTask`; a ``model`` that is given must have the configured shape.
    """

    @configclass
    class Config(DecoderTask.Config, TextTask.Config):
        """The text and the model.

        Attributes:
            data: the text.
            model: the decoder's shape.
            learns: only parameters whose name contains this learn; None for all that require a gradient.
        """

        learns: str | None = None

    config: Config
    tokenizer: Tokenizer

    def learns(self, name: str, parameter: nn.Parameter) -> bool:
        """As configured."""
        part = self.config.learns
        return super().learns(name, parameter) if part is None else part in name

    def _streams(self) -> Streams.Config | None:
        return self.config.model.streams

    def _check_vocabulary(self, size: int | None) -> None:
        super()._check_vocabulary(self.config.model.vocab_size)


def decoder_parts(model: nn.Module) -> list[nn.Module]:
    """What of a decoder is gathered on its own where weights are in shards: a pool that blocks share, and each block.

    Only what its outputs bring gradients to is gathered again for a backward pass. So blocks stay with the rest of the model where they
    pass none, and where those of virtual tokens come by the keys and values alone that blocks have made of them.
    """
    assert isinstance(model, Decoder), "a language model is a decoder"
    has_prompt = model.streams is not None and model.streams.prompt_MW is not None
    blocks: Iterable[nn.Module] = [] if has_prompt or not model.config.block.passes_gradient else model.blocks
    return [*(module for module in model.shared.values() if isinstance(module, ExpertPool)), *blocks]
