"""`load`: an engine from its config: weights, their type, their bits, where experts are kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm.checkpoint import find_model, load_config, load_model, quantization_of
from anabranch.lm.decoder import Decoder
from anabranch.lm.quantized import load_quantized, makes_experts
from anabranch.lm.quantized_form import check_scheme
from anabranch.lm.quantized_layers import Bits
from anabranch.lm.seen_model import check_unchanged, see_model
from anabranch.lm.tensors import has_weights
from anabranch.nn import kernels
from anabranch.nn.nf4 import quantize_nf4
from anabranch.seen_files import SeenFiles
from anabranch.serving.answering import answer_settings
from anabranch.serving.config import Quantize, ServingConfig
from anabranch.serving.depth import DepthConfig
from anabranch.serving.engine.adapter_place import files_of
from anabranch.serving.engine.cut import Cut
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.runner import ModelRunner
from anabranch.serving.experts import ExpertsConfig
from anabranch.sizes import parse_bytes

if TYPE_CHECKING:
    from anabranch.serving.expertflow import OffloadEngine

# In /proc/cpuinfo, of processors that multiply bfloat16.
HALF_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


@dataclass(frozen=True)
class Loaded:
    """A model in memory.

    Attributes:
        model: the decoder, in evaluation mode.
        tokenizer: of its folder; None if there is none.
        experts: what brings its experts where they have a budget; None where all are in memory.
        quantize: what was asked of its bits, with ``auto`` settled.
        kv_memory: bytes that a plan of memory leaves for keys and values; None where nothing was planned.
    """

    model: Decoder
    tokenizer: Tokenizer | None
    experts: OffloadEngine | None = None
    quantize: Quantize = "none"
    kv_memory: int | None = None


def load(config: ServingConfig) -> tuple[Engine, Tokenizer | None]:
    """Load the model of ``config`` and make its engine; see `ServingConfig.load`."""
    if not config.model:
        raise ConfigError("model is ''; give the folder or file of a model")
    # Once: a training run may have a newer checkpoint at any time.
    config = config.found()
    seen, beside, adapters = see_model(config.model), config.depth.seen(), _see_adapters(config)
    is_planned, config = config.memory is not None, config.planned()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    loaded = load_weights(
        config.model,
        dtype=dtype_of(config),
        quantize=quantize_of(config),
        device=config.device,
        expert_budget=config.expert_budget,
        experts=config.experts,
    )
    engine = engine_of(loaded, config)
    numbers = f"{dtype_of(config)} {loaded.quantize}"
    versions = {one["name"]: one["version"] for one in engine.adapters.shelf.facts()}
    settings = answer_settings(config, versions)
    engine.info = replace(
        engine.info,
        files=seen,
        beside=beside,
        numbers=numbers,
        settings=settings,
        adapter_versions=versions,
        planned=config if is_planned else None,
    )
    check_unchanged(seen, config.model)
    if changed := beside.difference(config.depth.seen()) or adapters.difference(_see_adapters(config)):
        raise CheckpointError(f"{changed} is another file than when it was read; start again, once it is written")
    if engine.runner.cut is not None:
        engine.runner.cut.agree(f"{seen.content} {numbers}", config.model)
    return engine, loaded.tokenizer


def _see_adapters(config: ServingConfig) -> SeenFiles:
    """The files of adapters that are there from the start, as they are now; of those that have to have a version it tells more."""
    folders = [folder for name, folder in config.adapters.folders if name not in config.adapters.versions]
    return SeenFiles.of(files_of(folders))


def engine_of(loaded: Loaded, config: ServingConfig, *, most_positions: int | None = None) -> Engine:
    """The engine of a model that is nobody else's. What ``config`` says of loading is not read, but what it says of ``experts``.

    ``most_positions`` is how far a request may go, also beyond what the model is meant for; None for that.
    """
    model, experts = loaded.model, loaded.experts
    more: dict[str, Any] = {"takes_weights": True, **_nano_runner(model, config), **_cut_runner(config)}
    if experts is not None:
        from anabranch.serving.expertflow.served import describe, paired

        more |= {"hooks": [experts], "controls": {"expert_cache": experts.by_layer}}
        more |= {**paired(config.experts, experts), "experts": describe(config.experts, experts)}
    return Engine.of(model, config, tokenizer=loaded.tokenizer, most_positions=most_positions, **more)


def _nano_runner(model: Decoder, config: ServingConfig) -> dict[str, Any]:
    """The argument of the engine that ``nano_batches`` means, where they pay."""
    if not config.nano_batches:
        return {}
    from anabranch.serving.nanoflow.options import find_pipeline
    from anabranch.serving.nanoflow.runtime import NanoRunner

    pipeline = find_pipeline(model, config)
    return {} if pipeline is None else {"make_runner": partial(NanoRunner, pipeline=pipeline)}


def _cut_runner(config: ServingConfig) -> dict[str, Any]:
    """The argument of the engine that ``context`` means."""
    if config.context is None:
        return {}
    return {"make_runner": partial(ModelRunner, cut=Cut(config.context, timeout_s=config.context_timeout_s))}


def load_weights(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    quantize: Quantize = "none",
    device: str = "cpu",
    expert_budget: str | int | None = None,
    experts: ExpertsConfig = ExpertsConfig(),  # noqa: B008
) -> Loaded:
    """The model at ``path``, and what brings its experts where they have a budget: from files, or from memory if that cannot be.

    Args:
        path: as `anabranch.lm.load_model` takes it.
        dtype: of the weights; None as they are stored.
        quantize: see `ServingConfig`; a folder that is saved in the same bits may be named with them. ``auto`` goes by ``device`` alone.
        device: where the model shall be.
        expert_budget: bytes of experts in memory; None for all.
        experts: how the others come and go.

    Raises CheckpointError, ConfigError or CapacityError if that cannot be.
    """
    found, quantize = find_model(path), settled(quantize, device)
    bits = _bits(quantize, found)
    if bits == "nf4":
        if expert_budget is not None:
            raise ConfigError(
                "quantize is 'nf4', which keeps experts whole and in memory, and they have a budget; set quantize to int4, or leave the "
                "budget out"
            )
        model, tokenizer = load_model(found, dtype=dtype, device=device)
        quantize_nf4(model)
        return Loaded(model, tokenizer, quantize=quantize)
    if expert_budget is None:
        if bits is None:
            return Loaded(*load_model(found, dtype=dtype, device=device), quantize=quantize)
        # Blocks of a GGUF file are not rounded twice.
        model, tokenizer = load_quantized(found, bits, dtype=dtype)
        return Loaded(model.to(device), tokenizer, quantize=quantize)
    # What it imports takes two seconds.
    from anabranch.serving.expertflow import load_offloaded
    from anabranch.serving.expertflow.served import offload_options

    options = offload_options(experts, found)
    parts = load_offloaded(found, expert_budget, dtype=dtype, quantize=bits, device=device, **options)
    return Loaded(*parts, quantize=quantize)


def quantize_of(config: ServingConfig) -> Quantize:
    """What ``quantize`` of a config means: anything but ``auto``."""
    return settled(config.quantize, config.device, is_typed=config.dtype != "auto")


def settled(quantize: Quantize, device: str, *, is_typed: bool = False) -> Quantize:
    """What ``auto`` means on a ``device``, for weights of which a type is asked for or not; what else ``quantize`` may be as it is."""
    if quantize != "auto":
        return quantize
    # Without kernels each pass would unpack all weights.
    is_fast = str(device).partition(":")[0] == "cpu" and kernels.load() is not None
    return "stored" if is_fast and not is_typed else "none"


def _bits(quantize: Quantize, found: Path) -> Bits | Literal["nf4"] | None:
    """The bits that a model is brought into; None for those it is loaded in. Raises ConfigError for a folder that is saved in others."""
    saved = quantization_of(found)
    if saved is not None and quantize in ("int8", "int4"):
        check_scheme(saved, quantize, None, found)
    if saved is not None and quantize == "nf4":
        raise ConfigError(f"quantize is 'nf4', and {found} is saved in few bits already; leave it out")
    return None if quantize == "none" or quantize == "auto" or saved is not None else quantize


def check_load(config: ServingConfig, tokenizer: Tokenizer) -> None:
    """What `load` would refuse of the bits, the budget of experts and their predictor, and adapters, before weights are read.

    Of those only the embedding is, where an adapter tells of which model it is: a model in memory may show more.

    Raises ConfigError, CheckpointError, CapacityError or DataError as that.
    """
    bits = _bits(quantize_of(config), find_model(config.model))
    check_depth(config.depth, config.model)
    if config.adapters.load:
        check_adapters(config)
    if config.expert_budget is None:
        return
    # A config with a budget of experts has no nf4.
    bits = cast(Bits | None, bits)
    from anabranch.lm.outline import outline
    from anabranch.serving.expertflow.expertflow import tokenizer_fingerprint
    from anabranch.serving.expertflow.loading import check_drop_cache
    from anabranch.serving.expertflow.pools import pools_of
    from anabranch.serving.expertflow.predictors import load_predictor
    from anabranch.serving.expertflow.served import offload_options

    if makes_experts(find_model(config.model), bits):
        check_drop_cache(config.experts.drop_cache, config.model)
    model = outline(config.model, bits=bits, dtype=dtype_of(config))
    pools, options = pools_of(model, config.model), offload_options(config.experts, config.model)
    if config.memory is None:
        pools.slots(parse_bytes(config.expert_budget), options["policy"])
    predictor = options["predictor"]
    if predictor is not None and Path(predictor).is_file():
        fingerprint = pools.fingerprint(tokenizer_fingerprint(tokenizer, model))
        load_predictor(predictor).fingerprint.check(fingerprint, predictor)


def check_adapters(config: ServingConfig) -> None:
    """Load the adapters of ``config`` as an engine does, but for their numbers. Raises as that."""
    from anabranch.adapters.base_digest import stored_digest
    from anabranch.serving.core.adapter_shelf import AdapterShelf
    from anabranch.serving.engine.adapter_reader import AdapterReader, Looked, kept_as
    from anabranch.serving.engine.served_adapters import load_first

    found, dtype = find_model(config.model), dtype_of(config)
    # A table in few bits is known by its numbers as they are before they are rounded to a type.
    stored = cache(partial(stored_digest, found, torch.float32 if found.is_file() else dtype))
    is_there = found.is_file() or has_weights(found)
    reader = AdapterReader(load_config(found), dtype=kept_as(dtype), stored=stored if is_there else None)
    shelf = AdapterShelf[Looked](reader.look, parse_bytes(config.adapters.memory))
    try:
        load_first(shelf, config.adapters)
    finally:
        shelf.close()


def check_depth(depth: DepthConfig, model: str) -> None:
    """What an engine would refuse of depth routers and a skipper of tokens, before weights are read. Raises CheckpointError."""
    if depth.routers is not None:
        _check_routers(depth.routers, model)
    if depth.skipper is not None:
        _check_skipper(depth.skipper, model)


def _check_routers(folder: str, model: str) -> None:
    """Raise CheckpointError for depth routers that cannot be of the model by their sizes; what tells models apart is in the weights."""
    from anabranch.depth.dr_llm.bank import RouterBank

    bank, config = RouterBank.load(folder), load_config(model)
    if bank.config.features == "first":
        raise CheckpointError(
            f"the routers in {folder} see the states before the first block alone (features=first), which is a baseline that anabranch "
            "depth eval measures; train routers with features=previous to serve them"
        )
    for what, theirs, ours in (("blocks", bank.num_blocks, config.num_layers), ("width", bank.width, config.dim)):
        if theirs != ours:
            raise CheckpointError(
                f"the routers in {folder} are of another model: {what} {theirs}, and {model} has {ours}"
            )


def _check_skipper(path: str, model: str) -> None:
    """Raise CheckpointError for a skipper of tokens that cannot be of the model; what tells models apart is in the weights."""
    from anabranch.depth.ftp.saving import read_skipper

    theirs, ours = len(read_skipper(path).schedule), load_config(model).num_layers
    if theirs != ours:
        raise CheckpointError(f"the skipper in {path} is of another model: blocks {theirs}, and {model} has {ours}")


def dtype_of(config: ServingConfig) -> torch.dtype:
    """What ``dtype`` means here."""
    if config.dtype != "auto":
        return torch.float32 if config.dtype == "float32" else torch.bfloat16
    if torch.device(config.device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _multiplies_halves() else torch.float32


def _multiplies_halves() -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "").split()
    except OSError:
        return False
    return any(flag in flags for flag in HALF_FLAGS)
