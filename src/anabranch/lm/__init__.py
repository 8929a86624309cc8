"""Decoder language model: config, decoder, cache, generation, checkpoints, foreign formats."""

from anabranch.extras import require

require("lm", by=__name__)

from anabranch.lm.cache import KeyValueCache
from anabranch.lm.checkpoint import (
    export_huggingface,
    load_config,
    load_model,
    load_weights,
    save_model,
    write_model,
)
from anabranch.lm.conversion import convert
from anabranch.lm.decoder import Decoder, DecoderOutput
from anabranch.lm.generate import SamplingConfig, generate, stream
from anabranch.lm.upcycle import average, upcycle

__all__ = [
    "Decoder",
    "DecoderOutput",
    "KeyValueCache",
    "SamplingConfig",
    "average",
    "convert",
    "export_huggingface",
    "generate",
    "load_config",
    "load_model",
    "load_weights",
    "save_model",
    "stream",
    "upcycle",
    "write_model",
]
