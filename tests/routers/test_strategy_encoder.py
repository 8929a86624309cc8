"""The encoder: numpy computes what torch learned; words, padding, learning."""

import dataclasses

import numpy as np
import pytest
import torch

from anabranch.errors import ConfigError
from anabranch.routers import strategies
from anabranch.routers.made_outcomes import made_outcomes, made_pool
from anabranch.routers.strategies.encoder import Encoder, encode
from anabranch.routers.strategies.encoder_training import Network

TINY = {"vocab_size": 128, "dim": 16, "num_heads": 2, "hidden_dim": 24}


@pytest.mark.parametrize("num_layers", [1, 3])
def test_numpy_equals_torch(num_layers):
    config = Encoder.Config(**TINY, num_layers=num_layers)
    network = Network(config, 3, seed=0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.1 * torch.randn_like(weight))  # norms and biases away from their start
    word = np.random.default_rng(0).integers(1, 129, (4, 11))
    with torch.no_grad():
        expected = network(torch.from_numpy(word)).numpy()
    np.testing.assert_allclose(encode(network.weights(), word, 2), expected, atol=2e-6)


def test_padding_is_not_seen():
    network = Network(Encoder.Config(**TINY), 3, seed=0)
    word = torch.randint(1, 129, (2, 9))
    word[0, 5:] = 0
    with torch.no_grad():
        np.testing.assert_allclose(network(word)[0], network(word[:1, :5])[0], atol=1e-6)
        assert torch.isfinite(network(torch.zeros(1, 4, dtype=torch.int64))).all()


def test_words():
    one = Encoder.Config(**TINY, length=6).build()
    assert np.array_equal(one.words("Hello, World 12"), one.words("hello , world 1 2"))
    assert len(one.words("Hello, World 12")) == 5
    assert np.array_equal(one.words("a b c d e f g h i j"), one.words("a b c h i j"))
    assert one.words("").tolist() == [0]
    assert all(1 <= word <= 128 for word in one.words("many different words stand here"))


def test_it_learns_from_words_alone():
    """The task is named in the text; each model is right on one task."""
    data = made_outcomes(220)
    score = np.stack([[float(task == own) for own in "abcb"] for task in data.task]) * 0.9 + 0.05
    data = dataclasses.replace(data, score_NM=score, vector_ND=None)
    one = strategies.make("encoder", **TINY, epochs=8, rate=1e-2).fit(data.take(np.arange(150)))
    test = data.take(np.arange(150, 220))
    assert one.play(test, made_pool()).quality_N.mean() > 0.9
    again = strategies.make("encoder", **TINY, epochs=8, rate=1e-2).fit(data.take(np.arange(150)))
    assert all(np.array_equal(value, again.predictor.weights[name]) for name, value in one.predictor.weights.items())


def test_learning_leaves_torchs_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    strategies.make("encoder", **TINY, epochs=1).fit(made_outcomes(20))
    assert torch.equal(before, torch.get_rng_state())


def test_width_must_fit_the_heads():
    with pytest.raises(ConfigError, match="multiple of twice num_heads=4"):
        Encoder.Config(dim=12)
