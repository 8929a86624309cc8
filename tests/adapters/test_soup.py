"""Means of adapters of our own form: number by number, of whatever kind, and of what has no mean."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from anabranch.adapters.catalogue import apply
from anabranch.adapters.own_folder import read_own, write_own
from anabranch.adapters.soup import average_own
from anabranch.errors import CheckpointError, ConfigError, DataError
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU

CONFIG = Decoder.Config(
    vocab_size=61,
    dim=16,
    num_layers=2,
    attention=SelfAttention.Config(num_heads=4),
    feed_forward=SwiGLU.Config(hidden_dim=24),
    max_positions=64,
)
TOKENS = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(4))
METHODS = {
    "adapter-pfeiffer": {"width": 3},
    "prefix-tuning": {"tokens": 3},
    "unipelt": {"tokens": 3, "rank": 2, "width": 3},
    "lst": {"reduction": 4},
    "shira": {"rank": 1},
}


def trained(folder, method="adapter-pfeiffer", seed=1, base=None, **options):
    model = CONFIG.build(seed=0) if base is None else base
    applied = apply(model, method, seed=0, **(METHODS[method] | options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in applied.trainable:
            parameter = model.get_parameter(name)
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    write_own(folder, model)
    return load_file(folder / "adapter.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_each_number_is_the_mean_of_its_own(method, tmp_path):
    first, second = (trained(tmp_path / name, method, seed) for name, seed in (("a", 1), ("b", 2)))
    made = average_own([tmp_path / "a", tmp_path / "b"], [3.0, 1.0], tmp_path / "mean")
    found = load_file(tmp_path / "mean" / "adapter.safetensors")
    assert found.keys() == first.keys()
    for name, value in found.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * first[name] + 0.25 * second[name])
        else:
            assert torch.equal(value, first[name])
    assert made.parameters == sum(value.numel() for value in found.values())
    model = read_own(tmp_path / "mean", CONFIG.build(seed=0))
    with torch.no_grad():
        assert model(TOKENS).logits_BLV.isfinite().all()
    # One alone is itself, whatever its weight.
    average_own([tmp_path / "b"], [7.0], tmp_path / "alone")
    for name, value in load_file(tmp_path / "alone" / "adapter.safetensors").items():
        assert torch.equal(value, second[name])


def test_what_has_no_mean_is_told_and_nothing_is_written(tmp_path):
    trained(tmp_path / "a")
    trained(tmp_path / "wide", width=5)
    trained(tmp_path / "lst", "lst")
    trained(tmp_path / "other", base=CONFIG.build(seed=9))
    shutil.copytree(tmp_path / "a", tmp_path / "cut")
    numbers = load_file(tmp_path / "cut" / "adapter.safetensors")
    save_file(dict(list(numbers.items())[1:]), tmp_path / "cut" / "adapter.safetensors")
    shutil.copytree(tmp_path / "a", tmp_path / "nan")
    save_file({name: value * torch.nan for name, value in numbers.items()}, tmp_path / "nan" / "adapter.safetensors")
    trained(tmp_path / "places", "shira")
    shutil.copytree(tmp_path / "places", tmp_path / "elsewhere")
    moved = load_file(tmp_path / "elsewhere" / "adapter.safetensors")
    index = next(name for name, value in moved.items() if not value.is_floating_point())
    save_file({**moved, index: moved[index] + 1}, tmp_path / "elsewhere" / "adapter.safetensors")
    for names, weights, error, message in (
        (["a", "wide"], [1, 1], ConfigError, "wide has other layers or settings than"),
        (["a", "lst"], [1, 1], ConfigError, "lst has other layers or settings than"),
        (["a", "other"], [1, 1], ConfigError, "other was trained on another base than"),
        (["a", "cut"], [1, 1], ConfigError, "is not the same in"),
        (["a", "nan"], [1, 1], CheckpointError, "holds NaN or infinity"),
        (["a", "nowhere"], [1, 1], CheckpointError, "no adapter of anabranch's in"),
        (["places", "elsewhere"], [1, 1], ConfigError, "says other places in these adapters"),
        (["a", "a"], [1, -1], ConfigError, "a mean has weights of 0 and above"),
        (["a", "a"], [1], ConfigError, "there are 1 weights for 2 adapters"),
        ([], [], ConfigError, "there are 0 weights for 0 adapters"),
    ):
        with pytest.raises(error, match=message):
            average_own([tmp_path / name for name in names], weights, tmp_path / "none")
        assert not (tmp_path / "none").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=r"mine\.txt"):
        average_own([tmp_path / "a"], [1], tmp_path / "full")
