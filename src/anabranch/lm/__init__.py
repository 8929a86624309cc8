"""Decoder language model: config, decoder, cache, generation, checkpoints, foreign formats."""

from anabranch.lm.cache import KeyValueCache
from anabranch.lm.decoder import Decoder, DecoderOutput
from anabranch.lm.generate import SamplingConfig, generate, stream

__all__ = ["Decoder", "DecoderOutput", "KeyValueCache", "SamplingConfig", "generate", "stream"]
