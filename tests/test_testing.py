"""The contract checks find what they are for: each broken part here fails the check that should catch it."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anabranch.config import Field, Repeats, Size, configclass
from anabranch.errors import ConfigError
from anabranch.nn import Count, ExpertPool, FeedForward, MoE, SwiGLU
from anabranch.nn.block import PreNorm
from anabranch.nn.context import set_unregistered
from anabranch.registry import BUILTIN, resolve
from anabranch.routing import Balancer, LinearScore, Router, Routing, Select, SwitchLoss, TopK
from anabranch.testing import (
    DEVICES,
    check_balancer,
    check_block,
    check_feed_forward,
    check_pool,
    check_router,
    check_routing,
    check_score,
    check_select,
)


def test_devices_begin_with_the_cpu():
    assert DEVICES[0] == "cpu"
    assert ("cuda" in DEVICES) == torch.cuda.is_available()


@pytest.mark.parametrize("device", DEVICES)
def test_a_pool_that_is_right(device):
    for num_experts in (1, 5):
        check_pool(ExpertPool(num_experts, 8, 6, init_std=0.5), device=device)
    check_pool(ExpertPool(3, 8, 6, init_std=0.5, recompute=True, backend="reference"), device=device)


# -- routings


def routing(**changed):
    fields = {
        "index_NK": torch.tensor([[0, 2], [1, -1]]),
        "weight_NK": torch.tensor([[0.6, 0.4], [1.0, 0.0]]),
        "score_NE": torch.ones(2, 3),
    }
    return Routing(**{**fields, **changed})


def test_a_routing_that_is_right():
    check_routing(routing())


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"index_NK": torch.tensor([[0, 2], [1, -1]], dtype=torch.int32)}, "index_NK is torch.int32, not int64"),
        ({"index_NK": torch.tensor([[0, 3], [1, -1]])}, "an index is not in -1 to 2"),
        ({"index_NK": torch.tensor([[0, 0], [1, -1]])}, "an item has one destination twice"),
        ({"weight_NK": torch.ones(2, 2)}, "an unused choice has a weight that is not 0"),
        ({"weight_NK": torch.tensor([[torch.nan, 0.4], [1.0, 0.0]])}, "a weight is not finite"),
        ({"weight_NK": torch.ones(2, 3)}, "weight_NK has another shape than index_NK"),
        ({"score_NE": torch.ones(3, 3)}, "score_NE has another number of items"),
    ],
)
def test_malformed_routings(broken, message):
    with pytest.raises(AssertionError, match=message):
        check_routing(routing(**broken))


# -- parts of a router, each broken in one way


class HalfScore(LinearScore):
    """Computes in the autocast dtype."""

    def project(self, x_ND, context):
        return F.linear(x_ND, self.weight)


class BatchScore(LinearScore):
    """Looks at the whole batch."""

    def project(self, x_ND, context):
        return super().project(x_ND.cumsum(0), context)


class BiasedScore(LinearScore):
    """Has parameters it does not tell of."""

    def __init__(self, config, dim, num_destinations, *, generator=None):
        super().__init__(config, dim, num_destinations, generator=generator)
        self.bias = nn.Parameter(torch.zeros(num_destinations))


class SilentState(LinearScore):
    """Hands on its logits and does not say so."""

    def project(self, x_ND, context):
        context.carry["logits"] = super().project(x_ND, context)
        return context.carry["logits"]


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (SilentState, "but hands_on is False"),
        (HalfScore, "autocast"),
        (BatchScore, "permuted items"),
        (BiasedScore, "num_parameters says 128, there are 136"),
    ],
)
def test_broken_scores(score, message):
    with pytest.raises(AssertionError, match=message):
        check_score(score.Config())


class ForgetfulTopK(TopK):
    """Takes closed destinations when it runs out of open ones."""

    def choose(self, value_NE):
        return value_NE.topk(self.config.top_k).indices


class FirstCome(Select):
    """The first item takes another destination than the rest."""

    def choose(self, value_NE):
        index_N1 = value_NE.argmax(-1, keepdim=True)
        index_N1 = index_N1.masked_fill(value_NE.amax(-1, keepdim=True) == -torch.inf, -1)
        index_N1[:1] = value_NE[:1].argmin(-1, keepdim=True)
        return index_N1


class OneChoiceMore(TopK):
    """Has a place more than it says."""

    def choose(self, value_NE):
        return F.pad(super().choose(value_NE), (0, 1), value=-1)


class SaysNothing(TopK):
    """Makes as many choices as it makes, and its config does not say so."""

    @configclass
    class Config(TopK.Config):
        def most_choices(self, num_destinations):
            return None

    num_choices = 2


class NotAlwaysTwo(TopK):
    """Says that every item goes to exactly two, and leaves out the second of some."""

    def choose(self, value_NE):
        index_NK = super().choose(value_NE)
        return index_NK.masked_fill((index_NK == 3) & (torch.arange(index_NK.shape[1]) > 0), -1)


@pytest.mark.parametrize(
    ("select", "message"),
    [
        (SaysNothing, "the config's most_choices is None, but num_choices is 2"),
        (NotAlwaysTwo, r"exact_choices is 2, but items use \[1, 2\] choices"),
        (OneChoiceMore, "num_choices is 2, but there are 3"),
        (ForgetfulTopK, "a closed destination was chosen"),
        (FirstCome, "permuting items does not permute choices"),
    ],
)
def test_broken_selectors(select, message):
    with pytest.raises(AssertionError, match=message):
        check_select(select.Config())


class CountsClosed(Balancer):
    """Looks at closed destinations."""

    def forward(self, seen, context):
        context.emit_loss("all", seen.logit_NE.square().sum())


class Vector(Balancer):
    """Emits one loss per destination."""

    def forward(self, seen, context):
        context.emit_loss("vector", seen.logit_NE.sum(0))


class NanWhenEmpty(Balancer):
    """Divides by the number of items."""

    def forward(self, seen, context):
        probability_NE, mask_N = seen.probability_NE(), context.item_mask_N
        real_NE = probability_NE if mask_N is None else probability_NE[mask_N]
        context.emit_loss("mean", real_NE.square().mean())


class LearnedBias(Balancer):
    """Its bias has a gradient."""

    def __init__(self, config, num_destinations):
        super().__init__(config, num_destinations)
        self.weight = nn.Parameter(torch.zeros(num_destinations))

    @property
    def bias_E(self):
        return self.weight

    def forward(self, seen, context):
        pass


@pytest.mark.parametrize(
    ("balancer", "message"),
    [
        (CountsClosed, "a closed destination has a gradient"),
        (Vector, "not one finite number"),
        (NanWhenEmpty, "loss mean is"),
        (LearnedBias, "must be fp32 and without gradient"),
    ],
)
def test_broken_balancers(balancer, message):
    with pytest.raises(AssertionError, match=message):
        check_balancer(balancer.Config())


class RoutesPadding(Router):
    """Forgets the item mask."""

    def forward(self, x_ND, context):
        mask_N, context.item_mask_N = context.item_mask_N, None
        result = super().forward(x_ND, context)
        context.item_mask_N = mask_N
        return result


class AlwaysTraining(Router):
    """Lets its balancers watch in evaluation too."""

    def forward(self, x_ND, context):
        context.training = True
        return super().forward(x_ND, context)


class Stubborn(Router):
    """Asks nobody what overrides it."""

    def forward(self, x_ND, context):
        return self.decide(x_ND, context)


class NotForced(Router):
    """Hears of biases and closed destinations alone."""

    def decide(self, x_ND, context, overrides=()):
        return super().decide(x_ND, context, [one for one in overrides if one.index_NK is None])


class LearnsFromOthers(Router):
    """Shows its balancers everything."""

    def decide(self, x_ND, context, overrides=()):
        return super().decide(x_ND, context, [replace(one, learn=True) for one in overrides])


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (RoutesPadding, "a padding item is routed"),
        (AlwaysTraining, "a balancer emits outside training"),
        (Stubborn, "a balancer sees overridden decisions"),
        (NotForced, "a balancer sees overridden decisions"),
        (LearnsFromOthers, "a balancer sees overridden decisions"),
    ],
)
def test_broken_routers(router, message):
    with pytest.raises(AssertionError, match=message):
        check_router(router.Config(balance=(SwitchLoss.Config(),)).build(6, 8), dim=6)


class LeakyPool(ExpertPool):
    """Every expert gets a little of every item."""

    def forward(self, x_ND, routing, *, weight_on="output"):
        return super().forward(x_ND, routing, weight_on=weight_on) + 1e-2 * self.w2.sum()


@pytest.mark.parametrize(
    ("router", "message"),
    [(Stubborn, "a destination that an override closes was chosen"), (NotForced, "a forced destination was not taken")],
)
def test_routers_that_are_not_overridden(router, message):
    with pytest.raises(AssertionError, match=message):
        check_router(router.Config(balance=()).build(6, 8), dim=6)


def test_a_broken_pool():
    with pytest.raises(AssertionError, match="the output differ"):
        check_pool(LeakyPool(4, 8, 6, init_std=0.5))


# -- feed-forward designs, each broken in one way


class Broken(SwiGLU):
    """A base for the broken ones, small."""

    @configclass
    class Config(SwiGLU.Config):
        """A small layer."""

        hidden_dim: int = Field(default=16, ge=1)


class Miscounted(Broken, kind="miscounted"):
    """Its count forgets a projection."""

    @configclass
    class Config(Broken.Config):
        """A wrong count."""

        def count(self, context):
            return Count.dense(2 * context.dim * self.hidden_dim)


class Leaky(Broken, kind="leaky"):
    """Each token sees the mean of its whole sequence."""

    def forward(self, x_BLD, context):
        return super().forward(x_BLD + x_BLD.mean(1, keepdim=True), context)


class AcrossBatch(Broken, kind="acrossbatch"):
    """Each sequence sees the one before it in the batch."""

    def forward(self, x_BLD, context):
        return super().forward(x_BLD + x_BLD.roll(1, 0), context)


class NoGradient(Broken, kind="nogradient"):
    """Detaches its output."""

    def forward(self, x_BLD, context):
        return super().forward(x_BLD, context).detach()


class Unseeded(Broken, kind="unseeded"):
    """Draws weights from the global generator."""

    def __init__(self, config, context):
        super().__init__(config, context)
        nn.init.normal_(self.w2.weight, std=0.02)


class Stateful(Broken, kind="stateful"):
    """Keeps a running mean of what it saw, so that calls depend on earlier ones."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.register_buffer("mean_D", torch.zeros(context.dim))

    def forward(self, x_BLD, context):
        if x_BLD.numel():
            self.mean_D.lerp_(x_BLD.detach().mean((0, 1)), 0.1)
        return super().forward(x_BLD - self.mean_D, context)


class NotSaved(Broken, kind="notsaved"):
    """Has a scale that is in no state dict and no copy of the seed."""

    def __init__(self, config, context):
        super().__init__(config, context)
        set_unregistered(self, "scale_D", torch.randn(context.dim, generator=context.generator))

    def forward(self, x_BLD, context):
        return super().forward(x_BLD * self.scale_D, context)


class GraphBreak(Broken, kind="graphbreak"):
    """Asks for a number in the middle of the computation."""

    def forward(self, x_BLD, context):
        if x_BLD.sum().item() > 1e9:
            x_BLD = x_BLD / 2
        return super().forward(x_BLD, context)


class BrokenMoE(MoE):
    """A base for broken mixtures, small."""

    @configclass
    class Config(MoE.Config):
        """A small layer."""

        num_experts: Repeats = Field(default=6, ge=1)
        hidden_dim: Size = Field(default=16, ge=1)


class AsksTwice(BrokenMoE, kind="askstwice"):
    """Asks its router's score beside the router."""

    def run(self, router, x_BLD, context):
        logit_NE = router.score.project(x_BLD.flatten(0, -2), context)
        return super().run(router, x_BLD, context) * logit_NE.logsumexp(-1).view(x_BLD.shape[:-1]).unsqueeze(-1)


class Undecided(BrokenMoE, kind="undecided"):
    """Works with more of a decision than destinations and weights."""

    def run(self, router, x_BLD, context):
        x_ND = x_BLD.flatten(0, -2)
        routing = router(x_ND, context)
        y_ND = self.experts(x_ND, routing, context=context) * routing.score_NE.square().sum(-1, keepdim=True)
        return y_ND.view_as(x_BLD)


@pytest.fixture
def registered(monkeypatch):
    """What a package does with entry points: without a name a design cannot be read back from a checkpoint."""
    for design in (*Broken.__subclasses__(), *BrokenMoE.__subclasses__()):
        monkeypatch.setitem(BUILTIN["feed_forward"], design.kind, f"{__name__}:{design.__name__}")
    for design in (SaysNone, PassesNone, FreezesItself):
        monkeypatch.setitem(BUILTIN["block"], design.kind, f"{__name__}:{design.__name__}")
    yield
    resolve.cache_clear()


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("design", "message"),
    [
        (Miscounted, r"count\(\) says \d+ parameters, there are \d+"),
        (Leaky, "a prefix"),
        (AcrossBatch, "differ"),
        (NoGradient, "gets no gradient"),
        (Unseeded, "built twice from one seed: .*w2.weight differs"),
        (Stateful, "two evaluations differ"),
        (NotSaved, "in a model loaded from a state dict, the gradient of"),
    ],
)
def test_broken_feed_forwards(design, message):
    with pytest.raises(AssertionError, match=message):
        check_feed_forward(design.Config(), num_layers=2, compile_backend="eager")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("design", "message"),
    [(AsksTwice, "a router runs though all is replayed"), (Undecided, "a replayed trace gives other logits")],
)
def test_mixtures_that_cannot_be_replayed(design, message):
    with pytest.raises(AssertionError, match=message):
        check_feed_forward(design.Config(), num_layers=2, compile_backend="eager")


@pytest.mark.usefixtures("registered")
def test_a_graph_break_is_found():
    with pytest.raises(AssertionError, match="does not compile into one graph"):
        check_feed_forward(GraphBreak.Config(), num_layers=1, compile_backend="eager")


def test_a_design_without_a_registered_name_is_told():
    with pytest.raises(ConfigError, match="needs a kind of feed_forward"):
        check_feed_forward(Broken.Config())


def test_a_feed_forward_without_count_is_told():
    class Uncounted(FeedForward):
        """No count."""

    with pytest.raises(NotImplementedError):
        check_feed_forward(Uncounted.Config())


# -- blocks that say wrongly whether gradients go through them


class SaysNone(PreNorm, kind="saysnone"):
    """Says that gradients stop, and they do not."""

    @configclass
    class Config(PreNorm.Config):
        """What is not so."""

        passes_gradient: ClassVar[bool] = False


class PassesNone(PreNorm, kind="passesnone"):
    """Stops gradients, and does not say so."""

    def forward(self, x_BLD, context):
        return super().forward(x_BLD.detach(), context)


class FreezesItself(SaysNone, kind="freezesitself"):
    """Stops gradients at its end, so that they do not reach its own parameters either."""

    def forward(self, x_BLD, context):
        return super().forward(x_BLD, context).detach()


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("design", "message"),
    [
        (SaysNone, "embedding.weight gets a gradient, through a block that says it passes none"),
        (PassesNone, "embedding.weight gets no gradient"),
        (FreezesItself, r"blocks\.0\..* gets no gradient"),
    ],
)
def test_broken_blocks(design, message):
    with pytest.raises(AssertionError, match=f"^{message}"):
        check_block(design.Config(), compile_backend="eager")
