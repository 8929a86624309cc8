"""Slopes by which sparse layers choose what they keep: by hand, and what no choice can be made of."""

import pytest
import torch

from anabranch.adapters import catalogue
from anabranch.adapters.graft import layers_of
from anabranch.adapters.scoring import slopes_of
from anabranch.adapters.sparse_bottleneck import snip
from anabranch.adapters.sparse_delta import SparseDelta, place_by_fisher
from anabranch.errors import InputError
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU

TOKENS = torch.tensor([[3, 17, 60, 8, 41], [0, 5, 22, 1, 59]])
# What chooses, and the method of the catalogue whose layers it is for.
WAYS = {"fish-mask": (place_by_fisher, {"rank": 1}), "sparse-adapter": (snip, {"width": 4, "sparsity": 0.8})}


def model_of(id):
    config = Decoder.Config(
        vocab_size=64,
        dim=16,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=SwiGLU.Config(hidden_dim=24),
        max_positions=32,
    )
    model = config.build(seed=1)
    catalogue.apply(model, id, seed=0, **WAYS[id][1])
    return model


def loss_of(model, row):
    return model(TOKENS[row : row + 1], target_BL=TOKENS[row : row + 1]).loss


class Line:
    """y = w x, of which both weights are scored."""

    def __init__(self):
        self.weight, self.is_scored = torch.tensor([2.0, 3.0]), False

    def score(self):
        self.is_scored, self.leaf = True, self.weight.clone().requires_grad_()
        return self.leaf

    def unscore(self):
        self.is_scored = False


@pytest.mark.parametrize(("power", "wanted"), [(1, [-3.0, 4.0]), (2, [17.0, 16.0])])
def test_slopes_by_hand(power, wanted):
    """Slopes (1, 0), (-4, 4): summed, and squared before they are."""
    line, unused = Line(), Line()

    def losses():
        yield line.leaf[0]
        yield 4 * (line.leaf[1] - line.leaf[0])

    found = slopes_of([line, unused], losses(), power=power)
    assert [one.tolist() for one in found] == [wanted, [0.0, 0.0]]
    assert not line.is_scored
    assert not unused.is_scored


def numbers(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("id", WAYS)
@pytest.mark.parametrize(
    ("losses", "told"),
    [
        (lambda model: [], "there is no loss"),
        # Made beforehand, so that they do not go by what is scored.
        (lambda model: [loss_of(model, 0), loss_of(model, 1)], "make losses while they are gone over"),
        (lambda model: (loss_of(model, row) * float("nan") for row in range(2)), "NaN or infinite"),
    ],
)
def test_nothing_is_chosen_by_what_says_nothing(id, losses, told):
    model = model_of(id)
    before, was = numbers(model), model(TOKENS).logits_BLV
    with pytest.raises(InputError, match=told):
        WAYS[id][0](model, losses(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(TOKENS).logits_BLV, was)


@pytest.mark.parametrize("id", WAYS)
def test_a_look_that_is_broken_off_leaves_layers_as_they_were(id):
    """They learn afterwards, and a second look goes on from where they are."""
    model = model_of(id)
    before, was = numbers(model), model(TOKENS).logits_BLV

    def losses():
        yield loss_of(model, 0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        WAYS[id][0](model, losses())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(TOKENS).logits_BLV, was)
    loss_of(model, 1).backward()
    assert all(layer.value.grad is not None for layer in layers_of(model).values())
    WAYS[id][0](model, (loss_of(model, row) for row in range(2)))
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layers_that_no_loss_goes_through_keep_what_was_drawn():
    model = model_of("fish-mask")
    layers = layers_of(model)
    unused = next(layer for name, layer in layers.items() if name.startswith("blocks.1"))
    drawn = unused.index.clone()
    place_by_fisher(model, (model(TOKENS, target_BL=TOKENS, path=[0]).loss for _ in range(1)))
    assert torch.equal(unused.index, drawn)
    assert isinstance(unused, SparseDelta)
    assert unused.delta().shape == (unused.out_dim, unused.in_dim)
    assert not unused.value.any()
