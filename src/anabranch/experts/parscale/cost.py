"""What streams cost in memory and time: a roofline of weights, key-value caches and multiplications.

    cost_model(config, batch=1, input_tokens=64, output_tokens=64, hardware="h100")

A pass takes as long as it takes to read its weights and caches, or to do its multiplications, whichever is longer. At batch 1 decoding
reads: P streams share the weights, so they cost little more than one.
"""

import time
from dataclasses import dataclass

import torch

from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder

__all__ = ["HARDWARE", "Cost", "Hardware", "cost_model", "measure_hardware"]


@dataclass(frozen=True)
class Hardware:
    """Bytes read per second from memory, and floating-point operations per second of matrix products."""

    bandwidth: float
    flops: float


# Data sheets (dense bf16); "laptop" is a round figure for two-channel DDR5 and eight cores with AVX-512.
HARDWARE = {
    "laptop": Hardware(7e10, 1e12),
    "a100": Hardware(2.0e12, 3.12e14),
    "h100": Hardware(3.35e12, 9.89e14),
}


@dataclass(frozen=True)
class Cost:
    """What `cost_model` finds.

    Attributes:
        weight_bytes: of all parameters.
        cache_bytes: of the key-value caches when the output is complete, prefixes included.
        prefill_s: seconds for the input.
        decode_s: seconds for the output.
    """

    weight_bytes: int
    cache_bytes: int
    prefill_s: float
    decode_s: float

    @property
    def memory_bytes(self) -> int:
        """Weights and caches."""
        return self.weight_bytes + self.cache_bytes

    @property
    def latency_s(self) -> float:
        """Input and output."""
        return self.prefill_s + self.decode_s


def cost_model(
    config: Decoder.Config,
    *,
    num_streams: int | None = None,
    batch: int = 1,
    input_tokens: int = 64,
    output_tokens: int = 64,
    hardware: str | Hardware = "h100",
    dtype: torch.dtype = torch.bfloat16,
) -> Cost:
    """Memory and latency of a model whose weights all are read in every pass (a dense one).

    Args:
        config: with or without streams.
        num_streams: P, in the place of the config's; None keeps it. For P = 1 the plain model.
        batch: sequences.
        input_tokens: of each.
        output_tokens: of each.
        hardware: a name in `HARDWARE`, or numbers of your own, e.g. from `measure_hardware`.
        dtype: of weights and caches.

    Raises ConfigError for unknown hardware, numbers below 1, or another P of a config without streams.
    """
    for name, value in (("batch", batch), ("input_tokens", input_tokens), ("output_tokens", output_tokens)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if isinstance(hardware, str):
        if hardware not in HARDWARE:
            raise ConfigError(
                f"hardware is {hardware!r}; known: {', '.join(HARDWARE)}; or give a Hardware(bandwidth, flops)"
            )
        hardware = HARDWARE[hardware]
    config = _with_streams(config, num_streams)
    streams = 1 if config.streams is None else config.streams.num_streams
    prefix = getattr(config.streams, "prefix_len", 0) if streams > 1 else 0
    total = input_tokens + output_tokens
    weights = config.count(total).parameters * dtype.itemsize
    row = 2 * config.num_layers * config.attention.kv_heads * config.attention.width(config.dim) * dtype.itemsize
    # The prefix is held, and read, once for each stream.
    cache = streams * row * (prefix + batch * total)
    mean_cache = streams * row * (prefix + batch * (input_tokens + output_tokens // 2))
    prefill_flops = batch * input_tokens * config.count(input_tokens).flops
    # Over twice the mean context: all of it is met.
    step_flops = batch * config.count(2 * input_tokens + output_tokens).flops
    prefill = max(weights / hardware.bandwidth, prefill_flops / hardware.flops)
    step = max((weights + mean_cache) / hardware.bandwidth, step_flops / hardware.flops)
    return Cost(weights, cache, prefill, output_tokens * step)


def measure_hardware(*, size: int = 2048, device: str = "cpu") -> Hardware:
    """The same numbers of this machine: a copy of 256 MB and a float32 product of ``size`` x ``size`` matrices, best of three."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    square = torch.ones(size, size, device=device)
    copy_s = _best(lambda: target.copy_(source), device)
    product_s = _best(lambda: square @ square, device)
    return Hardware(2 * source.nbytes / copy_s, 2 * size**3 / product_s)


def _best(work: object, device: str) -> float:
    times = []
    # The first one warms up.
    for _ in range(4):
        start = time.perf_counter()
        work()  # type: ignore[operator]
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _with_streams(config: Decoder.Config, num_streams: int | None) -> Decoder.Config:
    if num_streams is None:
        return config
    if config.streams is None:
        if num_streams == 1:
            return config
        raise ConfigError(f"num_streams is {num_streams}, but the config has no streams; set its streams first")
    return config.replace(streams=config.streams.replace(num_streams=num_streams, in_use=None))
