"""What stands beside a matrix goes into it and into its bias, by the formula of its kind, whole or not at all."""
# Shapes: C inputs, O outputs

import pytest
import torch
from torch import nn

from anabranch.adapters import LowRank, merge, unmerge
from anabranch.adapters.after import ScaleShift
from anabranch.adapters.dora import Dora
from anabranch.adapters.graft import layers_of
from anabranch.adapters.put_on import put_on, take_off
from anabranch.adapters.scaling import Scaling
from anabranch.errors import ConfigError
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU

CONFIG = Decoder.Config(
    vocab_size=61,
    dim=16,
    num_layers=2,
    attention=SelfAttention.Config(num_heads=2, num_kv_heads=1, qkv_bias=True),
    feed_forward=SwiGLU.Config(hidden_dim=24),
    max_positions=16,
    init_std=0.2,
)
# Of the rows of q, k and v in one matrix.
ROWS = {"q": slice(0, 16), "v": slice(24, 32)}
FORMULAS = {
    "low_rank": (LowRank.Config(rank=2, alpha=3), lambda layer, w, b: (w + 1.5 * layer.b @ layer.a, b)),
    "dora": (
        Dora.Config(rank=2, alpha=3),
        lambda layer, w, b: (
            nn.functional.normalize(w + 1.5 * layer.b @ layer.a, dim=1) * layer.magnitude.unsqueeze(1),
            b,
        ),
    ),
    "scaling of outputs": (
        Scaling.Config(),
        lambda layer, w, b: (layer.factor.unsqueeze(1) * w, layer.factor * b),
    ),
    "scaling of inputs": (Scaling.Config(of="input"), lambda layer, w, b: (w * layer.factor, b)),
    "scale_shift": (
        ScaleShift.Config(),
        lambda layer, w, b: (layer.factor.unsqueeze(1) * w, layer.factor * b + layer.shift),
    ),
}


@torch.no_grad()
def made(kind, dtype=torch.float32):
    """A model that stores biases and matrices of ``dtype``, with layers that learned."""
    model = CONFIG.build(seed=1).to(dtype).eval()
    draw = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    before = state(model)
    put_on(model, {f"*.attention.{word}": FORMULAS[kind][0] for word in ROWS})
    for layer in layers_of(model).values():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model, before


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize("kind", FORMULAS)
def test_matrix_and_bias_are_those_of_the_formula_and_then_of_before(kind):
    model, before = made(kind)
    wanted, layers, beside = dict(before), layers_of(model), state(model)
    with torch.no_grad():
        for number in range(2):
            names = [f"blocks.{number}.attention.qkv.{leaf}" for leaf in ("weight", "bias")]
            whole = [before[name].clone() for name in names]
            for word, rows in ROWS.items():
                parts = FORMULAS[kind][1](
                    layers[f"blocks.{number}.attention.{word}"], *(one[rows].clone() for one in whole)
                )
                for one, part in zip(whole, parts, strict=True):
                    one[rows] = part
            wanted.update(zip(names, whole, strict=True))
    merge(model)
    found = state(model)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-5)
    unmerge(model)
    assert same(state(model), beside)
    assert same(state(take_off(model)), before)


# What each kind has that makes numbers greater than float16 holds.
GREAT = {
    "low_rank": ("b",),
    "dora": ("magnitude",),
    "scaling of outputs": ("factor",),
    "scaling of inputs": ("factor",),
    "scale_shift": ("factor", "shift"),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in GREAT.items() for name in names])
@pytest.mark.parametrize("value", [1e7, torch.nan])
def test_what_a_type_cannot_hold_is_told_and_nothing_goes_in(kind, name, value):
    """Be it the bias of the last layer alone."""
    model, _ = made(kind, torch.float16)
    with torch.no_grad():
        getattr([*layers_of(model).values()][-1], name)[0] = value
    before = state(model)
    last = [*layers_of(model)][-1]
    with pytest.raises(ConfigError, match=f"^{last} with what was learned has numbers that float16 cannot hold"):
        merge(model)
    found = state(model)
    assert all(torch.equal(found[name].nan_to_num(), before[name].nan_to_num()) for name in before)
    assert layers_of(model)


@pytest.mark.parametrize("kind", [nn.Linear, "Conv1D"])
def test_nor_does_it_go_into_a_model_that_is_not_ours(kind):
    conv = pytest.importorskip("transformers").pytorch_utils.Conv1D
    model = nn.Sequential(*(nn.Linear(4, 3) if kind is nn.Linear else conv(3, 4) for _ in range(2))).half()
    put_on(model, {"*": LowRank.Config(rank=1)})
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.b.fill_(1.0)
        layer.b.fill_(1e7)
    before = state(model)
    with pytest.raises(ConfigError, match=r"^1 with what was learned has numbers that float16 cannot hold"):
        merge(model)
    assert same(state(model), before)
