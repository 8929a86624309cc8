"""Arguments and options that several commands have, and how their values are read."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from anabranch.bounds import MOST_SEED
from anabranch.errors import ConfigError, DataError, TokenizerError
from anabranch.files import parse_toml

# Torch takes a second to load; --help does without.
if TYPE_CHECKING:
    import torch

    from anabranch.cli.weights import Weights
    from anabranch.data import Tokenizer
    from anabranch.lm import Decoder
    from anabranch.serving.adapters import AdaptersConfig
    from anabranch.serving.load import Loaded

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A training run, a saved model, a Hugging Face folder or a .gguf file."),
]

# Shown as the value of an option that takes none.
FLAG = " "
AsJson = Annotated[bool, typer.Option("--json", metavar=FLAG, help="Print one JSON object on stdout and nothing else.")]
Seed = Annotated[int, typer.Option(metavar="S", min=0, max=MOST_SEED, help="Seed: the same one gives the same result.")]
Streams = Annotated[
    int | None,
    typer.Option(
        "--streams",
        metavar="P",
        min=1,
        help="Parallel streams, for a model that has them (ParScale). Default: as saved.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="TYPE", help="Type of the weights: float32, bfloat16, float16. Default: as stored."),
]
Device = Annotated[
    str | None, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1. Default: a GPU if there is one.")
]
Bits = Literal["stored", "none", "int8", "int4", "nf4"]
Quantize = Annotated[
    Bits | None,
    typer.Option(
        "--quantize",
        metavar="KIND",
        help="Weights in fewer bits: int8, int4 or nf4 (the base of adapt --quantize nf4); none for floating point. Default: those of "
        "the file (stored) unless --dtype is given.",
    ),
]
ExpertBudget = Annotated[
    str | None,
    typer.Option(
        "--expert-budget",
        metavar="SIZE",
        help="Memory for experts, such as 2GiB; other experts are loaded when needed (experimental on CUDA). Default: all in"
        " memory.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Memory limit for everything, such as 8GiB. Quantization, expert budget and type of numbers are chosen to fit; see "
        "anabranch plan --memory.",
    ),
]


def setting(example: str) -> Any:
    """The option ``--set`` of a command, with a field of its own config as the example."""
    return typer.Option(
        "--set", metavar="PATH=VALUE", help=f"Set any field of the config, e.g. --set {example}. May be repeated."
    )


Assignments = Annotated[list[str] | None, setting("model.feed_forward.reuse=4")]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="PATH",
        help="Text to learn from: a file, a folder, a pattern in quotes ('notes/*.md'), or Parquet or JSON lines. May be repeated. "
        "Default: the source of Python's standard library.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", metavar=FLAG, help="Show no progress.")]

_MOST_SEEDS = 10_000
DTYPES = ("float32", "bfloat16", "float16", "float64")


def read_texts(paths: list[str] | None) -> dict[str, Any]:
    """The fields that make a run read ``paths``; none for None. Raises DataError for what is not there."""
    if not paths:
        return {}
    from anabranch.data import corpus_at

    corpus: Any = corpus_at(*paths)
    return {"data.corpus.kind": corpus.owner.kind, "data.corpus.paths": list(corpus.paths)}


def use_granted_cores() -> None:
    """Let PyTorch compute on no more threads than this process may use cores, which it does not see where a container limits them.

    What OMP_NUM_THREADS says stays.
    """
    import torch

    from anabranch.machine import usable_cores

    if "OMP_NUM_THREADS" not in os.environ and usable_cores() < torch.get_num_threads():
        torch.set_num_threads(usable_cores())


def named_folder(value: Any) -> Any:
    """For options and arguments that name an adapter or a pool, one or several: an empty one would be the working directory.

    With the word of a kind (``arrow:``) or without.
    """
    for one in value if isinstance(value, list | tuple) else [value]:
        if one is not None and not one.removeprefix("arrow:").removeprefix("phatgoose:").strip():
            raise typer.BadParameter("it names no folder; give that of an adapter")
    return value


def finite_number(value: float | None) -> float | None:
    """For options that are numbers with limits, which NaN passes: it is neither below nor above any."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def read_dtype(name: str | None) -> torch.dtype | None:
    """The torch type of this name. Raises ConfigError for another word."""
    if name is None:
        return None
    if name not in DTYPES:
        near = difflib.get_close_matches(name, DTYPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(DTYPES)}"
        raise ConfigError(f"--dtype is {name!r}; {hint}")
    import torch

    return getattr(torch, name)


def read_device(name: str | None) -> str:
    """``name``, or the default device."""
    if name is not None:
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load(path: str, dtype: str | None, device: str | None) -> tuple[Decoder, Tokenizer]:
    """Model and tokenizer, on their device, in evaluation mode. Raises TokenizerError for a model without one."""
    from anabranch.lm import load_model

    wanted = read_dtype(dtype)
    model, tokenizer = load_model(path, dtype=wanted, device=read_device(device))
    return model.eval(), _of_model(path, model, tokenizer)


@dataclass(frozen=True)
class Passes:
    """Forward passes over texts.

    Attributes:
        tokens: of one.
        logit_bytes: of all its tokens; 0 where only the last of each text are made.
    """

    tokens: int
    logit_bytes: int = 0


def load_parts(
    path: str,
    dtype: str | None,
    device: str | None,
    quantize: Bits | None,
    expert_budget: str | None,
    memory: str | None = None,
    predictor: str = "auto",
    passes: Passes | None = None,
    adapters: AdaptersConfig | None = None,
) -> Loaded:
    """As `load`, as `anabranch serve` does: in fewer bits, with a budget for experts, or what a plan for so much ``memory`` says.

    ``predictor`` is what names experts ahead, as in `ExpertsConfig`; ``passes`` are what the model is for, where no engine runs it;
    ``adapters`` what a plan has room for beside it. The errors of those are raised too.
    """
    from anabranch.serving.adapters import AdaptersConfig
    from anabranch.serving.config import ServingConfig
    from anabranch.serving.experts import ExpertsConfig
    from anabranch.serving.load import dtype_of, load_weights, settled
    from anabranch.sizes import parse_bytes

    for option, value in (("--expert-budget", expert_budget), ("--memory", memory)):
        if value is not None:
            parse_bytes(value, option)
    wanted, place = read_dtype(dtype), read_device(device)
    bits: Any = quantize or "auto"
    kv_memory: int | None = None
    if memory is not None:
        if dtype not in (None, "float32", "bfloat16"):
            raise ConfigError(f"--dtype is {dtype!r}; with --memory it is float32 or bfloat16")
        kind: Any = dtype or "auto"
        # One request at a time, in this process.
        config = ServingConfig(
            model=path,
            memory=memory,
            dtype=kind,
            quantize=bits,
            expert_budget=expert_budget,
            device=place,
            max_seqs=1,
            process=False,
            adapters=adapters or AdaptersConfig(),
        ).found()
        # What is planned for is what is loaded, also of a run that goes on.
        path = config.model
        if passes is None:
            config = config.planned()
        else:
            config = config.replace(max_batched_tokens=passes.tokens).planned(passes.logit_bytes)
        wanted, bits, expert_budget = dtype_of(config), config.quantize, config.expert_budget
        kv_memory = None if config.kv_memory is None else parse_bytes(config.kv_memory, "kv_memory")
    bits, experts = settled(bits, place, is_typed=dtype is not None), ExpertsConfig(predictor=predictor)
    loaded = load_weights(path, dtype=wanted, quantize=bits, device=place, expert_budget=expert_budget, experts=experts)
    loaded.model.eval()
    _of_model(path, loaded.model, loaded.tokenizer)
    return loaded if kv_memory is None else replace(loaded, kv_memory=kv_memory)


@contextmanager
def parts(
    path: str,
    dtype: str | None,
    device: str | None,
    quantize: Bits | None,
    expert_budget: str | None,
    memory: str | None = None,
    passes: Passes | None = None,
) -> Iterator[tuple[Decoder, Tokenizer, Weights]]:
    """As `load_parts`: model and tokenizer for as long as the block runs, and how its weights are stored."""
    from anabranch.cli.weights import Weights
    from anabranch.lm.checkpoint import find_model
    from anabranch.lm.quantized import has_few_bits

    is_plain = quantize is None and expert_budget is None and memory is None
    if is_plain and (dtype is not None or not has_few_bits(find_model(path))):
        model, tokenizer = load(path, dtype, device)
        yield model, tokenizer, Weights.of(model)
        return
    loaded = load_parts(path, dtype, device, quantize, expert_budget, memory, passes=passes)
    try:
        yield loaded.model, loaded.tokenizer, Weights.of(loaded.model, loaded.quantize)  # type: ignore[misc]
    finally:
        if loaded.experts is not None:
            loaded.experts.close()


def _of_model(path: str, model: Decoder, tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer, if it can be the model's. Raises TokenizerError."""
    if tokenizer is None:
        raise TokenizerError(f"{path} has no tokenizer.json, so its text cannot be read; put the file beside the model")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise TokenizerError(
            f"the tokenizer of {path} has {tokenizer.vocab_size} tokens, but the model {model.config.vocab_size}; "
            "is it another model's tokenizer?"
        )
    return tokenizer


def sampling_of(path: str, said: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """Fields of `SamplingConfig`: what the user ``said`` (not None), else what the model's makers say, else the ``usual``."""
    from anabranch.lm.generation_defaults import generation_defaults

    of_model = {name: value for name, value in generation_defaults(path).items() if name in said}
    chosen = {**usual, **of_model, **{name: value for name, value in said.items() if value is not None}}
    # Among all, which makers write as 0.
    return {name: value for name, value in chosen.items() if (name, value) != ("top_k", 0)}


def only_file(files: list[Path] | None) -> Path | None:
    """The one file that ``--config`` names, or None. Raises ConfigError for several: they are not merged."""
    if files is None or len(files) < 2:
        return files[0] if files else None
    raise ConfigError(f"--config is given {len(files)} times ({', '.join(map(str, files))}); give one file")


def read_assignments(texts: list[str] | None) -> dict[str, Any]:
    """``path=value`` options as paths and values, later ones winning."""
    from anabranch.config import parse_assignment

    return dict(parse_assignment(text) for text in texts or ())


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file. Raises DataError if it is absent, ConfigError if it is not TOML."""
    try:
        return parse_toml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
    except ValueError as error:
        # Of TOML, of UTF-8, of an integer of thousands of digits.
        raise ConfigError(f"{path} is not TOML: {error}") from None


def read_seeds(text: str) -> list[int]:
    """``0,1,2`` or ``0-4``. Raises ConfigError for anything else."""
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            named = range(int(first), int(last or first) + 1)
            if named and named[-1] > MOST_SEED:
                raise ConfigError(f"--seeds is {text!r}; a seed is at most {MOST_SEED}")
            if len(named) + len(seeds) > _MOST_SEEDS:
                raise ConfigError(f"--seeds is {text!r}, which names more than {_MOST_SEEDS}")
            seeds += named
    except OverflowError:
        # Of a range that is longer than a length can be.
        raise ConfigError(f"--seeds is {text!r}, which names more than {_MOST_SEEDS}") from None
    except ConfigError:
        raise
    except ValueError:
        raise ConfigError(f"--seeds is {text!r}; write them as 0,1,2 or 0-4") from None
    if not seeds:
        raise ConfigError(f"--seeds is {text!r}, which names none; write them as 0,1,2 or 0-4")
    return list(dict.fromkeys(seeds))


def check_settings(settings: Mapping[str, Any], sections: Sequence[str], examples: str) -> None:
    """Raise ConfigError for a ``--set`` of a field that is in none of these sections; ``examples`` are two that are."""
    wrong = next((name for name in settings if name.partition(".")[0] not in sections or "." not in name), None)
    if wrong is not None:
        listed = " and ".join([", ".join(sections[:-1]), sections[-1]])
        raise ConfigError(f"--set {wrong}: fields of {listed} can be set, such as {examples}")
