"""`load`: an engine from its config: weights, their type, their bits, where experts are kept."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import ConfigError
from anabranch.lm.checkpoint import find_model, load_model, quantization_of
from anabranch.lm.decoder import Decoder
from anabranch.lm.quantized import load_quantized
from anabranch.lm.quantized_form import check_scheme
from anabranch.serving.config import ServingConfig
from anabranch.serving.engine.engine import Engine

if TYPE_CHECKING:
    from anabranch.serving.expertflow import OffloadEngine

# In /proc/cpuinfo, of processors that multiply bfloat16.
HALF_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


def load(config: ServingConfig) -> tuple[Engine, Tokenizer | None]:
    """Load the model of ``config`` and make its engine; see `ServingConfig.load`."""
    if not config.model:
        raise ConfigError("model is ''; give the folder or file of a model")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model, tokenizer, experts = _model(config)
    more = {"takes_weights": True, **_nano_runner(model, config)}
    if experts is None:
        return Engine.of(model, config, tokenizer=tokenizer, **more), tokenizer
    controls = {"expert_cache": experts.by_layer}
    return Engine.of(model, config, tokenizer=tokenizer, hooks=[experts], controls=controls, **more), tokenizer


def _nano_runner(model: Decoder, config: ServingConfig) -> dict[str, Any]:
    """The argument of the engine that ``nano_batches`` means, where they pay."""
    if not config.nano_batches:
        return {}
    from anabranch.serving.nanoflow.options import find_pipeline
    from anabranch.serving.nanoflow.runtime import NanoRunner

    pipeline = find_pipeline(model, config)
    return {} if pipeline is None else {"make_runner": partial(NanoRunner, pipeline=pipeline)}


def _model(config: ServingConfig) -> tuple[Decoder, Tokenizer | None, OffloadEngine | None]:
    """The model, and what brings its experts where they have a budget: from files, from memory if a file cannot be read in parts."""
    dtype, budget = dtype_of(config), config.expert_budget
    found = find_model(config.model)
    saved = quantization_of(found)
    if saved is not None and config.quantize != "none":
        check_scheme(saved, config.quantize, None, found)
    bits = None if config.quantize == "none" else config.quantize
    if budget is None:
        if bits is None:
            return *load_model(config.model, dtype=dtype, device=config.device), None
        # Blocks of a GGUF file are not rounded twice.
        model, tokenizer = load_quantized(config.model, bits, dtype=dtype)
        return model.to(config.device), tokenizer, None
    # What it imports takes two seconds.
    from anabranch.serving.expertflow import load_offloaded, offload

    if found.is_dir() or bits is not None:
        return load_offloaded(config.model, budget, dtype=dtype, quantize=bits, device=config.device)
    model, tokenizer = load_model(config.model, dtype=dtype, device=config.device)
    return model, tokenizer, offload(model, budget, tokenizer=tokenizer)


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
