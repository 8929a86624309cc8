"""`adapter_bytes`: what the adapters that an engine begins with take."""

from dataclasses import dataclass

from anabranch.lm.checkpoint import load_config
from anabranch.lm.decoder import Decoder
from anabranch.serving.config import ServingConfig
from anabranch.serving.engine.adapter_reader import AdapterReader, kept_as
from anabranch.serving.load import dtype_of

__all__ = ["AdapterBytes", "adapter_bytes"]


@dataclass(frozen=True)
class AdapterBytes:
    """Of all of them.

    Attributes:
        held: that stay in memory.
        reading: beside, while the largest is read: its numbers as they are stored, and as they are put together.
    """

    held: int = 0
    reading: int = 0


def adapter_bytes(config: ServingConfig, model: str | Decoder.Config) -> AdapterBytes:
    """Look at each adapter of ``config``, for a model by its path, or its config. Raises as `AdapterReader.look`."""
    if not config.adapters.load:
        return AdapterBytes()
    shape = model if isinstance(model, Decoder.Config) else load_config(model)
    reader = AdapterReader(shape, dtype=kept_as(dtype_of(config)))
    sizes = [reader.look(folder).nbytes for _, folder in config.adapters.folders]
    return AdapterBytes(sum(sizes), 2 * max(sizes))
