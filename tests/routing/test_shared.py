"""Scores that share modules: they alone are asked to join a model, in order, and what they share counts once."""

import pytest
from torch import nn

from anabranch.experts.rmoe import RecurrentScore
from anabranch.routing import CosineScore, LinearScore, Router, Score
from anabranch.routing.hash_score import HashScore
from anabranch.routing.shared import CountsShared, SharesModules, join_model, shared_parameters


class Lent(LinearScore, kind="lent"):
    """A linear score with one bias for all layers."""

    def join(self, share, layer):
        self.layer = layer
        self.lent = [share("bias", lambda: nn.Linear(1, 1))]


def test_scores_stand_alone_unless_they_declare_it():
    assert not hasattr(Score, "join")
    assert not hasattr(Score.Config, "num_shared")
    for config in (LinearScore.Config(), CosineScore.Config(), HashScore.Config()):
        assert not isinstance(config.build(6, 4), SharesModules)
        assert shared_parameters(config, 6) == 0


def test_a_score_that_declares_it_joins_each_in_order():
    asked, kept = [], {}

    def share(name, make):
        asked.append(name)
        return kept.setdefault(name, make())

    routers = [
        Router.Config(score=config).build(6, 4, layer=layer, share=share)
        for layer, config in enumerate((Lent.Config(), LinearScore.Config(), Lent.Config()))
    ]
    assert asked == ["bias", "bias"]
    assert [routers[place].score.layer for place in (0, 2)] == [0, 2]
    assert routers[0].score.lent[0] is routers[2].score.lent[0]
    assert not hasattr(Router.Config(score=Lent.Config()).build(6, 4).score, "lent")


def test_the_recurrent_score_declares_both():
    config = RecurrentScore.Config(state_dim=4)
    score = config.build(6, 4)
    assert isinstance(score, SharesModules)
    assert isinstance(config, CountsShared)
    cell = sum(parameter.numel() for parameter in score.recurrence.parameters())
    assert shared_parameters(config, 6) == cell == config.num_cell()
    join_model(score, lambda name, make: make(), 3)
    assert score.layer == 3


@pytest.mark.parametrize("shared_projector", [False, True])
def test_a_shared_projector_is_shared_too(shared_projector):
    config = RecurrentScore.Config(state_dim=4, shared_projector=shared_projector)
    assert shared_parameters(config, 6) == config.num_cell() + 4 * 6 * shared_projector
