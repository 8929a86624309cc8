"""A run that starts from the weights of another model.

    config, given = start_run(config, "runs/dense", "runs/versatile")
    Trainer(config, "runs/versatile", **given).fit()

The design of ``config.model`` decides which recipe leads there, see `anabranch.lm.recipes`. Tokenizer and vocabulary are the model's. The
tokenizer is kept in the run's folder, so a run that has saved a checkpoint needs the model no more.
"""

import hashlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.config import override, to_dict
from anabranch.data import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer
from anabranch.errors import ConfigError, TokenizerError
from anabranch.lm import Decoder
from anabranch.lm.checkpoint import load_model
from anabranch.lm.recipes import start_from
from anabranch.train.checkpoint import checkpoints
from anabranch.train.config import RunConfig, Start

__all__ = ["resumed_parts", "start_run"]

TOKENIZER_FOLDER = "tokenizer"
# Tokens that a recipe may measure on.
_SAMPLED = 1024


def start_run(
    config: RunConfig, source: str | Path, out: str | Path, settings: Mapping[str, Any] | None = None
) -> tuple[RunConfig, dict[str, Any]]:
    """The config of a run that starts from ``source``, and what `Trainer` is given beside it.

    Args:
        config: its model's design is the wanted one; data and training stay.
        source: a model, see `anabranch.lm.load_model`.
        out: the folder of the run, where its tokenizer is kept once `keep_tokenizer` was called.
        settings: fields by dotted path that somebody has set: those of the model must be as the started model has them.

    Raises ConfigError where no recipe leads from the model to the design, or ``settings`` say otherwise than the model, TokenizerError
    for a model without a tokenizer, CheckpointError as `load_model`.
    """
    model, tokenizer = load_model(source, dtype=torch.float32)
    if tokenizer is None:
        raise TokenizerError(f"{source} has no tokenizer.json, so no text can be read for it; put the file beside it")
    data = config.data.replace(tokenizer=_tokenizer_config(tokenizer, out))

    def sample() -> Tensor:
        stream = config.data.build(tokenizer).windows("train", batch_size=1)
        length = config.data.sequence_length
        return torch.cat([batch.token_BL for batch in itertools.islice(stream, max(1, _SAMPLED // length))])

    # Before the start, which may share or change the weights.
    digest = _digest(model)
    started = start_from(model, config.model, seed=config.train.seed, sample=sample)
    start = Start(model=str(Path(source).absolute()), recipe=started.recipe, learns=started.learns, digest=digest)
    made = config.replace(model=started.model.config, data=data, start=start)
    _check_settings(made, settings or {}, source)
    return made, {"model": started.model, "tokenizer": tokenizer}


def resumed_parts(config: RunConfig, out: str | Path) -> dict[str, Any]:
    """What `Trainer` is given to go on with the run in ``out``: the tokenizer, and before the first checkpoint the started model again.

    Raises ConfigError if the model has changed since, and as `start_run`.
    """
    if config.start is None:
        return {}
    if not checkpoints(Path(out)):
        made, given = start_run(config, config.start.model, out)
        before, now = config.start.digest, made.start and made.start.digest
        if made.model != config.model or before not in (None, now):
            raise ConfigError(
                f"{config.start.model} is another model than when the run in {out} began; start a new run"
            )
        return given
    kept = Path(out) / TOKENIZER_FOLDER
    return {"tokenizer": load_tokenizer(kept)} if kept.is_dir() else {}


def keep_tokenizer(config: RunConfig, tokenizer: Tokenizer, out: str | Path) -> None:
    """Write the tokenizer into the run's folder, where the config says it is (that of bytes needs no file)."""
    if isinstance(config.data.tokenizer, HuggingFaceTokenizer.Config):
        tokenizer.save(Path(out) / TOKENIZER_FOLDER)


def _digest(model: Decoder) -> str:
    """sha256 of names and values of all weights."""
    hashed = hashlib.sha256()
    for name, value in model.state_dict().items():
        hashed.update(name.encode())
        hashed.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()


def _tokenizer_config(tokenizer: Tokenizer, out: str | Path) -> Tokenizer.Config:
    if isinstance(tokenizer, ByteTokenizer):
        return ByteTokenizer.Config()
    return HuggingFaceTokenizer.Config(path=str((Path(out) / TOKENIZER_FOLDER).absolute()))


def _check_settings(made: RunConfig, settings: Mapping[str, Any], source: str | Path) -> None:
    for path, value in settings.items():
        if not path.startswith(("model.", "data.tokenizer")):
            continue
        wanted = override(made, {path: value})
        if to_dict(wanted) != to_dict(made):
            raise ConfigError(f"{path} is set to {value!r}, but {source} has another; leave it out with --from")
