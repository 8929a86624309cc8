"""The contract of backward passes finds what it is for: each broken layer here fails the check that should catch it."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd.function import once_differentiable

from anabranch.config import Field, configclass
from anabranch.errors import BackendError
from anabranch.lm import Decoder
from anabranch.lm.backward_contract import check_gradients, check_second_derivatives
from anabranch.nn import Attention, SwiGLU
from anabranch.registry import BUILTIN, resolve


class Broken(SwiGLU):
    """A base for the broken ones, small. ``change`` does something to what the layer gives."""

    @configclass
    class Config(SwiGLU.Config):
        """A small layer."""

        hidden_dim: int = Field(default=16, ge=1)

    def forward(self, x_BLD, context):
        return self.change(super().forward(x_BLD, context))


class Right(Broken, kind="right"):
    """Changes nothing."""

    def change(self, y_BLD):
        return y_BLD


class Hoard(torch.autograd.Function):
    """y scaled by s, whose gradient waits in a place of its own."""

    @staticmethod
    def forward(ctx, place, y, scale):
        ctx.place = place
        ctx.save_for_backward(y, scale)
        return y * scale

    @staticmethod
    def backward(ctx, gradient):
        y, scale = ctx.saved_tensors
        ctx.place.held = ctx.place.held + (gradient * y).sum()
        return None, gradient * scale, None


class Hand(torch.autograd.Function):
    """s, whose gradient is what has gathered since it was last asked."""

    @staticmethod
    def forward(ctx, place, scale):
        ctx.place = place
        ctx.set_materialize_grads(False)
        return scale.view_as(scale)

    @staticmethod
    def backward(ctx, gradient):
        held, ctx.place.held = ctx.place.held, 0.0
        return None, held.reshape(1, 1)


class Hoarding(Broken, kind="hoarding"):
    """What one backward pass has not taken, the next one finds."""

    def change(self, y_BLD):
        place = SimpleNamespace(held=0.0)
        scale = Hand.apply(place, self.w2.weight[:1, :1])
        return Hoard.apply(place, y_BLD, scale)


class FreesItself(Broken, kind="freesitself"):
    """Forgets after one pass what a second one needs."""

    def change(self, y_BLD):
        y_BLD = y_BLD * 1.0
        passes = []

        def count(gradient):
            passes.append(1)
            return gradient if len(passes) == 1 else gradient * 0

        y_BLD.register_hook(count)
        return y_BLD


class Square(torch.autograd.Function):
    """y^2."""

    @staticmethod
    def forward(ctx, y, how):
        ctx.save_for_backward(y)
        ctx.how = how
        return y.square()

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        if ctx.how == "refused" and torch.is_grad_enabled():
            raise BackendError("this layer has no second derivatives; use backend='reference'")
        return gradient * 2 * (y.detach() if ctx.how == "forgotten" else y), None


class SquareOnce(Square):
    """The same, once."""

    backward = once_differentiable(Square.backward)


class Once(Broken, kind="once"):
    """An error of torch's."""

    def change(self, y_BLD):
        return SquareOnce.apply(y_BLD, "once")


class Forgotten(Broken, kind="forgotten"):
    """A gradient whose graph lacks a branch."""

    def change(self, y_BLD):
        return Square.apply(y_BLD, "forgotten")


class Refused(Broken, kind="refused"):
    """An error that says what to do."""

    def change(self, y_BLD):
        return Square.apply(y_BLD, "refused")


class Supported(Broken, kind="supported"):
    """Second derivatives as they are."""

    def change(self, y_BLD):
        return Square.apply(y_BLD, "supported")


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    for design in Broken.__subclasses__():
        monkeypatch.setitem(BUILTIN["feed_forward"], design.kind, f"{__name__}:{design.__name__}")
    yield
    resolve.cache_clear()


def check(design, contract):
    attention = Attention.Config(num_heads=4, num_kv_heads=2)
    sizes = {"vocab_size": 61, "dim": 32, "num_layers": 2, "max_positions": 64, "init_std": 0.2}
    config = Decoder.Config(attention=attention, feed_forward=design.Config(), **sizes)
    contract(config.build(), torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    ("design", "message"),
    [
        (Hoarding, "after the embedding's gradient alone was asked for the gradient of .* is another"),
        (FreesItself, "after the embedding's gradient alone was asked for the gradient of .* is another"),
    ],
)
def test_broken_passes(design, message):
    with pytest.raises(AssertionError, match=message):
        check(design, check_gradients)


@pytest.mark.parametrize(
    ("design", "message"),
    [
        (Once, "it has no second derivatives, and the error does not say what to do: .*once_differentiable"),
        (Forgotten, "the second derivative along the gradient is .*; by differences it is"),
    ],
)
def test_broken_second_derivatives(design, message):
    with pytest.raises(AssertionError, match=message):
        check(design, check_second_derivatives)


@pytest.mark.parametrize("design", [Right, Supported, Refused])
def test_what_is_right_passes(design):
    check(design, check_gradients)
    check(design, check_second_derivatives)
