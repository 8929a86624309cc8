"""`load`: an engine from its config: weights, their type, their bits, where experts are kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm.checkpoint import find_model, load_config, load_model, quantization_of
from anabranch.lm.decoder import Decoder
from anabranch.lm.quantized import load_quantized
from anabranch.lm.quantized_form import check_scheme
from anabranch.serving.config import ServingConfig
from anabranch.serving.depth import DepthConfig
from anabranch.serving.engine.engine import Engine
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
        kv_memory: bytes that a plan of memory leaves for keys and values; None where nothing was planned.
    """

    model: Decoder
    tokenizer: Tokenizer | None
    experts: OffloadEngine | None = None
    kv_memory: int | None = None


def load(config: ServingConfig) -> tuple[Engine, Tokenizer | None]:
    """Load the model of ``config`` and make its engine; see `ServingConfig.load`."""
    if not config.model:
        raise ConfigError("model is ''; give the folder or file of a model")
    config = config.planned()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    loaded = load_weights(
        config.model,
        dtype=dtype_of(config),
        quantize=config.quantize,
        device=config.device,
        expert_budget=config.expert_budget,
        experts=config.experts,
    )
    return engine_of(loaded, config), loaded.tokenizer


def engine_of(loaded: Loaded, config: ServingConfig, *, most_positions: int | None = None) -> Engine:
    """The engine of a model that is nobody else's. What ``config`` says of loading is not read, but what it says of ``experts``.

    ``most_positions`` is how far a request may go, also beyond what the model is meant for; None for that.
    """
    model, experts = loaded.model, loaded.experts
    more: dict[str, Any] = {"takes_weights": True, **_nano_runner(model, config)}
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


def load_weights(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    quantize: Literal["none", "int8", "int4"] = "none",
    device: str = "cpu",
    expert_budget: str | int | None = None,
    experts: ExpertsConfig = ExpertsConfig(),  # noqa: B008
) -> Loaded:
    """The model at ``path``, and what brings its experts where they have a budget: from files, or from memory if that cannot be.

    Args:
        path: as `anabranch.lm.load_model` takes it.
        dtype: of the weights; None as they are stored.
        quantize: see `ServingConfig`; a folder that is saved in the same bits may be named with them.
        device: where the model shall be.
        expert_budget: bytes of experts in memory; None for all.
        experts: how the others come and go.

    Raises CheckpointError, ConfigError or CapacityError if that cannot be.
    """
    found = find_model(path)
    saved = quantization_of(found)
    if saved is not None and quantize != "none":
        check_scheme(saved, quantize, None, found)
    bits = None if quantize == "none" else quantize
    if expert_budget is None:
        if bits is None:
            return Loaded(*load_model(path, dtype=dtype, device=device))
        # Blocks of a GGUF file are not rounded twice.
        model, tokenizer = load_quantized(path, bits, dtype=dtype)
        return Loaded(model.to(device), tokenizer)
    # What it imports takes two seconds.
    from anabranch.serving.expertflow import load_offloaded, offload
    from anabranch.serving.expertflow.served import offload_options

    options = offload_options(experts, path)
    if found.is_dir() or bits is not None:
        return Loaded(*load_offloaded(path, expert_budget, dtype=dtype, quantize=bits, device=device, **options))
    model, tokenizer = load_model(path, dtype=dtype, device=device)
    return Loaded(model, tokenizer, offload(model, expert_budget, tokenizer=tokenizer, **options))


def check_load(config: ServingConfig, tokenizer: Tokenizer) -> None:
    """What `load_weights` would refuse of the bits, the budget of experts and their predictor, before weights are read.

    Raises ConfigError, CheckpointError or DataError as that.
    """
    found = find_model(config.model)
    saved = quantization_of(found)
    if saved is not None and config.quantize != "none":
        check_scheme(saved, config.quantize, None, found)
    check_depth(config.depth, config.model)
    if config.adapters.load:
        from anabranch.serving.engine.adapter_reader import AdapterReader

        reader = AdapterReader(load_config(config.model))
        for _, folder in config.adapters.folders:
            reader.check(folder)
    if config.expert_budget is None:
        return
    from anabranch.lm.outline import outline
    from anabranch.serving.expertflow.expertflow import find_pools, tokenizer_fingerprint
    from anabranch.serving.expertflow.policy import make_policy
    from anabranch.serving.expertflow.predictors import load_predictor
    from anabranch.serving.expertflow.served import offload_options

    model = outline(config.model, bits=None if config.quantize == "none" else config.quantize, dtype=dtype_of(config))
    pools, options = find_pools(model, config.model), offload_options(config.experts, config.model)
    if config.memory is None:
        pools.layout.slots(parse_bytes(config.expert_budget), per_layer=make_policy(options["policy"]).per_layer)
    predictor = options["predictor"]
    if predictor is not None and Path(predictor).is_file():
        fingerprint = pools.fingerprint(tokenizer_fingerprint(tokenizer, model))
        load_predictor(predictor).fingerprint.check(fingerprint, predictor)


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
