"""Pictures as observations: which boxes are pictures, how channels lie, what the networks make of them, and that it is learned."""

import numpy as np
import pytest
import torch

from anabranch.errors import ConfigError
from anabranch.rl import PPO, Actions, ActorCritic, Gymnasium, Layout, load_agent
from anabranch.rl.environment import flat, layout_of
from anabranch.rl.pictures import Pictures
from anabranch.train import Constant, TaskRunConfig, TrainConfig, Trainer

gymnasium = pytest.importorskip("gymnasium")
spaces = gymnasium.spaces


def picture(*shape, dtype=np.uint8):
    return spaces.Box(0, 255, shape, dtype)


@pytest.mark.parametrize(
    ("space", "expected", "brightest"),
    [
        (picture(8, 9, 3), (3, 8, 9), 255),
        (picture(4, 9, 8), (4, 9, 8), 255),
        # Of numbers that are no pixels only what is called so is one.
        (spaces.Box(0, 1, (4, 9, 8)), None, 1),
        (spaces.Dict(picture=spaces.Box(0, 1, (9, 8, 2))), (2, 9, 8), 1),
        (
            spaces.Dict(picture=picture(8, 8, 1), policy=spaces.Box(0, 1, (5,)), critic=spaces.Box(0, 1, (2,))),
            (1, 8, 8),
            255,
        ),
    ],
)
def test_which_boxes_are_pictures(space, expected, brightest):
    found = layout_of(space, spaces.Discrete(2))
    assert (found.picture, found.brightest) == (expected, brightest)
    size = sum(int(np.prod(box.shape)) for box in space.spaces.values()) if isinstance(space, spaces.Dict) else None
    assert found.num_observed + found.num_private == (size or int(np.prod(space.shape)))


def test_channels_come_first_and_the_picture_stands_between():
    last = np.arange(2 * 5 * 6 * 3).reshape(2, 5, 6, 3).astype(np.uint8)
    assert np.array_equal(flat(last).reshape(2, 3, 5, 6), np.moveaxis(last, -1, 1))
    first = np.moveaxis(last, -1, 1)
    assert np.array_equal(flat(first), flat(last))
    seen = flat({"critic": np.full((2, 1), 9.0), "picture": last, "policy": np.full((2, 2), 7.0)})
    assert seen.dtype == np.float32
    assert np.array_equal(seen[:, :2], np.full((2, 2), 7.0))
    assert np.array_equal(seen[:, 2:-1], flat(last))
    assert np.array_equal(seen[:, -1], [9.0, 9.0])


def test_what_is_no_picture_is_refused():
    with pytest.raises(ConfigError, match=r"a picture is \[9\]; it must have three axes"):
        layout_of(spaces.Dict(picture=spaces.Box(0, 1, (9,))), spaces.Discrete(2))
    with pytest.raises(ConfigError, match="a dict of critic; use boxes called 'policy'"):
        layout_of(spaces.Dict(critic=spaces.Box(0, 1, (9,))), spaces.Discrete(2))
    for shape in ((1, 2, 9), (1, 2001, 2001)):
        with pytest.raises(ConfigError, match="sides must be at least 3"):
            Pictures(shape, 4)
    with pytest.raises(ConfigError, match="a picture has 12 numbers, and 11 are observed"):
        Layout(11, 0, Actions(2), (3, 2, 2))


def test_the_policy_sees_numbers_and_picture_and_the_critic_all():
    """By hand from the parts: the picture divided by 255, its features behind the numbers, the critic's own last."""
    layout = Layout(2 + 3 * 8 * 8, 1, Actions(4), (3, 8, 8), 255.0)
    model = ActorCritic(layout, hidden=(16,), scale=(2.0, 4.0, 10.0))
    seen = torch.rand(5, layout.num_observed + 1) * 255
    numbers, image, private = seen[:, :2] / torch.tensor([2.0, 4.0]), seen[:, 2:-1] / 255, seen[:, -1:] / 10
    image = image.view(5, 3, 8, 8)
    acts, value = model(seen)
    torch.testing.assert_close(acts, model.policy(torch.cat([numbers, model.policy_pictures(image)], 1)))
    judged = model.critic(torch.cat([numbers, model.critic_pictures(image), private], 1))
    torch.testing.assert_close(value, judged.squeeze(-1))
    acts.sum().backward()
    assert model.policy_pictures.stages[0].weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.critic_pictures.parameters())
    with pytest.raises(ConfigError, match="observation_scale has 2 numbers; use 3 above 0"):
        ActorCritic(layout, scale=(2.0, 4.0))


@pytest.mark.parametrize(("side", "stages"), [(3, 1), (11, 1), (48, 3), (84, 4), (200, 4)])
def test_larger_pictures_have_more_stages(side, stages):
    made = Pictures((2, side, side), 7)
    assert len(made.stages) == 3 * stages
    assert made(torch.zeros(1, 2, side, side)).shape == (1, 7)


class Bright(gymnasium.Env):
    """A picture of which one half is brighter; to say which is worth 1."""

    observation_space = picture(8, 8, 1)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.right = int(self.np_random.integers(2))
        seen = self.np_random.integers(0, 100, (8, 8, 1))
        seen[:, 4 * self.right : 4 * self.right + 4] += 120
        return seen.astype(np.uint8), {}

    def step(self, action):
        return np.zeros((8, 8, 1), np.uint8), float(action == self.right), True, False, {}


def test_a_policy_learns_from_pictures(tmp_path):
    gymnasium.register("anabranch-bright-v0", Bright, max_episode_steps=5)
    config = PPO.Config(
        environment=Gymnasium.Config(id="anabranch-bright-v0"), num_envs=8, rollout_steps=8, epochs=4, hidden=(8,)
    )
    train = TrainConfig(
        steps=48,
        batch_size=32,
        learning_rate=1e-2,
        schedule=Constant.Config(),
        weight_decay=0.0,
        eval_every=None,
        device="cpu",
    )
    trainer = Trainer(TaskRunConfig(task=config, train=train), tmp_path / "run")
    assert trainer.fit().headline > 0.9
    trainer.stream.close()
    agent = load_agent(tmp_path / "run")
    assert agent.model.layout.picture == (1, 8, 8)
