"""LoRAHub: the search on functions whose minimum is known, and weights found for the rows of a model."""

import json
import math

import numpy as np
import pytest
import torch

from anabranch.adapters import read_peft
from anabranch.adapters.adapt import measure_rows, read_rows
from anabranch.adapters.lorahub import _Strategy, lorahub_weights, search
from anabranch.adapters.low_rank import Pair
from anabranch.adapters.peft_folder import write_peft
from anabranch.adapters.plain import peft_adapter
from anabranch.data import ByteTokenizer
from anabranch.errors import ConfigError, DataError
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU

BYTES = ByteTokenizer.Config().build()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_it_finds_the_minimum_of_a_square(count):
    target = np.linspace(-0.8, 1.2, count)

    def loss(weights):
        return 5 + 10 * float(np.square(np.array(weights) - target).sum())

    found = search(loss, count, steps=300)
    # The penalty pulls towards 0: by 0.05 / (20 count) each.
    np.testing.assert_allclose(found.weights, target - np.sign(target) * 0.05 / (20 * count), atol=0.02)
    assert found.loss == pytest.approx(5, abs=0.01)
    assert found.base_loss == loss([0.0] * count)
    assert found.tried == 300


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_constants_are_those_of_the_tutorial(count):
    """Hansen, arXiv 1604.00772, table 1, without negative weights; the length of a normal vector is held against the gamma function."""
    made = _Strategy(count, np.random.default_rng(0))
    size = 4 + math.floor(3 * math.log(count)) if count > 1 else 4
    weight_M = np.array([math.log((size + 1) / 2) - math.log(place) for place in range(1, size // 2 + 1)])
    weight_M /= weight_M.sum()
    mass = 1 / np.square(weight_M).sum()
    c_sigma = (mass + 2) / (count + mass + 5)
    c_one = 2 / ((count + 1.3) ** 2 + mass)
    assert made.size == size
    np.testing.assert_allclose(made._weight_M, weight_M)
    assert made._c_sigma == pytest.approx(c_sigma)
    assert made._damping == pytest.approx(1 + 2 * max(0, math.sqrt((mass - 1) / (count + 1)) - 1) + c_sigma)
    assert made._c_path == pytest.approx((4 + mass / count) / (count + 4 + 2 * mass / count))
    assert made._c_one == pytest.approx(c_one)
    assert made._c_mass == pytest.approx(min(1 - c_one, 2 * (mass - 2 + 1 / mass) / ((count + 2) ** 2 + mass)))
    usual = math.sqrt(2) * math.exp(math.lgamma((count + 1) / 2) - math.lgamma(count / 2))
    assert made._usual == pytest.approx(usual, rel=2e-3)


def test_weights_stay_within_bounds_and_the_base_may_be_best():
    seen = []

    def loss(weights):
        seen.append(weights)
        return 10 - sum(weights)

    found = search(loss, 3, steps=200)
    assert seen[0] == [0.0] * 3
    assert float(np.abs(np.array(seen)).max()) <= 1.5
    np.testing.assert_allclose(found.weights, [1.5] * 3, atol=0.02)
    nothing = search(lambda weights: 1 + sum(map(abs, weights)), 3, steps=40)
    assert nothing.weights == (0.0, 0.0, 0.0)
    assert nothing.loss == nothing.base_loss == 1


def test_the_penalty_is_that_of_the_paper():
    """Two weights that do the same: the one that costs less than it gains is taken, else none."""
    for gain, is_taken in ((0.06, True), (0.04, False)):
        found = search(lambda weights, gain=gain: 1 - gain * min(1.0, abs(weights[0])), 1, steps=200)
        assert (abs(found.weights[0]) > 0.9) is is_taken


def test_what_is_not_finite_is_never_chosen_and_a_seed_decides():
    def loss(weights):
        return math.nan if weights[0] > 0.2 else -weights[0]

    found = search(loss, 2, steps=100, seed=3)
    assert 0.1 < found.weights[0] <= 0.2
    assert search(loss, 2, steps=100, seed=3) == found
    assert search(loss, 2, steps=100, seed=4) != found
    steps = []
    search(loss, 2, steps=17, on_step=lambda step, best: steps.append(step))
    assert steps == list(range(1, 18))


def test_what_cannot_be_searched():
    with pytest.raises(ConfigError, match="0 steps for 2 adapters"):
        search(lambda weights: 1.0, 2, steps=0)
    with pytest.raises(ConfigError, match="for 0 adapters"):
        search(lambda weights: 1.0, 0)
    with pytest.raises(DataError, match="without adapters is nan"):
        search(lambda weights: math.nan, 2)


@pytest.fixture
def place(tmp_path):
    """(model, folders): an adapter that says the answers of rows.jsonl, one that says others, and rows."""
    config = Decoder.Config(
        vocab_size=257,
        dim=32,
        num_layers=1,
        attention=SelfAttention.Config(num_heads=4),
        feed_forward=SwiGLU.Config(hidden_dim=48),
        max_positions=64,
    )
    model = config.build(seed=1).eval()
    rows = [{"input": f"say {number}", "output": "aaaa"} for number in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    # The last matrix writes the embedding of a letter, whatever comes in.
    for name, letter in (("a", ord("a")), ("b", ord("b"))):
        up_OR = 3 * model.embedding.weight[letter].detach()[:, None] / model.embedding.weight[letter].norm()
        down_RC = torch.randn(1, 48, generator=torch.Generator().manual_seed(0)) * 0.01
        pair = Pair(down_RC.sign().contiguous(), up_OR.contiguous(), 1.0)
        write_peft(tmp_path / name, peft_adapter(model, {"blocks.0.feed_forward.down": pair}))
    return model, tmp_path


@pytest.mark.parametrize("method", ["linear", "exact"])
def test_weights_for_the_rows_of_a_model(place, method):
    model, root = place
    rows = read_rows(root / "rows.jsonl")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapters = [read_peft(root / name) for name in ("a", "b")]
    found = lorahub_weights(adapters, model, BYTES, rows, method=method, steps=25)
    base = measure_rows(model, BYTES, rows).all.nats_per_token
    assert found.base_loss == pytest.approx(base)
    assert found.loss <= base
    assert found.tried == 25
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_mean_has_no_weights_that_are_found():
    with pytest.raises(
        ConfigError, match="weights that are found may be negative, which those of method 'mean' are not"
    ):
        lorahub_weights([], None, BYTES, [], method="mean")
