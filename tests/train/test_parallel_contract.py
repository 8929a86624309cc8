"""The contract of two processes finds what it is for."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from anabranch.config import configclass
from anabranch.lm import Decoder
from anabranch.nn import Count, FeedForward, SelfAttention
from anabranch.registry import resolve
from anabranch.routing import LinearScore, Router
from anabranch.testing import check_parallel
from anabranch.train.parallel_contract import RANKS, _expected, _learned_by_one, _problem


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


class Noisy(OfItsOwn):
    """The same, and it draws random numbers."""

    @configclass
    class Config(OfItsOwn.Config):
        pass

    def forward(self, x_BLD, context):
        return super().forward(x_BLD, context) + 1e-3 * torch.rand(())


class Unlike(OfItsOwn):
    """Uses its weight only where there is one process."""

    has_idle_parameters = True

    @configclass
    class Config(OfItsOwn.Config):
        pass

    def forward(self, x_BLD, context):
        return x_BLD if dist.is_initialized() else x_BLD @ self.weight


class Counts(OfItsOwn):
    """Counts more in the second process."""

    @configclass
    class Config(OfItsOwn.Config):
        pass

    def __init__(self, config, context):
        super().__init__(config, context)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x_BLD, context):
        self.seen += 1 + 10 * (dist.get_rank() if dist.is_initialized() else 0)
        return x_BLD @ self.weight


class Overflows(OfItsOwn):
    """Has no finite output in the second process."""

    @configclass
    class Config(OfItsOwn.Config):
        pass

    def forward(self, x_BLD, context):
        rank = dist.get_rank() if dist.is_initialized() else 0
        return x_BLD @ self.weight / (1 - rank)


def model(layer):
    return decoder(layer.Config())


def decoder(feed_forward):
    attention = SelfAttention.Config(num_heads=2)
    return Decoder.Config(
        vocab_size=31, dim=8, num_layers=1, attention=attention, feed_forward=feed_forward, init_std=0.2
    )


@pytest.mark.slow
def test_what_is_wrong_is_named():
    broken = (OfItsOwn, Noisy, Unlike, Counts, Overflows, Idle)
    with pytest.raises(AssertionError) as caught:
        check_parallel({layer.__name__: model(layer) for layer in broken})
    found = dict(line.split(": ", 1) for line in str(caught.value).splitlines())
    ways = [f"{layer.__name__} under {way}" for layer in broken for way in ("ddp", "fsdp")]
    # The processes stop where one of them fails.
    assert list(found) == ways[:-1]
    for way in ("ddp", "fsdp"):
        assert "in step 0 differs by " in found[f"OfItsOwn under {way}"]
        assert "in step 0 differs by " in found[f"Noisy under {way}"]
        assert "parameters with a gradient in step 0 differ: ['blocks.0." in found[f"Unlike under {way}"]
        assert "feed_forward.seen differs after 3 steps" in found[f"Counts under {way}"]
        assert found[f"Overflows under {way}"] == "the loss of step 0 is nan"
    assert "parameters that were not used" in found["Idle under ddp"]


# -- the comparison, without processes


@pytest.fixture(scope="module", params=[0.0, 0.1], ids=["exact", "random"])
def expected(request):
    """Of a model that draws nothing, and of one that does."""
    moe = resolve("feed_forward", "moe").Config
    router = Router.Config(score=LinearScore.Config(jitter=request.param))
    found = _expected(decoder(moe(num_experts=4, hidden_dim=8, router=router)))
    assert found.is_random == (request.param > 0)
    return found


def with_loss(learned, value):
    learned.losses[1] *= value


def with_gradient(learned, value):
    learned.gradients[2]["norm.weight"][0] *= value


def with_buffer(learned, value):
    learned.buffers["some.buffer"] = learned.buffers["some.buffer"] * value


def without_a_gradient(learned, value):
    del learned.gradients[1]["norm.weight"]


def with_another_gradient(learned, value):
    learned.gradients[1]["others"] = torch.ones(())


@pytest.mark.parametrize(
    ("change", "value", "message"),
    [
        (with_loss, 1.01, "the loss of step 1 is "),
        (with_gradient, 1.1, "the gradient of norm.weight in step 2 differs by "),
        (with_buffer, 2, "the buffer some.buffer differs after 3 steps"),
        (without_a_gradient, None, "parameters with a gradient in step 1 differ: ['norm.weight']"),
        (with_another_gradient, None, "parameters with a gradient in step 1 differ: ['others']"),
        (with_loss, math.nan, "the loss of step 1 is nan"),
        (with_loss, math.inf, "the loss of step 1 is inf"),
        (with_gradient, math.nan, "the gradient of norm.weight in step 2 is not finite"),
        (with_gradient, math.inf, "the gradient of norm.weight in step 2 is not finite"),
    ],
)
def test_every_difference_is_told(expected, change, value, message):
    expected = copy.deepcopy(expected)
    for learned in (expected.joined, expected.halves):
        learned.buffers["some.buffer"] = torch.tensor([True, False]) if value is None else torch.tensor([3, 4])
    found = copy.deepcopy(expected.halves)
    assert _problem(found, expected) is None
    change(found, value)
    assert _problem(found, expected).startswith(message)


def test_what_is_not_finite_is_told_where_one_process_has_it_too(expected):
    expected = copy.deepcopy(expected)
    expected.joined.losses[0] = expected.halves.losses[0] = math.inf
    assert _problem(expected.halves, expected) == "the loss of step 0 is inf"


def test_the_whole_batch_at_once_counts_where_nothing_is_drawn(expected):
    """The Switch loss is taken over a micro-batch, so halves learn something else."""
    problem = _problem(expected.joined, expected)
    assert (problem is None) == (not expected.is_random)


def test_what_is_drawn_depends_on_step_and_part_alone():
    moe = resolve("feed_forward", "moe").Config
    config = decoder(moe(num_experts=4, hidden_dim=8, router=Router.Config(score=LinearScore.Config(jitter=0.1))))
    losses = []
    for state in (5, 6):
        torch.manual_seed(state)
        losses.append(_learned_by_one(config, parts=RANKS).losses)
    assert losses[0] == losses[1]
    # There are no updates: only the draws change from step to step.
    assert len(set(losses[0])) == len(losses[0])
