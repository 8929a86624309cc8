"""The process of a rank: what it does once before it is copied, how it begins and how it ends. What it does between is `rank.Rank`."""

import faulthandler
import os
import signal
import sys
import traceback

import torch

from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import build_empty
from anabranch.nn.attention import SelfAttention
from anabranch.nn.moe import MoE
from anabranch.routing import Router, TopK
from anabranch.serving.elasticmoe.rank import Rank
from anabranch.serving.elasticmoe.wire import Channel, ChannelClosedError
from anabranch.serving.engine.runner import ModelRunner

__all__ = ["main", "rehearse"]


def rehearse() -> None:
    """Do once, on a model of nothing, what makes torch import and load the rest of itself."""
    torch.set_num_threads(1)
    layer = MoE.Config(num_experts=2, hidden_dim=8, router=Router.Config(select=TopK.Config(top_k=1)))
    config = Decoder.Config(
        vocab_size=8, dim=8, num_layers=1, attention=SelfAttention.Config(num_heads=1), feed_forward=layer
    )
    build_empty(config)
    ModelRunner(config.build(), num_blocks=1).warm_up()


def main(fd: int) -> None:
    """The process; ``fd`` is its end of the channel to the coordinator."""
    torch.set_num_threads(1)
    # A peer's rows should not wait 5 ms for this rank's own step.
    sys.setswitchinterval(0.0005)
    # For operators: where a rank is.
    faulthandler.register(signal.SIGUSR1)
    channel = Channel.of_fd(fd)
    try:
        boot, fds = channel.recv()
        torch.set_num_threads(boot.limits.threads)
        rank = Rank(channel, boot, fds)
        channel.send(("ready",))
        rank.run()
    except ChannelClosedError:
        # The coordinator has ended this rank.
        pass
    except Exception:
        # It could not even start; the coordinator sees the channel close.
        traceback.print_exc()
        os._exit(1)
    # Threads that serve peers may still wait for them.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
