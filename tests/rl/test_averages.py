"""Running averages by hand and against all numbers at once; and what they do to a policy, its rollouts, its checkpoint and its judge."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing.spawn import spawn

from anabranch.errors import CheckpointError, ConfigError, DataError
from anabranch.rl import PPO, Actions, ActorCritic, Layout, judge, load_agent
from anabranch.rl.averages import Averages
from anabranch.testing import check_task
from anabranch.train import Trainer, checkpoints
from rl_worlds import Corridor, run, train_rank
from rl_worlds import rollouts as made_rollouts

NORMALIZED = {"normalize_observations": True, "normalize_rewards": True}


def rollouts(**fields):
    return made_rollouts(**NORMALIZED | fields)


# The numbers


def test_by_hand():
    # 1 and 3: mean 2, variance 1. Then 5: mean 3, variance (4 + 0 + 4) / 3.
    found = Averages(1, clip=10.0)
    assert found(torch.tensor([[3.0]])).item() == pytest.approx(3.0)
    found.take_in(torch.tensor([[1.0], [3.0]]), 0)
    assert found(torch.tensor([[4.0]])).item() == pytest.approx(2.0)
    found.take_in(torch.tensor([[5.0]]), 1)
    assert (found.mean_D.item(), found.variance_D.item()) == (pytest.approx(3.0), pytest.approx(8 / 3))
    assert found(torch.tensor([[3.0 + (8 / 3) ** 0.5]])).item() == pytest.approx(1.0)
    # A reward keeps its sign, whatever the mean.
    assert found.scaled(torch.tensor([1.0])).item() == pytest.approx((3 / 8) ** 0.5)


@given(
    st.lists(
        st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=6).map(
            lambda values: [[v, 2 * v] for v in values]
        ),
        min_size=1,
        max_size=5,
    )
)
def test_parts_come_to_what_all_of_it_does(parts):
    found = Averages(2, clip=10.0)
    for number, part in enumerate(parts):
        found.take_in(torch.tensor(part), number)
    whole = torch.tensor([row for part in parts for row in part], dtype=torch.float64)
    torch.testing.assert_close(found.mean_D, whole.mean(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.variance_D, whole.var(0, correction=0), rtol=1e-9, atol=1e-6)


def test_a_rollout_counts_once_and_what_is_far_off_is_cut_off():
    found = Averages(1, clip=2.0)
    for _ in range(2):
        found.take_in(torch.tensor([[0.0], [2.0]]), 0)
    assert (found.count.item(), found.rollouts.item()) == (2, 1)
    assert found(torch.tensor([[50.0], [-50.0]])).flatten().tolist() == [2.0, -2.0]
    assert found.scaled(torch.tensor([50.0, -50.0])).tolist() == [2.0, -2.0]
    # What never changes has no deviation to be divided by.
    same = Averages(1, clip=10.0)
    same.take_in(torch.ones(5, 1), 0)
    assert same(torch.ones(1, 1)).item() == 0


# In a policy


def test_a_picture_is_left_as_it_is():
    layout = Layout(2 + 27, 1, Actions(2), (3, 3, 3))
    torch.manual_seed(0)
    model = ActorCritic(layout, hidden=(4,), normalized_clip=10.0)
    seen_BD = torch.rand(9, 30) * 7
    model.take_in(seen_BD, 0)
    scaled_BD = model._scaled(seen_BD)
    assert torch.equal(scaled_BD[:, 2:29], seen_BD[:, 2:29])
    rest = torch.cat([seen_BD[:, :2], seen_BD[:, 29:]], 1)
    expected = (rest - rest.mean(0)) / rest.std(0, correction=0)
    torch.testing.assert_close(torch.cat([scaled_BD[:, :2], scaled_BD[:, 29:]], 1), expected, rtol=1e-4, atol=1e-5)


def test_they_move_between_rollouts_alone():
    """The first rollout is taken in before anything is learned; a later one when the next begins."""
    stream = rollouts(epochs=1)
    averages = stream.model.averages
    seen = []
    for _ in range(3):
        for _ in range(4):
            stream.next_batch(8)
            seen.append(averages.count.item())
    assert seen == [32] * 4 + [32] * 4 + [64] * 4
    # A policy is the one that acted until it learns, but for the first rollout.
    parameter_BP, value_B = stream.model(stream.rollout.samples.observation_BD)
    assert torch.equal(parameter_BP, stream.rollout.samples.parameter_BP)
    assert torch.equal(value_B, stream.rollout.samples.value_B)


def test_rewards_are_divided_by_the_deviation_of_discounted_returns():
    """Walked again by hand: the discounted sum begins anew with an episode, and goes on over rollouts."""
    stream = rollouts(epochs=1, gae_lambda=0.0, gamma=0.5, normalize_advantage="none", num_envs=2, rollout_steps=16)
    plain = rollouts(
        epochs=1,
        gae_lambda=0.0,
        gamma=0.5,
        normalize_advantage="none",
        num_envs=2,
        rollout_steps=16,
        normalize_rewards=False,
    )
    world = stream.actor.environment.make(2, seed=3)
    world.reset()
    discounted, all_of_it = np.zeros(2), []
    for _ in range(2):
        for each in (stream, plain):
            with torch.no_grad():
                each.model.critic[-1].weight.zero_()
                each.model.critic[-1].bias.zero_()
            for _ in range(4):
                each.next_batch(8)
        assert torch.equal(stream.rollout.samples.action_BA, plain.rollout.samples.action_BA)
        for action_N in stream.rollout.samples.action_BA.view(16, 2).numpy():
            _, reward, over, cut, _ = world.step(action_N)
            discounted = 0.5 * discounted + reward
            all_of_it += discounted.tolist()
            discounted[over | cut] = 0
        # With a critic of 0 and lambda 0, an advantage is the reward.
        expected = plain.rollout.samples.advantage_B / np.std(all_of_it)
        torch.testing.assert_close(stream.rollout.samples.advantage_B, expected.float(), rtol=1e-4, atol=1e-6)
        assert stream.rollout.mean_return == plain.rollout.mean_return


def test_a_judge_leaves_them_as_they_are_and_an_agent_has_them(tmp_path):
    made = run(**NORMALIZED)
    trainer = Trainer(made, tmp_path / "run")
    trainer.fit()
    agent = load_agent(tmp_path / "run")
    before = {name: value.clone() for name, value in agent.model.state_dict().items()}
    assert before["averages.count"] == 32
    judge(agent.model, agent.task.environment, episodes=5)
    for name, value in agent.model.state_dict().items():
        assert torch.equal(value, before[name]), name
        assert torch.equal(value, trainer.model.state_dict()[name]), name


def test_a_rollout_goes_on_where_it_was(tmp_path):
    """In the midst of the third: observations, returns and sums under way are those of one that went on."""
    kept = rollouts()
    for _ in range(19):
        kept.next_batch(8)
    kept.save(tmp_path)
    state = json.loads(json.dumps(kept.state_dict()))
    other = rollouts()
    other.load(tmp_path)
    other.load_state_dict(state)
    other.model.load_state_dict(kept.model.state_dict())
    for _ in range(20):
        mine, theirs = kept.next_batch(8), other.next_batch(8)
        for name, tensor in mine._asdict().items():
            assert torch.equal(getattr(theirs, name), tensor), name
    # One of a run without them has none to go on with.
    without = rollouts(normalize_rewards=False)
    without.next_batch(8)
    without.save(tmp_path)
    with pytest.raises(CheckpointError, match="cannot read"):
        rollouts().load(tmp_path)


def test_a_rollout_that_failed_is_not_counted_twice(tmp_path):
    """The environment fails in the second rollout; what is saved then, and resumed, has the first in it once."""
    bad = run(
        **NORMALIZED, steps=16, train={"checkpoint_every": None}, environment=Corridor.Config(bad=3), rollout_steps=2
    )
    for resume in (False, True):
        with pytest.raises(DataError, match="environment 3 gave the reward nan"):
            Trainer(bad, tmp_path / "run", resume=resume).fit()
    trainer = Trainer(bad, tmp_path / "run", resume=True)
    assert trainer.model.averages.count == 8
    assert trainer.stream.actor.returns.count == 8
    trainer.close()


def test_contract():
    check_task(run(**NORMALIZED, target_kl=1e-4), ranks=False)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    check_task(run(**NORMALIZED, target_kl=1e-4))


@pytest.mark.slow
def test_all_processes_have_the_same_averages(tmp_path):
    made = run(**NORMALIZED, steps=24, train={"parallel": "ddp", "eval_every": None, "device": "cpu"})
    spawn(train_rank, args=(made, str(tmp_path), 2), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt")["weights"] for rank in range(2))
    alone = Trainer(made.replace(train=made.train.replace(parallel="none")), tmp_path / "alone")
    alone.fit()
    for name, value in alone.model.averages.state_dict().items():
        assert torch.equal(first[f"averages.{name}"], second[f"averages.{name}"])
        torch.testing.assert_close(first[f"averages.{name}"], value, rtol=1e-6, atol=1e-9)
    assert checkpoints(tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"normalize_rewards": True, "reward_scale": 0.1}, "reward_scale is 0.1, and normalize_rewards divides"),
        ({"normalized_clip": 0.0}, "normalized_clip"),
    ],
)
def test_what_says_the_same_twice_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        PPO.Config(**fields)


def test_two_scales_of_observations_are_refused():
    made = run(normalize_observations=True, observation_scale=(1.0, 1.0, 1.0))
    with pytest.raises(ConfigError, match="leave one of them out"):
        made.task.build().network()
