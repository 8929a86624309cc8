"""A select of one's own, whose fields have other names than ours: what it says of its choices is what layers go by."""

import pytest
import torch

from anabranch.config import Field, configclass
from anabranch.errors import ConfigError
from anabranch.experts.rexmoe import ProgressiveScaling, ReXMoE
from anabranch.experts.versatile import VersatileFFN
from anabranch.lm import Decoder, upcycle
from anabranch.nn import MoE, SwiGLU
from anabranch.routing import UNUSED, Router, Select, TopK
from anabranch.testing import check_select


class Best(Select, kind="best_of_the_test"):
    """`TopK` with a field of another name."""

    @configclass
    class Config(Select.Config):
        k: int = Field(default=2, ge=1)

        @property
        def exact_choices(self):
            return self.k

    def choose(self, value_NE):
        best_NK, index_NK = value_NE.topk(self.config.k, -1)
        return index_NK.masked_fill(best_NK == -torch.inf, UNUSED)


class UpTo(Best, kind="up_to_of_the_test"):
    """As `Best`, only of those with a share over a tenth."""

    @configclass
    class Config(Best.Config):
        exact_choices = None

        def most_choices(self, num_destinations):
            return self.k

    def choose(self, value_NE):
        index_NK = super().choose(value_NE)
        return index_NK.masked_fill((index_NK >= 0) & (value_NE.gather(1, index_NK.clamp_min(0)) < 0.1), UNUSED)


def decoder(select, kind=MoE, **fields):
    layer = kind.Config(**{"num_experts": 8, "hidden_dim": 32, "router": Router.Config(select=select), **fields})
    return Decoder.Config(vocab_size=16, dim=16, num_layers=2, feed_forward=layer)


@pytest.mark.parametrize("config", [Best.Config(k=3), UpTo.Config(k=3)])
def test_it_meets_the_contract(config):
    check_select(config)


@pytest.mark.parametrize("make", [Best.Config, UpTo.Config])
@pytest.mark.parametrize("kind", [MoE, VersatileFFN])
def test_active_parameters_are_those_of_its_choices(make, kind):
    for k in (1, 3):
        assert decoder(make(k=k), kind).count() == decoder(TopK.Config(top_k=k), kind).count()
    assert decoder(make(k=1)).count().active < decoder(make(k=3)).count().active


def test_as_many_slots_stay_open_as_it_takes():
    model = decoder(Best.Config(k=4), ReXMoE, num_experts=4, reuse=2, psr=ProgressiveScaling.Config()).build()
    assert model.blocks[0].feed_forward.router.candidates.min_open == 4


def test_more_than_there_are_experts_is_refused():
    with pytest.raises(
        ConfigError, match=r"router.select takes 9 experts of a token, but num_experts is 4; use 1 to 4"
    ):
        decoder(Best.Config(k=9), num_experts=4)
    with pytest.raises(ConfigError, match="choices of select 'up_to_of_the_test' is 9, but there are 4 destinations"):
        decoder(UpTo.Config(k=9), num_experts=4).build()


def test_upcycling_goes_by_its_choices():
    dense = Decoder.Config(vocab_size=16, dim=16, num_layers=1, feed_forward=SwiGLU.Config(hidden_dim=64)).build()
    layers = [
        MoE.Config(num_experts=8, hidden_dim=32, router=Router.Config(select=select))
        for select in (Best.Config(k=2), TopK.Config(top_k=2))
    ]
    ours, theirs = (upcycle(dense, layer, seed=0) for layer in layers)
    assert all(torch.equal(one, ours.state_dict()[name]) for name, one in theirs.state_dict().items())
    with pytest.raises(ConfigError, match=r"takes is 3; .*multiple of 2"):
        upcycle(dense, layers[0].replace(router=Router.Config(select=Best.Config(k=3))))


def test_a_select_that_says_nothing_has_its_field_top_k_looked_at_for_one_more_version():
    class Old(Select):
        @configclass
        class Config(Select.Config):
            top_k: int = 3

    with pytest.warns(DeprecationWarning, match="does not say how many choices it makes"):
        assert Old.Config().most_choices(8) == 3
