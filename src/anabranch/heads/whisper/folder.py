"""A Whisper in a folder: as transformers saves it, as CTranslate2 does, or as `anabranch heads train` leaves it, with routed heads.

model, words = open_whisper("whisper-tiny")        # transformers' module, and what its text is written in
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.errors import CheckpointError, ConfigError, TokenizerError
from anabranch.extras import require
from anabranch.files import atomic_folder, read_json
from anabranch.heads.put_on import load_heads, save_heads, take_off_heads
from anabranch.heads.whisper.ctranslate2 import WEIGHTS, is_ctranslate2, read_variables, whisper_sizes, whisper_tensors
from anabranch.lm.shards import write_file
from anabranch.lm.tensors import open_tensors, state_once

__all__ = ["Words", "is_whisper", "open_whisper", "save_whisper"]

CONFIG, GENERATION, WEIGHTS_OF_TRANSFORMERS = "config.json", "generation_config.json", "model.safetensors"
TOKENIZER, HEADS, MODEL = "tokenizer.json", "heads", "model"
START, END, PLAIN, TRANSCRIBE = "<|startoftranscript|>", "<|endoftext|>", "<|notimestamps|>", "<|transcribe|>"
SILENCE = ("<|nospeech|>", "<|nocaptions|>")
# Words of a Whisper that knows English alone, and so is not told the language.
_ENGLISH = 51864


@dataclass(frozen=True)
class Words:
    """How text becomes tokens of a Whisper.

    Attributes:
        tokenizer: of the ``tokenizers`` package.
        start: what stands before a text: that it begins, its language and what to do in models of several, and that no times are told.
        end: the token behind it.
        silence: the token that says that nobody speaks; None where there is none.
    """

    tokenizer: Any
    start: tuple[int, ...]
    end: int
    silence: int | None = None

    @classmethod
    def of(cls, path: Path, vocab_size: int, language: str = "en") -> Words:
        """Those of a ``tokenizer.json``.

        Raises TokenizerError for one that is not there, or is not Whisper's, ConfigError for a language that it does not know.
        """
        from tokenizers import Tokenizer

        try:
            made = Tokenizer.from_file(str(path))
        # Of the package's own, which are plain exceptions.
        except Exception as error:
            raise TokenizerError(
                f"cannot read {path}: {error}; put Whisper's tokenizer.json beside its weights"
            ) from None
        spoken = f"<|{language}|>"
        if vocab_size <= _ENGLISH and language != "en":
            raise ConfigError(f"language is {language!r}, and the model knows en alone")
        if vocab_size > _ENGLISH and made.token_to_id(START) is not None and made.token_to_id(spoken) is None:
            raise ConfigError(f"language is {language!r}, which {path} does not know; name one by its code, such as de")
        names = [START] if vocab_size <= _ENGLISH else [START, spoken, TRANSCRIBE]
        found = {name: made.token_to_id(name) for name in (*names, PLAIN, END)}
        ids = {name: id for name, id in found.items() if id is not None and id < vocab_size}
        missing = [name for name in found if name not in ids]
        if missing:
            raise TokenizerError(f"{path} has no {missing[0]} that the model knows; is it another model's tokenizer?")
        # By its name in files of today, and of before.
        silent = [id for name in SILENCE if (id := made.token_to_id(name)) is not None and id < vocab_size]
        return cls(made, tuple(ids[name] for name in (*names, PLAIN)), ids[END], silent[0] if silent else None)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without those around it. Whisper's begin with a space."""
        return list(self.tokenizer.encode(f" {text.strip()}", add_special_tokens=False).ids)

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, without signs."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def is_whisper(path: str | Path) -> bool:
    """Whether a folder, or ``model`` in that of a run, holds a Whisper."""
    place = _place(Path(path))
    if is_ctranslate2(place):
        return True
    try:
        return read_json(place / CONFIG).get("model_type") == "whisper"
    except CheckpointError:
        return False


def open_whisper(path: str | Path, language: str = "en") -> tuple[Any, Words]:
    """(transformers' ``WhisperForConditionalGeneration`` in float32 and evaluation mode, its words), with its routed heads if it has some.

    ``language`` is what is spoken, by its code.

    Raises CheckpointError for a folder that holds none or a damaged one, ConfigError for a language that it does not know, TokenizerError,
    MissingExtraError without transformers.
    """
    require("huggingface", by="a Whisper")
    place = _place(Path(path))
    if not is_whisper(place):
        raise CheckpointError(
            f"{path} holds no Whisper: neither a config.json of model_type whisper nor {WEIGHTS} of CTranslate2"
        )
    model, words = _of_ctranslate2(place, language) if is_ctranslate2(place) else _of_transformers(place, language)
    if (place / HEADS).is_dir():
        load_heads(place / HEADS, model)
    return model.eval(), words


def save_whisper(folder: str | Path, model: Any, tokenizer: Path) -> None:
    """Write ``model``, whose heads are routed, with its tokenizer, so that `open_whisper` gives it again. Its heads are taken off.

    Raises as `save_heads` and `atomic_folder`.
    """
    names = "|".join(re.escape(name) for name in (CONFIG, GENERATION, WEIGHTS_OF_TRANSFORMERS, TOKENIZER, HEADS))
    with atomic_folder(folder, replacing=names) as temporary:
        save_heads(temporary / HEADS, model)
        take_off_heads(model)
        tensors = {name: value.detach().cpu().contiguous() for name, value in state_once(model).items()}
        write_file(temporary / WEIGHTS_OF_TRANSFORMERS, tensors)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(temporary)
        model.generation_config.save_pretrained(temporary)
        shutil.copyfile(tokenizer, temporary / TOKENIZER)


def tokenizer_of(path: str | Path) -> Path:
    """Where the tokenizer of a Whisper is."""
    return _place(Path(path)) / TOKENIZER


def _place(path: Path) -> Path:
    """``path``, or what a run in it made."""
    inner = path / MODEL
    return inner if (inner / CONFIG).is_file() and not (path / WEIGHTS).is_file() else path


def _of_transformers(place: Path, language: str) -> tuple[nn.Module, Words]:
    from transformers import GenerationConfig, WhisperConfig

    try:
        config = WhisperConfig.from_pretrained(place, local_files_only=True)
        said = place / GENERATION
        generation = GenerationConfig.from_pretrained(place, local_files_only=True) if said.is_file() else None
    # What transformers raises of a file is of many kinds.
    except Exception as error:
        raise CheckpointError(f"cannot read the config of {place}: {str(error).splitlines()[0]}") from None
    source = open_tensors(place)
    # The head is the embedding; files of old versions hold it twice.
    tensors = {name: source.read(name).float() for name in source.names if name != "proj_out.weight"}
    model = _filled(config, tensors, place)
    if generation is not None:
        model.generation_config = generation
    return model, Words.of(place / TOKENIZER, config.vocab_size, language)


def _of_ctranslate2(place: Path, language: str) -> tuple[nn.Module, Words]:
    from transformers import WhisperConfig

    variables = read_variables(place / WEIGHTS)
    try:
        sizes, tensors = whisper_sizes(variables), whisper_tensors(variables)
    except CheckpointError as error:
        raise CheckpointError(f"{place / WEIGHTS}: {error}") from None
    words = Words.of(place / TOKENIZER, sizes["vocab_size"], language)
    ends: dict[str, Any] = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), words.end)
    config = WhisperConfig(**sizes, **ends, decoder_start_token_id=words.start[0])
    model = _filled(config, tensors, place / WEIGHTS)
    # What must not be said, which CTranslate2 keeps in a file of its own.
    said = read_json(place / CONFIG) if (place / CONFIG).is_file() else {}
    for name, theirs in (("suppress_tokens", "suppress_ids"), ("begin_suppress_tokens", "suppress_ids_begin")):
        setattr(model.generation_config, name, [int(each) for each in said.get(theirs, ())])
    return model, words


def _filled(config: Any, tensors: dict[str, Tensor], where: Path) -> Any:
    """A Whisper with these weights. Raises CheckpointError for ones that do not fit."""
    from transformers import WhisperForConditionalGeneration

    with torch.device("meta"):
        model: Any = WhisperForConditionalGeneration(config)
    held = {name: list(tensor.shape) for name, tensor in model.state_dict().items() if name != "proj_out.weight"}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    wrong = [name for name in sorted(held.keys() | found.keys()) if held.get(name) != found.get(name)]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{where}: {name} is {found.get(name, 'not there')}, and the model that its config describes has {held.get(name, 'none')}"
        )
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    return model
