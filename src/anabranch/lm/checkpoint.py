"""Model folders: saved in our own format, loaded from that or from a foreign one.

    save_model("runs/a/model", model, tokenizer)
    model, tokenizer = load_model("runs/a")          # a model folder, a training run, a Hugging Face folder, a .gguf file
    export_huggingface("out", model, tokenizer)      # what transformers' AutoModelForCausalLM reads

A native folder holds ``model.safetensors`` (each tensor once, under the names of ``model.state_dict()``; quantised layers as
`anabranch.lm.quantized_form` says), ``config.json`` (``schema``, ``format``, ``model``: the config that builds the model) and the
tokenizer's files, and ``SHA256SUMS``, see `anabranch.lm.folder`. Folders are replaced as a whole, and only where they hold nothing else.
Foreign formats are in `anabranch.lm.formats` (Hugging Face) and `anabranch.lm.gguf`.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import anabranch
from anabranch.config import from_dict, to_dict
from anabranch.data.tokenizer import Tokenizer, load_tokenizer
from anabranch.errors import BackendError, CheckpointError, ConfigError, first_line
from anabranch.files import atomic_write_json
from anabranch.lm import formats, gguf
from anabranch.lm.decoder import Decoder
from anabranch.lm.folder import (
    FORMAT,
    MARK,
    OPTIMIZER_FILE,
    TRAINER_FILE,
    check_no_adapter,
    model_folder,
    run_bests,
    run_steps,
    verify,
)
from anabranch.lm.mixed_types import fit_types
from anabranch.lm.quantized_form import Made, describe, fill_quantized, is_table, stored_state
from anabranch.lm.shards import MAX_SHARD_BYTES, write_tensors
from anabranch.lm.tensors import (
    FLOATS,
    Layout,
    Piece,
    TensorSource,
    build_empty,
    check,
    check_amount,
    fill,
    has_weights,
    open_tensors,
    overwrite,
    read_json,
    state_once,
)
from anabranch.routing.conversion import first_difference

__all__ = [
    "export_huggingface",
    "find_model",
    "load_config",
    "load_model",
    "load_weights",
    "open_model",
    "save_model",
    "write_model",
]

logger = logging.getLogger(__name__)

# Version of folders with quantised pools, of which version 2 had integers; linear layers alone are version 2, all others are written as
# version 1, which older programs read.
SCHEMA = 3


def save_model(
    folder: str | Path,
    model: Decoder,
    tokenizer: Tokenizer | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Save a model folder, all or nothing; a model folder that is there already is replaced.

    Args:
        folder: the place. What is there must be empty, or a model that we saved and nothing else, so that nothing else is lost.
        model: the model; layers that `anabranch.nn.quantize` made stay in their bits, and are loaded so.
        tokenizer: saved beside it.
        max_shard_bytes: larger models are split into files of at most this size.

    Raises:
        CheckpointError: ``folder`` holds something else.
        CapacityError: the disk is full.
        DataError: the place cannot be written.
    """
    with model_folder(folder) as temporary:
        write_model(temporary, model, tokenizer, max_shard_bytes=max_shard_bytes)


def write_model(
    folder: Path,
    model: Decoder,
    tokenizer: Tokenizer | None = None,
    *,
    state: Mapping[str, Tensor] | None = None,
    family: str | None = None,
    ids: Mapping[str, Any] | None = None,
    makers: Mapping[str, Callable[[], Made]] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """`save_model` into a folder that is being filled, with other files beside it, inside `anabranch.files.atomic_folder`.

    ``state`` gives the tensors by name where the model's own are only shards of them (FSDP). ``family`` notes the Hugging Face
    family that the model came from, which `convert` goes back to; ``ids`` the special ids of its config.json, where the tokenizer has
    none or others; ``makers`` make quantised layers when they are written, see `stored_state`.
    """
    quantization = describe(model)
    tensors = stored_state(model, makers)
    if state is not None:
        tensors = {name: state[name] for name in tensors}
    schema = 1 if quantization is None else SCHEMA if any(name.endswith(".panels") for name in tensors) else 2
    write_tensors(folder, tensors, max_shard_bytes)
    if tokenizer is not None:
        tokenizer.save(folder)
    config = {
        "schema": schema,
        "format": FORMAT,
        **MARK,
        **({"family": family} if family else {}),
        **({"quantization": quantization} if quantization else {}),
        **({} if tokenizer is None else tokenizer.special_ids),
        **(ids or {}),
        "model": to_dict(model.config_in_use),
    }
    atomic_write_json(folder / "config.json", config)


def find_model(path: str | Path) -> Path:
    """The model folder or GGUF file that ``path`` means: itself, or of a training run its best weights (``train.keep_best``), else its
    newest checkpoint.

    Raises CheckpointError if there is none, or an adapter that would make it another.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        hint = f"; did you mean the folder {path.parent}?" if (path.parent / "config.json").is_file() else ""
        raise CheckpointError(f"{path} is a file, and not a .gguf one{hint}")
    if not path.is_dir():
        raise CheckpointError(
            f"no model at {path}; give a folder saved by anabranch or transformers, a training run, or a .gguf file "
            f"(nothing is downloaded){_of_the_hub(path)}"
        )
    # First: the folder of a run has a config.json as well.
    steps = [step for step in [*run_steps(path), *run_bests(path)] if (step / "config.json").is_file()]
    if steps:
        return steps[-1]
    check_no_adapter(path)
    if (path / "config.json").is_file():
        return path
    gguf = sorted(path.glob("*.gguf"))
    hint = (
        f"; did you mean {gguf[0]}?" if gguf else " (looked for config.json and checkpoints/step-NNNNNNNN/config.json)"
    )
    if any(path.glob("*/adapter_config.json")):
        hint = ", a folder of adapters; name the model that they were made for"
    raise CheckpointError(f"no model in {path}{hint}")


def _of_the_hub(path: Path) -> str:
    """How to get a model that is named as the Hugging Face Hub names its own; empty for a path that is none of its names."""
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)) and not path.parent.exists()
    return (
        f"; if it is one of the Hugging Face Hub, fetch it: hf download {path} --local-dir {path.name}"
        if is_name
        else ""
    )


def stored_form(path: str | Path) -> tuple[str, dict[str, int]]:
    """What a model says it is (as ``OlmoeForCausalLM``, ``llama`` or ``anabranch``), and how many numbers of its weights are stored in each
    type, most first; none of a folder without weights. ``path`` and errors as for `load_config`."""
    found, types = find_model(path), Counter[str]()
    if found.is_file():
        file = gguf.GgufFile(found)
        for name in file.names:
            types[file.kind(name)] += math.prod(file.shape(name))
        return str(file.fields.get("general.architecture")), dict(types.most_common())
    table = read_json(found / "config.json")
    if has_weights(found):
        source = open_tensors(found)
        for name in source.names:
            kind = str(source.dtype(name)).removeprefix("torch.")
            # What a module notes beside its weights.
            if kind not in ("bool", "int64"):
                types[kind] += math.prod(source.shape(name))
    named = table.get("architectures")
    first = named[0] if isinstance(named, list) and named else table.get("model_type")
    return str(first) if is_foreign(table) else "anabranch", dict(types.most_common())


def load_config(path: str | Path) -> Decoder.Config:
    """The config of a model without its weights, which need not be there. ``path`` and errors as for `load_model`."""
    found = find_model(path)
    if found.is_file():
        return gguf.read_gguf_config(found)
    table = read_json(found / "config.json")
    if not is_foreign(table):
        return _native_config(found, table)
    config = formats.read_config(table, found / "config.json")
    if config.tie_embeddings and has_weights(found):
        return formats.tied_as_stored(config, open_tensors(found), found / "config.json")
    return config


def check_weights(path: str | Path) -> None:
    """Raise CheckpointError if a model's weights are cut off or do not fit its config, as far as that shows without reading them.

    ``path`` as for `load_model`. A folder without weights passes. The tensors of a GGUF file are looked at when its config is read.
    """
    found = find_model(path)
    if found.is_file():
        gguf.read_gguf_config(found)
        return
    if not has_weights(found):
        return
    table, source = read_json(found / "config.json"), open_tensors(found)
    ignore: Sequence[str] = ()
    if is_foreign(table):
        source = formats.unpacked(source, table)
        model, layout, _, ignore = formats.prepare(source, table, found / "config.json")
    elif quantization_of(found) is not None:
        return
    else:
        model = build_empty(_native_config(found, table))
        layout = identity(model)
    check(state_once(model), source, layout, where=found, ignore=ignore)


def load_model(
    path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[Decoder, Tokenizer | None]:
    """Load a model and its tokenizer (None if the folder has none).

    Args:
        path: a folder saved by `save_model`, a training run (its newest checkpoint), a Hugging Face folder, or a GGUF file.
        dtype: of the weights, a floating-point type; None keeps the stored one (float32 for GGUF). Where several are stored, norms and
            routers keep theirs, and all else is of the embedding's.
        device: where the model shall be; None for the CPU.

    Raises:
        CheckpointError: nothing there, corrupt, of a newer version, or of a kind that we do not have.
        TokenizerError: the tokenizer's files cannot be read.
        ConfigError: weights cannot be of this ``dtype``.
        BackendError: there is no such device, or an optional package is missing.
    """
    model, tokenizer = load_stored(path, dtype=dtype, device=device)
    if describe(model) is None:
        fit_types(model)
    return model, tokenizer


def load_stored(
    path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[Decoder, Tokenizer | None]:
    """`load_model`, but with ``dtype`` None every weight is in the type that it is stored in, even if these cannot compute together."""
    check_dtype_device(dtype, device)
    found = find_model(path)
    if found.is_file():
        return gguf.load_gguf(found, dtype=dtype, device=device)
    table = read_json(found / "config.json")
    if is_foreign(table):
        model = formats.load(open_tensors(found), table, found / "config.json", dtype=dtype, device=device)
    else:
        model = _load_native(found, table, dtype, device)
    return model, _tokenizer(found)


@dataclass(frozen=True)
class OpenedModel:
    """A model whose weights have not been read.

    Attributes:
        model: with parameters on the meta device.
        source, layout: the stored tensors and how they make up the model's.
        ignore: stored names that the model does not need.
        dtype: of all parameters: what was asked for, or that of the stored embedding, since others may not compute with it; None, for
            a model in few bits, keeps that of each.
        where: the folder.
        tokenizer: None if the folder has none.
        hint: what would help where the tensors do not fit.
        quantization: which layers are stored in few bits, see `anabranch.lm.quantized_form`; the layout does not tell of these.
    """

    model: Decoder
    source: TensorSource
    layout: Layout
    ignore: Sequence[str]
    dtype: torch.dtype | None
    where: Path
    tokenizer: Tokenizer | None
    quantization: dict[str, Any] | None = None
    hint: str = ""


def open_any(path: str | Path, *, dtype: torch.dtype | None = None) -> OpenedModel:
    """`open_model` for GGUF files too, whose tensors are there as they are when dequantised."""
    found = find_model(path)
    if not found.is_file():
        return open_model(found, dtype=dtype)
    check_dtype_device(dtype, None)
    file, model, layout, ignore, tokenizer = gguf.open_gguf(found)
    return OpenedModel(model, file, layout, ignore, dtype or torch.float32, found, tokenizer)


def open_model(path: str | Path, *, dtype: torch.dtype | None = None) -> OpenedModel:
    """What `load_model` would load, before it does. Raises as that, and CheckpointError for a GGUF file, whose numbers are packed."""
    found = find_model(path)
    if found.is_file():
        raise CheckpointError(
            f"{found} packs its numbers, so they cannot be read piece by piece; convert it to a folder first"
        )
    check_dtype_device(dtype, None)
    table, source, hint = read_json(found / "config.json"), open_tensors(found), ""
    if is_foreign(table):
        source = formats.unpacked(source, table)
        model, layout, kind, ignore = formats.prepare(source, table, found / "config.json", dtype=dtype)
    else:
        check_undamaged(found)
        config = _native_config(found, table)
        check_amount(config.count(1).parameters, source, found)
        model, kind, ignore, hint = build_empty(config), dtype, [], _hint(config)
        layout = identity(model)
        if quantization_of(found) is None:
            kind = formats.type_of_embedding(source, layout, dtype)
    return OpenedModel(model, source, layout, ignore, kind, found, _tokenizer(found), quantization_of(found), hint)


def is_foreign(table: dict[str, Any]) -> bool:
    """Whether the ``config.json`` is one of Hugging Face's."""
    return "model_type" in table and table.get("format") != FORMAT


def _tokenizer(folder: Path) -> Tokenizer | None:
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    if (folder / "tokenizer.model").is_file():
        logger.warning(
            "%s has only a SentencePiece tokenizer.model, so the model comes without a tokenizer; "
            "load it once with transformers and save_pretrained beside the model",
            folder,
        )
    return None


def export_huggingface(
    folder: str | Path,
    model: Decoder,
    tokenizer: Tokenizer | None = None,
    *,
    family: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Save a model as transformers' ``AutoModelForCausalLM.from_pretrained`` reads it, all or nothing.

    The family is the first of OLMoE, Qwen3-MoE, Mixtral, Qwen2-MoE and DeepSeekMoE that computes what the model does (Llama or
    Qwen2 for a dense one); a model whose layers share experts is expanded. Arguments and errors as `save_model` and `formats.export`.
    """
    check_exportable(model)
    with model_folder(folder) as temporary:
        formats.export(temporary, model, tokenizer, family=family, max_shard_bytes=max_shard_bytes)


def load_weights(model: Decoder, path: str | Path) -> None:
    """Copy the weights of a native folder (or of a run's newest checkpoint) into ``model``, in place.

    Raises CheckpointError if they are of a model of another shape, e.g. with another reuse factor.
    """
    found = find_model(path)
    stored = _native_config(found, read_json(found / "config.json"))
    if quantization_of(found) is not None:
        raise CheckpointError(f"{found} is saved in fewer bits; take the weights of the model it was made from")
    difference = first_difference(*(config.feed_forward.conversions() for config in (model.config, stored)))
    if difference is not None:
        name, ours, theirs, advice = difference
        raise CheckpointError(f"{found} has {name}={theirs}, the model {name}={ours}{'; ' if advice else ''}{advice}")
    check_undamaged(found)
    overwrite(model, open_tensors(found), identity(model), where=found)


def check_undamaged(folder: Path) -> None:
    """Raise CheckpointError if a file of the model in a training run's checkpoint is not as it was written."""
    if (folder / TRAINER_FILE).is_file():
        verify(folder, skip=(TRAINER_FILE, OPTIMIZER_FILE))


def identity(model: nn.Module) -> Layout:
    """The native layout: every tensor under its own name."""
    return {name: [Piece(name)] for name in state_once(model)}


def _load_native(
    folder: Path, table: dict[str, Any], dtype: torch.dtype | None, device: torch.device | str | None
) -> Decoder:
    config = _native_config(folder, table)
    check_undamaged(folder)
    source, hint = open_tensors(folder), _hint(config)
    check_amount(config.count(1).parameters, source, folder)
    model, quantization = build_empty(config), quantization_of(folder)
    if quantization is None:
        fill(model, source, identity(model), where=folder, dtype=dtype, device=device, hint=hint)
    else:
        fill_quantized(model, source, quantization, where=folder, dtype=dtype, device=device, hint=hint)
    return model


def quantization_of(found: Path) -> dict[str, Any] | None:
    """The table ``quantization`` of what `find_model` gave; None for a model that is not saved in few bits. Raises CheckpointError."""
    if found.is_file():
        return None
    table = read_json(found / "config.json")
    given = None if is_foreign(table) else table.get("quantization")
    if given is not None and not is_table(given):
        raise CheckpointError(
            f"quantization in {found / 'config.json'} is no table of a scheme (int8 or int4) and of modules"
        )
    return given


def check_exportable(model: nn.Module) -> None:
    """Raise CheckpointError for a model with quantised layers or an adapter, which no format of Hugging Face's that we write has."""
    if describe(model) is not None:
        raise CheckpointError(
            "the model is quantised, and Hugging Face folders are written in floating point; convert the one it was made from, "
            "or call anabranch.nn.quantize.dequantize first"
        )
    config: Any = getattr(model, "config", None)
    added = [name for name, linear in getattr(config, "linears", {}).items() if linear.is_added]
    streams = getattr(config, "streams", None)
    if added or (streams is not None and streams.owner.kind == "front"):
        where = f"beside its matrices ({added[0]!r})" if added else "in front of sequences (virtual tokens)"
        merges = "merge it into them (anabranch.adapters.merge), or " if added else ""
        raise CheckpointError(
            f"the model has an adapter {where}, and Hugging Face keeps adapters in folders of their own; {merges}save it as one "
            "(anabranch.adapters.save_peft) and convert the model that it was made for"
        )


def _native_config(folder: Path, table: dict[str, Any]) -> Decoder.Config:
    file = folder / "config.json"
    if table.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} says neither format={FORMAT!r} nor a Hugging Face model_type; is it a model folder?"
        )
    schema = table.get("schema")
    if not isinstance(schema, int) or schema < 1:
        raise CheckpointError(f"schema in {file} is {schema!r}; it must be 1 to {SCHEMA}")
    if schema > SCHEMA:
        raise CheckpointError(
            f"{file} is of schema version {schema}, and this anabranch {anabranch.__version__} reads up to {SCHEMA}; update anabranch"
        )
    try:
        return from_dict(Decoder.Config, table.get("model"))
    except ConfigError as error:
        raise CheckpointError(f"{file} does not describe a model: {error}") from None


def _hint(config: Decoder.Config) -> str:
    """What to do about tensors that do not fit; most likely the config was edited by hand."""
    return next((part.what_to_do for part in config.feed_forward.conversions() if part.what_to_do), "")


def check_dtype_device(dtype: torch.dtype | None, device: torch.device | str | None) -> None:
    """Raise ConfigError for a type that weights cannot have, BackendError for a device that is not there."""
    if dtype is not None and dtype not in FLOATS:
        raise ConfigError(f"dtype is {dtype}; weights must be float64, float32, float16 or bfloat16")
    if device is not None and str(device).startswith("meta"):
        raise BackendError(
            f"device {str(device)!r} is not available: it holds no numbers, so nothing can be computed there"
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BackendError(f"device {str(device)!r} is not available: {first_line(error)}") from None
