"""The contract of two processes finds what it is for."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from anabranch.config import configclass
from anabranch.lm import Decoder
from anabranch.nn import Attention, Count, FeedForward
from anabranch.testing import check_parallel


class OfItsOwn(FeedForward):
    """Computes something else in the second process."""

    @configclass
    class Config(FeedForward.Config):
        def count(self, context):
            return Count.dense(context.dim**2)

    def __init__(self, config, context):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(context.dim))

    def forward(self, x_BLD, context):
        rank = dist.get_rank() if dist.is_initialized() else 0
        return x_BLD @ self.weight * (1 + rank)


class Idle(OfItsOwn):
    """Leaves its weight out and does not say so."""

    @configclass
    class Config(OfItsOwn.Config):
        pass

    def forward(self, x_BLD, context):
        return x_BLD


def model(layer):
    return Decoder.Config(
        vocab_size=31, dim=8, num_layers=1, attention=Attention.Config(num_heads=2), feed_forward=layer.Config()
    )


@pytest.mark.slow
def test_what_is_wrong_is_named():
    with pytest.raises(AssertionError) as caught:
        check_parallel({"own": model(OfItsOwn), "idle": model(Idle)})
    found = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in found] == ["own under ddp", "own under fsdp", "idle under ddp"]
    assert "in step 0 differs by" in found[0]
    assert "parameters that were not used" in found[2]
