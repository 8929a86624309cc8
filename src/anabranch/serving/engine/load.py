"""`load`: an engine from its config: weights, their type, their bits, where experts are kept."""

import torch

from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import ConfigError
from anabranch.lm.checkpoint import load_model
from anabranch.serving.config import ServingConfig
from anabranch.serving.engine.engine import Engine

HALF_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # in /proc/cpuinfo, of processors that multiply bfloat16


def load(config: ServingConfig) -> tuple[Engine, Tokenizer | None]:
    """Load the model of ``config`` and make its engine; see `ServingConfig.load`."""
    if not config.model:
        raise ConfigError("model is ''; give the folder or file of a model")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model, tokenizer = load_model(config.model, dtype=dtype_of(config), device=config.device)
    return Engine.of(model, config, tokenizer=tokenizer), tokenizer


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
