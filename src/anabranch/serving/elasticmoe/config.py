"""Settings of an elastic group."""

import sys
from typing import Any, Literal

from anabranch.config import Config, Field, Repeats, Seed, Size, configclass
from anabranch.errors import ConfigError
from anabranch.serving.elasticmoe.policy import Policy

__all__ = ["ElasticConfig"]


@configclass
class ElasticConfig(Config):
    """Settings; `build` makes the `Coordinator`.

    Attributes:
        model: folder in our own format.
        devices: to start with; each is a process and its memory.
        device: what they compute on. ``cpu``: all in main memory. ``cuda``: dealt to the GPUs of the machine in turn, several to one if
            there are more devices than GPUs.
        num_blocks, block_tokens: of the key-value cache of each device.
        max_positions: longest prompt and output; None for the model's.
        max_batched_tokens, max_seqs: of a step of one device.
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
        seed: of the sampler.
    """

    model: str
    devices: Repeats = Field(default=1, ge=1)
    device: Literal["cpu", "cuda"] = "cpu"
    num_blocks: Size = Field(default=256, ge=1)
    block_tokens: Size = Field(default=16, ge=1)
    max_positions: Size | None = Field(default=None, ge=2)
    max_batched_tokens: Size = Field(default=512, ge=1)
    max_seqs: Size = Field(default=16, ge=1)
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
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.devices > self.policy.max_devices:
            raise ConfigError(f"devices is {self.devices}; policy.max_devices={self.policy.max_devices} is less")
        if not self.mapped and self.device != "cpu":
            raise ConfigError(f"mapped is false; that is for device='cpu', not for {self.device!r}")
        if not self.p2p and self.weights == "shared":
            raise ConfigError(
                "p2p is false; that needs weights='own', as shared weights are not copied between devices"
            )

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """The `Coordinator`."""
        # It needs all of this package.
        from anabranch.serving.elasticmoe.coordinator import Coordinator

        return Coordinator(self, *args, **kwargs)
