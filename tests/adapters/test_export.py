"""A mixture with fixed weights, written as one adapter: the logits of the mixture, and a model that is as it was."""

import pytest
import torch

from adapter_models import TOKENS, linear_layers, logits, make_adapter, make_base
from anabranch.adapters import export_mixture, load_peft, load_pool, read_peft, rows_for, unload
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm import load_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    base = make_base(root / "base", "qwen2")
    make_adapter(root / "a", linear_layers(base, ["q_proj", "down_proj"]), seed="a")
    make_adapter(root / "b", linear_layers(base, ["v_proj", "down_proj"]), rank=7, seed="b", use_rslora=True)
    make_adapter(root / "other", {"model.layers.0.self_attn.q_proj": (16, 32)})
    return root


@pytest.fixture
def model(place):
    return load_model(place / "base")[0].eval()


def test_one_adapter_computes_what_the_mixture_does(place, model, tmp_path):
    mixture = {"a": 0.5, "b": -1.5}
    load_pool({name: place / name for name in mixture}, model)
    with torch.no_grad():
        wanted = model(TOKENS, state=rows_for(model, [mixture] * 2, TOKENS.shape[1])).logits_BLV
    unload(model)
    before = logits(model)
    done = export_mixture(tmp_path / "sum", model.train(), {place / name: weight for name, weight in mixture.items()})
    assert model.training
    assert torch.equal(logits(model), before)
    assert (done.made.error, done.made.cut_off) == (0, 0)
    assert done.difference < 1e-5 < done.greatest
    torch.testing.assert_close(logits(load_peft(tmp_path / "sum", model)), wanted, rtol=1e-5, atol=1e-5)
    ranks = {name.split(".")[-1]: pair.rank for name, pair in read_peft(tmp_path / "sum").pairs.items()}
    assert ranks == {"q_proj": 4, "v_proj": 7, "down_proj": 11}


def test_whole_numbers_as_weights_are_the_mixture_that_is_written(place, model, tmp_path):
    """The scale of b is no whole number."""
    done = export_mixture(tmp_path / "sum", model, {place / "a": 1, place / "b": 2})
    assert done.difference < 1e-4 < done.greatest


def test_what_a_lower_rank_lacks_is_told(place, model, tmp_path):
    done = export_mixture(tmp_path / "sum", model, {place / "a": 1.0, place / "b": 1.0}, rank=5)
    assert done.made.error == done.made.cut_off > 0.05
    assert done.difference > 1e-3
    assert max(pair.rank for pair in read_peft(tmp_path / "sum").pairs.values()) == 5


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({}, ConfigError, "there is no adapter to export"),
        ({"other": 1.0}, CheckpointError, "is it an adapter of another model"),
        ({"a": float("inf")}, ConfigError, "a weight is inf; it must be a finite number"),
        ({"nowhere": 1.0}, CheckpointError, "no adapter at"),
    ],
)
def test_nothing_is_written_where_it_cannot_be(place, model, tmp_path, weights, error, message):
    before = logits(model)
    with pytest.raises(error, match=message):
        export_mixture(tmp_path / "sum", model, {place / name: weight for name, weight in weights.items()})
    assert not (tmp_path / "sum").exists()
    assert torch.equal(logits(model), before)
