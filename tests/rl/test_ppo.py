"""PPO's loss by hand and by finite differences, rollouts by hand, and the contract of tasks: resumed to the bit, shared by processes."""

import json
import math

import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import spawn

from anabranch.errors import CapacityError, CheckpointError, ConfigError, DataError
from anabranch.rl import (
    Actions,
    ActorCritic,
    Categorical,
    Layout,
    Samples,
    clipped_losses,
    evaluation,
    judge,
)
from anabranch.rl.evaluation import evaluation_seed
from anabranch.rl.preemption import Stragglers
from anabranch.rl.rollout import normalised
from anabranch.testing import check_task
from anabranch.train import Trainer, checkpoints, read_metrics
from rl_worlds import LIMIT, Corridor, rollouts, run, train_rank


def samples(**changes):
    """One sample whose ratio is decided by the policy that is asked."""
    made = {
        "observation_BD": torch.zeros(1, 2),
        "action_BA": torch.zeros(1, 1),
        "parameter_BP": torch.zeros(1, 2),
        "log_prob_B": torch.tensor([math.log(0.5)]),
        "value_B": torch.tensor([0.0]),
        "advantage_B": torch.tensor([2.0]),
        "return_B": torch.tensor([1.0]),
    }
    return Samples(**(made | {name: torch.as_tensor(value) for name, value in changes.items()}))


def policy(probability):
    """Does 0 with this probability."""
    return Categorical(torch.tensor([[math.log(probability), math.log(1 - probability)]]))


# The loss


@pytest.mark.parametrize(
    ("probability", "advantage", "loss", "clipped"),
    [
        (0.55, 2.0, -2.2, 0),  # ratio 1.1: -1.1 * 2
        (0.75, 2.0, -2.4, 1),  # ratio 1.5, better only up to 1.2
        (0.75, -2.0, 3.0, 1),  # and a bad action counts whole
        (0.25, 2.0, -1.0, 1),  # ratio 0.5 of a good action counts whole
        (0.25, -2.0, 1.6, 1),  # of a bad one only down to 0.8
    ],
)
def test_the_clipped_surrogate_by_hand(probability, advantage, loss, clipped):
    found = clipped_losses(
        policy(probability),
        policy(0.5),
        torch.tensor([0.0]),
        samples(advantage_B=[advantage]),
        clip=0.2,
        value_clip=None,
    )
    assert found.policy.item() == pytest.approx(loss, abs=1e-5)
    assert found.ratio_clipped.item() == clipped
    ratio = probability / 0.5
    assert found.approximate_divergence.item() == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-5)
    expected = 0.5 * math.log(0.5 / probability) + 0.5 * math.log(0.5 / (1 - probability))
    assert found.divergence.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("value", "value_clip", "loss"),
    [
        (0.5, None, 0.125),  # (0.5 - 1)^2 / 2
        (0.5, 0.1, 0.405),  # moved by 0.1 at most, so the error stays 0.9
        (0.05, 0.1, 0.45125),  # within the clip: 0.95^2 / 2
        (3.0, 0.1, 2.0),  # (3 - 1)^2 / 2 is the larger one
    ],
)
def test_the_clipped_value_by_hand(value, value_clip, loss):
    found = clipped_losses(policy(0.5), policy(0.5), torch.tensor([value]), samples(), clip=0.2, value_clip=value_clip)
    assert found.value.item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("kind", ["categorical", "normal", "beta"])
def test_gradients_by_finite_differences(kind):
    actions = Actions(3) if kind == "categorical" else Actions(0, (-1.0,), (1.0,))
    torch.manual_seed(0)
    model = ActorCritic(Layout(2, 1, actions), hidden=(4,), policy=kind).double()
    observation_BD = torch.randn(6, 3, dtype=torch.float64)
    with torch.no_grad():
        parameter_BP, value_B = model(observation_BD)
        old = model.kind.distribution(parameter_BP + 0.3 * torch.randn_like(parameter_BP))
        action_BA = old.mode() if kind != "categorical" else torch.tensor([[0.0], [1], [2], [0], [1], [2]]).double()
        batch = Samples(
            observation_BD,
            action_BA,
            parameter_BP,
            old.log_prob(action_BA),
            value_B + 0.3,
            torch.randn(6, dtype=torch.float64),
            torch.randn(6, dtype=torch.float64),
        )

    def loss(*weights):
        names = [name for name, _ in model.named_parameters()]
        parameter_BP, value_B = torch.func.functional_call(
            model, dict(zip(names, weights, strict=True)), (observation_BD,)
        )
        parts = clipped_losses(model.kind.distribution(parameter_BP), old, value_B, batch, clip=0.2, value_clip=0.2)
        return parts.policy + 0.5 * parts.value - 0.01 * parts.entropy

    assert torch.autograd.gradcheck(loss, tuple(model.parameters()), atol=1e-5)


def test_advantages_are_normalised_by_hand():
    # Mean 2, deviation sqrt(((-1)^2 + 0 + 1) / 2) = 1.
    torch.testing.assert_close(normalised(torch.tensor([1.0, 2.0, 3.0])), torch.tensor([-1.0, 0.0, 1.0]))
    with pytest.raises(ConfigError, match="a mini-batch of 1 has no deviation"):
        normalised(torch.tensor([1.0]))


# Networks


def test_the_policy_sees_less_than_the_critic():
    torch.manual_seed(0)
    model = ActorCritic(Layout(2, 1, Actions(2)), hidden=(8,))
    seen = torch.randn(5, 3)
    other = seen.clone()
    other[:, 2] += 1.0
    assert torch.equal(model(seen, "policy"), model(other, "policy"))
    assert not torch.equal(model(seen, "value"), model(other, "value"))
    parameter_BP, value_B = model(seen)
    assert torch.equal(parameter_BP, model(seen, "policy"))
    assert torch.equal(value_B, model(seen, "value"))


def test_at_first_all_actions_are_about_as_likely():
    torch.manual_seed(0)
    model = ActorCritic(Layout(4, 0, Actions(5)))
    share_BE = model(torch.randn(32, 4), "policy").softmax(-1)
    assert (share_BE - 0.2).abs().max() < 0.01
    weight = model.policy[0].weight
    torch.testing.assert_close(weight.T @ weight, 2 * torch.eye(4))


def test_observations_are_divided_by_their_scale():
    torch.manual_seed(0)
    plain = ActorCritic(Layout(2, 0, Actions(2)), hidden=(4,))
    torch.manual_seed(0)
    scaled = ActorCritic(Layout(2, 0, Actions(2)), hidden=(4,), scale=(1.0, 8.0))
    assert torch.equal(plain(torch.tensor([[3.0, 1.0]]))[0], scaled(torch.tensor([[3.0, 8.0]]))[0])
    with pytest.raises(ConfigError, match="observation_scale has 1 numbers; use 2 above 0"):
        ActorCritic(Layout(2, 0, Actions(2)), scale=(1.0,))


# Rollouts


def test_a_rollout_is_what_happened():
    """Walked again by hand from the actions: rewards, ends, values of last observations, and the mean return."""
    stream = rollouts(epochs=1)
    stream.next_batch(8)
    found = stream.rollout
    world = stream.actor.environment.make(4, seed=3)
    observations, _ = world.reset()
    action_TN = found.samples.action_BA.view(8, 4)
    returns, ended = np.zeros(4), []
    for step in range(8):
        flat = np.concatenate([observations["policy"], observations["critic"]], 1)
        assert np.array_equal(found.samples.observation_BD.view(8, 4, 3)[step].numpy(), flat)
        observations, reward, over, cut, _ = world.step(action_TN[step].numpy())
        returns += reward
        ended += list(returns[over | cut])
        returns[over | cut] = 0
    assert found.mean_return == pytest.approx(np.mean(ended))
    assert found.num_ended == len(ended) > 0
    parameter_BP, value_B = stream.model(found.samples.observation_BD)
    assert torch.equal(parameter_BP, found.samples.parameter_BP)
    assert torch.equal(value_B, found.samples.value_B)
    log_prob = stream.model.kind.distribution(parameter_BP).log_prob(found.samples.action_BA)
    assert torch.equal(log_prob, found.samples.log_prob_B)
    torch.testing.assert_close(found.samples.return_B, found.samples.advantage_B + value_B)


def test_a_truncated_episode_is_bootstrapped_and_a_terminated_one_is_not():
    """A critic that says 7 everywhere: with lambda 0, A = r + gamma 7 - 7 at every step but those that end for good."""
    stream = rollouts(epochs=1, rollout_steps=20, gae_lambda=0.0, gamma=0.5, batch_size=80, normalize_advantage="none")
    with torch.no_grad():
        stream.model.critic[-1].weight.zero_()
        stream.model.critic[-1].bias.fill_(7.0)
        # To the left, so that most episodes are cut off.
        stream.model.policy[-1].bias.copy_(torch.tensor([2.0, 0.0]))
    stream.next_batch(80)
    advantage = stream.rollout.samples.advantage_B
    values = {round(value, 4) for value in advantage.tolist()}
    assert values <= {round(-0.1 + 3.5 - 7, 4), round(1.0 - 7, 4)}
    without = rollouts(
        epochs=1,
        rollout_steps=20,
        gae_lambda=0.0,
        gamma=0.5,
        batch_size=80,
        normalize_advantage="none",
        bootstrap_truncated=False,
    )
    without.model = stream.model
    without.next_batch(80)
    changed = (without.rollout.samples.advantage_B - advantage).nonzero().numel()
    assert changed > 0
    assert {round(value, 4) for value in without.rollout.samples.advantage_B.tolist()} >= {round(-0.1 - 7, 4)}


def test_every_sample_comes_once_an_epoch_in_another_order():
    stream = rollouts(normalize_advantage="none")
    epochs = [torch.cat([stream.next_batch(8).advantage_B for _ in range(4)]) for _ in range(2)]
    whole = stream.rollout.samples.advantage_B
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, whole.sort().values)
    assert not torch.equal(*epochs)
    assert stream.rollout.number == 0
    stream.next_batch(8)
    assert stream.rollout.number == 1


def test_advantages_are_normalised_over_what_is_said():
    per_batch = rollouts(normalize_advantage="minibatch").next_batch(8).advantage_B
    assert per_batch.mean().item() == pytest.approx(0, abs=1e-6)
    assert per_batch.std().item() == pytest.approx(1, abs=1e-5)
    stream = rollouts(normalize_advantage="batch")
    whole = torch.cat([stream.next_batch(8).advantage_B for _ in range(4)])
    assert whole.std().item() == pytest.approx(1, abs=1e-5)


def test_micro_batches_together_are_the_mini_batch():
    whole, parts = rollouts(), rollouts()
    first = whole.next_batch(8)
    pieces = [parts.next_batch(4) for _ in range(2)]
    for name, tensor in first._asdict().items():
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), tensor), name


def test_rewards_are_scaled_in_learning_alone():
    plain, scaled = (rollouts(epochs=1, reward_scale=scale) for scale in (1.0, 10.0))
    for stream in (plain, scaled):
        with torch.no_grad():
            stream.model.critic[-1].weight.zero_()
        stream.next_batch(8)
    torch.testing.assert_close(scaled.rollout.samples.return_B, 10 * plain.rollout.samples.return_B)
    assert scaled.rollout.mean_return == plain.rollout.mean_return


def test_a_rollout_goes_on_where_it_was(tmp_path):
    """In the midst of the second rollout: what comes then is the same from memory and from a file."""
    kept = rollouts()
    for _ in range(11):
        kept.next_batch(8)
    kept.save(tmp_path)
    state = json.loads(json.dumps(kept.state_dict()))
    other = rollouts()
    other.load(tmp_path)
    other.load_state_dict(state)
    for _ in range(20):
        mine, theirs = kept.next_batch(8), other.next_batch(8)
        for name, tensor in mine._asdict().items():
            assert torch.equal(getattr(theirs, name), tensor), name
    assert kept.rollout.mean_return == other.rollout.mean_return


def test_a_rollout_that_does_not_fit_is_refused(tmp_path):
    stream = rollouts()
    with pytest.raises(DataError, match="the checkpoint is damaged"):
        stream.load_state_dict({"position": 8})
    stream.next_batch(8)
    stream.save(tmp_path)
    with pytest.raises(CheckpointError, match="has 32 samples, and a rollout 64"):
        rollouts(rollout_steps=16).load(tmp_path)
    (tmp_path / "rollout.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(CheckpointError, match="cannot read"):
        rollouts().load(tmp_path)


def test_a_reward_that_is_no_number_is_told_with_its_environment():
    stream = rollouts(environment=Corridor.Config(bad=2))
    with pytest.raises(DataError, match="environment 2 gave the reward nan"):
        stream.next_batch(8)
    assert stream.rollout is None


@pytest.mark.parametrize(("reward", "scale"), [(1e37, 1.0), (-1e30, 1.0), (1e14, 100.0)])
def test_a_reward_that_nothing_can_be_learned_from_is_told_with_its_environment(reward, scale):
    """A number all the same, and yet infinite where a critic's error is squared."""
    stream = rollouts(environment=Corridor.Config(bad=2, worst=reward), reward_scale=scale)
    with pytest.raises(DataError, match=r"environment 2 gave the reward .*1e\+15 is the most"):
        stream.next_batch(8)
    rollouts(environment=Corridor.Config(bad=2, worst=9.9e14)).next_batch(8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 7}, "train.batch_size is 7, which does not divide the 32 samples of a rollout"),
        ({"batch_size": 1}, "advantages of one sample cannot be normalised"),
        ({"policy": "beta"}, "use categorical"),
        ({"hidden": (100_000, 100_000)}, r"hidden is \[100000, 100000\], which takes 1e\+10 numbers"),
        ({"train": {"precision": "bfloat16"}}, "train.precision is 'bfloat16'"),
        ({"num_envs": 70_000}, "num_envs is 70000"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_at_once(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(run(**fields), tmp_path / "run")


def test_a_rollout_that_no_memory_holds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("anabranch.rl.rollout.room_bytes", lambda: 1000)
    with pytest.raises(CapacityError, match=r"a rollout of 4 environments x 8 steps takes 0\.0 GB, and there are 0\.0"):
        Trainer(run(), tmp_path / "run")


# The task


def test_contract():
    check_task(run(), ranks=False)


@pytest.mark.slow
def test_two_processes_learn_what_one_does():
    check_task(run())


def test_contract_of_vectors_in_micro_batches():
    beta = run(
        environment=Corridor.Config(is_vector=True), train={"accumulation": 2}, value_clip=0.2, entropy_weight=0.01
    )
    check_task(beta, ranks=False)
    check_task(beta.replace(task=beta.task.replace(policy="normal")), ranks=False)


def test_a_run_stopped_in_a_rollout_ends_as_one_that_was_not(tmp_path):
    """Stopped after 11 of 24 steps, in the midst of the second rollout's first epoch."""
    whole = run(steps=24, train={"log_every": 1, "checkpoint_every": 11, "keep_checkpoints": 9})
    straight = Trainer(whole, tmp_path / "straight").fit()

    class StopError(Exception):
        pass

    def stop(event):
        if event.kind == "checkpoint":
            raise StopError

    with pytest.raises(StopError):
        Trainer(whole, tmp_path / "cut", on_event=stop).fit()
    resumed = Trainer(whole, tmp_path / "cut", resume=True).fit()
    assert resumed.headline == straight.headline
    ours, theirs = (checkpoints(tmp_path / name)[-1] for name in ("cut", "straight"))
    for name in ("model.safetensors", "optimizer.safetensors", "rollout.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_a_bad_reward_saves_what_was_learned_and_is_resumed_from_there(tmp_path):
    """The second rollout fails: the checkpoint is of the last step of the first, and its world is where that ended."""
    bad = run(
        steps=16,
        train={"checkpoint_every": None, "log_every": 1},
        environment=Corridor.Config(bad=3),
        rollout_steps=2,
        batch_size=8,
    )
    with pytest.raises(DataError, match="environment 3 gave the reward nan"):
        Trainer(bad, tmp_path / "run").fit()
    saved = checkpoints(tmp_path / "run")
    assert [path.name for path in saved] == ["step-00000002"]
    trainer = Trainer(bad, tmp_path / "run", resume=True)
    assert trainer.stream.rollout.number == 0
    trainer.close()


def test_metrics_say_how_it_goes(tmp_path):
    Trainer(run(steps=16, train={"log_every": 8}), tmp_path / "run").fit()
    lines = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert [line["samples"] for line in lines] == [32, 64]
    for name in (
        "training_return",
        "training_length",
        "policy_entropy",
        "divergence",
        "ratio_clipped",
        "explained_variance",
    ):
        assert lines[-1][name] is not None, name


# Evaluation


def test_an_evaluation_has_its_own_beginnings_and_plays_each_once():
    task = run().task.build()
    torch.manual_seed(0)
    model = task.network()
    with torch.no_grad():
        model.policy[-1].bias.copy_(torch.tensor([0.0, 50.0]))
    found = judge(model, task.environment, episodes=70, seed=5)
    # 35 side by side, so that each plays two.
    world = task.environment.make(35, seed=evaluation_seed(5))
    world.reset()
    # Always to the right: from place p it takes 5 - p steps, each but the last at -0.1.
    lengths = 5 - world.place
    assert found.length_E[:35].tolist() == lengths.tolist()
    assert found.return_E[:35] == pytest.approx(1 - 0.1 * (lengths - 1))
    assert found.terminated_E.all()
    assert found.outcomes["arrived"].tolist() == [1.0] * 70
    # No more side by side than is said: 18 in three rounds of 6.
    few = judge(model, task.environment, episodes=18, seed=5, beside=7)
    world = task.environment.make(6, seed=evaluation_seed(5))
    world.reset()
    assert few.length_E[:6].tolist() == (5 - world.place).tolist()
    again = judge(model, task.environment, episodes=70, seed=5)
    assert again.return_E.tolist() == found.return_E.tolist()
    measures = found.measures()
    assert measures["episodes"] == 70
    assert measures["mean_return"] == pytest.approx(found.return_E.mean())
    assert measures["return_interval"] == pytest.approx(1.9949454 * found.return_E.std(ddof=1) / 70**0.5)


def test_intervals_of_outcomes_by_hand():
    """Mean 4 and deviation 2 of 2, 4, 6; what one episode alone tells has none."""
    outcomes = {"score": np.array([2.0, 4.0, 6.0]), "rare": np.array([np.nan, 1.0, np.nan])}
    found = evaluation.Episodes(np.zeros(3), np.ones(3, int), np.ones(3, bool), outcomes).intervals()
    # Student's t of two degrees of freedom.
    assert found["score"] == pytest.approx(4.302653 * 2 / 3**0.5)
    assert math.isnan(found["rare"])


def test_what_never_happened_may_happen():
    """None of 100: at 95 % fewer than 3 in a hundred, and not none at all; of 2 episodes nothing is known."""
    found = _told(finished=np.zeros(100), speed=np.zeros(100)).intervals()
    assert found["finished"] == pytest.approx(0.03)
    assert found["speed"] == 0
    assert _told(finished=np.ones(2)).intervals()["finished"] == 1


@pytest.mark.parametrize("told", [["infractions"], ["driven_km"], []])
def test_without_what_it_is_pooled_from_a_ratio_is_a_mean(told):
    """Environments of others tell what they like."""
    found = _told(infractions_per_km=np.array([1.0, 2.0, 6.0]), **dict.fromkeys(told, np.ones(3)))
    assert found.measures()["infractions_per_km"] == pytest.approx(3.0)
    assert found.intervals()["infractions_per_km"] > 0


def test_infractions_per_km_are_those_of_all_episodes_together():
    """One fault after 10 m and one in 1.99 km are 1 per km, and not 50 on average."""
    counted, driven = np.array([1.0, 1.0]), np.array([0.01, 1.99])
    found = _told(infractions=counted, driven_km=driven, infractions_per_km=counted / driven)
    assert found.measures()["infractions_per_km"] == pytest.approx(1.0)
    same = _told(infractions=np.full(4, 2.0), driven_km=np.full(4, 0.5), infractions_per_km=np.full(4, 4.0))
    assert same.measures()["infractions_per_km"] == pytest.approx(4.0)
    assert same.intervals()["infractions_per_km"] == pytest.approx(0.0)
    still = _told(infractions=np.zeros(2), driven_km=np.zeros(2), infractions_per_km=np.zeros(2))
    assert math.isnan(still.measures()["infractions_per_km"])


def _told(**outcomes):
    number = len(next(iter(outcomes.values())))
    return evaluation.Episodes(np.zeros(number), np.ones(number, int), np.ones(number, bool), outcomes)


def test_an_episode_that_is_cut_off_counts_as_such(tmp_path):
    task = run().task.build()
    torch.manual_seed(0)
    model = task.network()
    with torch.no_grad():
        model.policy[-1].bias.copy_(torch.tensor([50.0, 0.0]))
    found = judge(model, task.environment, episodes=3)
    assert found.length_E.tolist() == [LIMIT] * 3
    assert not found.terminated_E.any()
    found.write_csv(tmp_path / "e.csv")
    lines = (tmp_path / "e.csv").read_text().splitlines()
    assert lines[0] == "episode,return,length,terminated,arrived"
    assert [round(float(cell), 6) for cell in lines[1].split(",")] == [0, -0.9, 9, 0, 0]
    with pytest.raises(ConfigError, match="episodes is 0"):
        judge(model, task.environment, episodes=0)


def test_an_episode_without_an_end_is_told(monkeypatch):
    monkeypatch.setattr(evaluation, "LONGEST", 5)
    task = run().task.build()
    torch.manual_seed(0)
    model = task.network()
    with torch.no_grad():
        model.policy[-1].bias.copy_(torch.tensor([50.0, 0.0]))
    with pytest.raises(DataError, match=r"has not ended after 5 steps; give the environment a limit"):
        judge(model, task.environment, episodes=2)


def test_an_observation_that_is_no_number_is_told():
    stream = rollouts(environment=Corridor.Config(blind=1))
    with torch.no_grad():
        # To the left, so that no episode ends before.
        stream.model.policy[-1].bias.copy_(torch.tensor([50.0, 0.0]))
    with pytest.raises(DataError, match="environment 1 gave an observation that is no number, 2 steps into an episode"):
        judge(stream.model, stream.actor.environment, episodes=4)
    with pytest.raises(DataError, match="environment 1 gave the observation nan"):
        stream.next_batch(8)


@pytest.mark.slow
def test_it_learns_to_walk_to_the_end(tmp_path):
    """2,560 samples: from wherever it begins, straight to the right."""
    result = Trainer(
        run(steps=160, eval_episodes=20, batch_size=16, rollout_steps=16, num_envs=8), tmp_path / "run"
    ).fit()
    assert result.measures["arrived"] == 1.0
    assert result.headline > 0.6


# Stragglers


class Counts:
    """What processes count in, in this one."""

    def __init__(self):
        self.numbers = {}

    def add(self, key, value):
        self.numbers[key] = self.numbers.get(key, 0) + value
        return self.numbers[key]


def test_stragglers_stop_when_enough_have_finished():
    counts = Counts()
    # 60 % of 4 processes are 3; a quarter of 16 steps are 4.
    slow, quick = (Stragglers(16, 4, share=0.6, least=0.25, counts=counts) for _ in range(2))
    quick.finished(0)
    quick.finished(0)
    assert not slow.is_over(0, 8)
    quick.finished(0)
    assert [slow.is_over(0, steps) for steps in (2, 4, 6, 8, 16)] == [False, True, False, True, False]
    # Of another rollout nobody has finished.
    assert not slow.is_over(1, 8)
    with pytest.raises(ConfigError, match="preempt_share is 2; it must be above 0 and at most 1"):
        Stragglers(16, 4, share=2, counts=counts)


def test_a_rollout_that_was_stopped_is_learned_from_in_smaller_mini_batches(tmp_path):
    counts = Counts()

    def stopped():
        made = rollouts(rollout_steps=16, batch_size=16, normalize_advantage="none")
        made.actor.stragglers = Stragglers(16, 2, share=0.5, least=0.5, counts=counts)
        return made

    stream = stopped()
    stream.actor.stragglers.finished(0)
    batches = [stream.next_batch(8) for _ in range(16)]
    samples = stream.rollout.samples
    # 8 of 16 steps of 4 environments: as many mini-batches of both epochs, half as large.
    assert len(samples.value_B) == 32
    assert {len(batch.value_B) for batch in batches} == {4}
    for epoch in (batches[:8], batches[8:]):
        seen = torch.cat([batch.advantage_B for batch in epoch])
        assert torch.equal(seen.sort().values, samples.advantage_B.sort().values)
    # It is what the first 8 steps of a whole one are, but for what is known of later.
    whole = rollouts(rollout_steps=16, batch_size=16, normalize_advantage="none")
    whole.next_batch(8)
    assert torch.equal(samples.observation_BD, whole.rollout.samples.observation_BD[:32])
    assert torch.equal(samples.action_BA, whole.rollout.samples.action_BA[:32])
    # The next rollout is whole again, and begins where this one was stopped.
    stream.next_batch(8)
    assert len(stream.rollout.samples.value_B) == 64
    begin = whole.rollout.samples.observation_BD[32:36]
    assert torch.equal(stream.rollout.samples.observation_BD[:4], begin)
    kept = stopped()
    kept.actor.stragglers.finished(0)
    kept.next_batch(8)
    kept.save(tmp_path)
    other = stopped()
    other.load(tmp_path)
    other.load_state_dict(kept.state_dict())
    assert torch.equal(other.next_batch(8).advantage_B, kept.next_batch(8).advantage_B)


def test_processes_that_made_unequal_steps_keep_all_of_them():
    """Parts of 8 and 3 steps, put together as those of processes are, against each on its own."""
    stream = rollouts(epochs=1)
    actor, network = stream.actor, stream.model
    with torch.no_grad():
        acted = actor.act(0, network, actor.open())
    short = acted.first(3)
    short.last_nD = acted.observation_TnD[3]
    whole, few = actor.samples(network, acted), actor.samples(network, short)
    assert torch.equal(few.observation_BD, whole.observation_BD[:12])
    assert len(few.value_B) == 12
    # What comes later counts by the value of where it stopped: the last step's advantage is one step's.
    reward, value = short.reward_Tn[2], few.value_B.view(3, 4)[2]
    going = ~(short.terminated_Tn[2] | short.truncated_Tn[2])
    expected = reward + 0.99 * actor.judged(network, short.last_nD)[1] - value
    torch.testing.assert_close(few.advantage_B.view(3, 4)[2][going], expected[going])


@pytest.mark.slow
def test_a_slow_process_is_not_waited_for(tmp_path):
    """Of two, the first is done at once; the second, at 10 ms a step, stops after a quarter. Both then learn the same from all of it."""
    made = run(
        environment=Corridor.Config(slow=3),
        rollout_steps=64,
        batch_size=64,
        epochs=1,
        preempt_share=0.5,
        train={"parallel": "ddp", "checkpoint_every": None, "eval_every": None, "device": "cpu"},
    )
    spawn(train_rank, args=(made, str(tmp_path), 2), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    # 2 environments each: 128 samples of the first, and 32 or little more of the second.
    assert first["lengths"] == second["lengths"]
    assert all(128 + 32 <= length < 256 for length in first["lengths"])
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
