"""Settings of an elastic group."""

import sys
from typing import Any, Literal

from anabranch.config import Config, Field, Repeats, Seed, Size, configclass
from anabranch.errors import ConfigError
from anabranch.serving.config import blocks_in
from anabranch.serving.depth import DepthConfig
from anabranch.serving.elasticmoe.policy import Policy
from anabranch.sizes import parse_bytes

__all__ = ["ElasticConfig"]


@configclass
class ElasticConfig(Config):
    """Settings; `build` makes the `Coordinator`.

    Attributes:
        model: folder in our own format.
        devices: to start with; each is a process and its memory.
        device: what they compute on. ``cpu``: all in main memory. ``cuda``: dealt to the GPUs of the machine in turn, several to one if
            there are more devices than GPUs.
        name: what the model is called; empty for the last part of the path.
        threads: of one step of one device.
        num_blocks, block_tokens: of the key-value cache of each device.
        kv_memory: bytes of that cache instead of ``num_blocks``, such as ``1GiB``: as many blocks as fit, but no more than four times those
            that ``max_seqs`` requests at their longest fill, since a change of devices hands their tables over.
        max_positions: longest prompt and output; None for the model's.
        max_batched_tokens, max_seqs: of a step of one device.
        long_prefill_chunk: most tokens of one prompt in a step; None for all that fit.
        prefix_cache: use blocks of earlier requests.
        stop_tokens: the model's own ends of text; None takes those of its tokenizer.
        weights: ``shared`` lets all devices map the same pages of weights (ours): nothing is copied when experts change their device, and
            nothing is there twice. ``own`` gives each device weights of its own, copied between them as between accelerators (the paper);
            several GPUs need that.
        device_memory: bytes of each device; None for no limit. A configuration that needs more is refused.
        mode: ``migrate`` hands running requests over between two steps (ours); ``drain`` lets them end where they are (the paper).
        standby: instances kept ready without weights.
        ahead: keep those for ``policy.step`` devices more and fewer ready before they are asked for.
        busy: a command during another is ``queue``d or ``refuse``d.
        policy: when to scale.
        mapped: False copies weights into each instance (ablation: without the shared arena).
        forks: copy ranks from a process that has imported everything; False starts an interpreter for each.
        p2p: False reads what is new from disk (ablation; with ``weights="own"``).
        watchdog_s: a rank that serves and gives no sign of life for so many seconds is ended, and replaced; None waits for ever.
        pace_s, pace_token_s: see `Limits`.
        seed: of requests that bring none; None draws it.
        max_depth: most blocks that a request's own path may run, see `anabranch.serving.config.ServingConfig`.
        depth: depth routers and a skipper of tokens, see `anabranch.serving.depth.DepthConfig`.
    """

    model: str
    devices: Repeats = Field(default=1, ge=1)
    device: Literal["cpu", "cuda"] = "cpu"
    name: str = ""
    threads: Repeats = Field(default=1, ge=1)
    num_blocks: Size = Field(default=256, ge=1)
    kv_memory: str | None = None
    block_tokens: Size = Field(default=16, ge=1)
    max_positions: Size | None = Field(default=None, ge=2)
    max_batched_tokens: Size = Field(default=512, ge=1)
    max_seqs: Size = Field(default=16, ge=1)
    long_prefill_chunk: Size | None = Field(default=None, ge=1)
    prefix_cache: bool = True
    stop_tokens: tuple[int, ...] | None = None
    weights: Literal["shared", "own"] = "shared"
    device_memory: int | None = Field(default=None, ge=1)
    mode: Literal["migrate", "drain"] = "migrate"
    standby: int = Field(default=2, ge=0)
    ahead: bool = True
    busy: Literal["queue", "refuse"] = "queue"
    policy: Policy = Policy()
    mapped: bool = True
    p2p: bool = True
    forks: bool = sys.platform == "linux"
    watchdog_s: float | None = Field(default=120.0, gt=0)
    pace_s: float = Field(default=0.0, ge=0)
    pace_token_s: float = Field(default=0.0, ge=0)
    seed: Seed | None = None
    max_depth: Repeats | None = Field(default=None, ge=1)
    depth: DepthConfig = DepthConfig()

    def __post_init__(self) -> None:
        if self.kv_memory is not None:
            parse_bytes(self.kv_memory, "kv_memory")
        if self.devices > self.policy.max_devices:
            raise ConfigError(f"devices is {self.devices}; policy.max_devices={self.policy.max_devices} is less")
        if not self.mapped and self.device != "cpu":
            raise ConfigError(f"mapped is false; that is for device='cpu', not for {self.device!r}")
        if not self.p2p and self.weights == "shared":
            raise ConfigError(
                "p2p is false; that needs weights='own', as shared weights are not copied between devices"
            )

    def blocks_for(self, bytes_per_token: int, max_positions: int) -> int:
        """Blocks of a device for a model that keeps so much per position. Raises CapacityError if not even one fits."""
        if self.kv_memory is None:
            return self.num_blocks
        fit = blocks_in(self.kv_memory, bytes_per_token, self.block_tokens)
        longest = -(-max_positions // self.block_tokens)
        return min(fit, 4 * self.max_seqs * longest)

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """The `Coordinator`."""
        # It needs all of this package.
        from anabranch.serving.elasticmoe.coordinator import Coordinator

        return Coordinator(self, *args, **kwargs)
