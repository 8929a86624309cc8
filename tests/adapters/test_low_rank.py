"""`LowRank` as a part of a model: built by a pattern, counted, saved and read back; and the numbers of a `Pair`."""

import math

import pytest
import torch

from adapter_models import CONFIGS, TOKENS, logits
from anabranch.adapters import LowRank, Pair
from anabranch.errors import ConfigError
from anabranch.lm import load_model, save_model


@pytest.mark.parametrize(("rslora", "scale"), [(False, 4.0), (True, 16 / 2.0)])
def test_a_layer_is_scale_b_a(rslora, scale):
    config = CONFIGS["llama"]().replace(linears={"*.v": LowRank.Config(rank=4, alpha=16.0, rslora=rslora)})
    model = config.build()
    assert config.count().parameters == sum(parameter.numel() for parameter in model.parameters())
    layer = model.blocks[0].attention.qkv.beside["v"]
    plain = logits(CONFIGS["llama"]().build())
    assert layer.a.abs().max() <= 1 / math.sqrt(32)
    x = torch.randn(3, 32)
    assert not layer(x).any()
    layer.b.data.normal_()
    torch.testing.assert_close(layer(x), scale * (x @ layer.a.T @ layer.b.T))
    assert not torch.allclose(logits(model), plain)
    assert f"scale={scale:g}" in repr(layer)


def test_a_model_with_adapters_is_saved_and_read_as_any_other(tmp_path):
    config = CONFIGS["llama"]().replace(
        linears={"*.attention.*": LowRank.Config(rank=2), "*.down": LowRank.Config(rank=3, rslora=True)}
    )
    model = config.build()
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    save_model(tmp_path / "m", model)
    back, _ = load_model(tmp_path / "m")
    assert back.config == config
    assert torch.equal(logits(back), logits(model))


def test_training_moves_the_adapter():
    model = CONFIGS["llama"]().replace(linears={"*.q": LowRank.Config(rank=2)}).build()
    model(TOKENS, TOKENS.roll(-1, 1)).loss.backward()
    layer = model.blocks[0].attention.qkv.beside["q"]
    assert layer.b.grad.any()
    assert not layer.a.grad.any()  # B is zero


def test_pairs():
    pair = Pair(torch.randn(2, 5).bfloat16(), torch.randn(3, 2).bfloat16(), 3.0)
    assert (pair.rank, pair.scale) == (2, 1.5)
    assert pair.delta().dtype == torch.float32
    torch.testing.assert_close(pair.delta(), 1.5 * pair.b_OR.float() @ pair.a_RC.float())
    with pytest.raises(ConfigError, match="alpha is inf; it must be a finite number"):
        _ = Pair(pair.a_RC, pair.b_OR, math.inf).scale
    with pytest.raises(ConfigError, match="rank"):
        LowRank.Config(rank=0)
