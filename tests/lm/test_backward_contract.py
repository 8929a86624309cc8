"""The contract of backward passes finds what it is for: each broken layer here fails the check that should catch it."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd.function import once_differentiable

from anabranch.config import Field, configclass
from anabranch.errors import BackendError
from anabranch.lm import Decoder
from anabranch.lm.backward_contract import check_gradients, check_second_derivatives
from anabranch.nn import SelfAttention, SwiGLU
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


class Marked(torch.autograd.Function):
    """A tensor whose gradient ``seen`` may change, which is all that a backward pass written by hand could do with it."""

    @staticmethod
    def forward(ctx, tensor, seen):
        ctx.seen = seen
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.seen(gradient), None


def at_the_end(call):
    """``call()`` when the backward pass that is under way has ended, unless an exception ends it."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


class Tidies(Broken, kind="tidies"):
    """Lets go of what it holds at the end of a backward pass, which an exception takes from it."""

    def change(self, y_BLD):
        held = []

        def seen(gradient):
            held.append(gradient)
            at_the_end(held.clear)
            return sum(held)

        return Marked.apply(y_BLD, seen)


class FreesItself(Broken, kind="freesitself"):
    """Forgets after one whole pass what a second one needs."""

    def change(self, y_BLD):
        passes = []

        def count(gradient):
            at_the_end(lambda: passes.append(1))
            return gradient

        scale = Marked.apply(self.w2.weight.mean(), count)
        return Marked.apply(y_BLD + 0 * scale, lambda gradient: gradient * (not passes))


class Withholds(Broken, kind="withholds"):
    """Gives its parameter no gradient in a second pass."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def change(self, y_BLD):
        passes = []

        def seen(gradient):
            passes.append(1)
            return gradient

        scale = Marked.apply(self.scale, lambda gradient: gradient if len(passes) == 1 else None)
        return Marked.apply(y_BLD * scale, seen)


class Remembers(Broken, kind="remembers"):
    """Takes every pass over a graph for a repetition of the first."""

    def change(self, y_BLD):
        first = []

        def seen(gradient):
            first.append(gradient.clone())
            return first[0].clone()

        return Marked.apply(y_BLD, seen)


class Recomputing(Broken):
    """A base for what is wrong only where a forward pass is repeated within a backward pass, and not in the first of those."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.repeats = 0

    def change(self, y_BLD):
        if torch._C._current_graph_task_id() == -1:
            self.repeats = 0
        else:
            self.repeats += 1
            self.repeated()
        return (y_BLD * max(1, self.repeats)).tanh()

    def repeated(self):
        """A forward pass came again."""


class RepeatsOnce(Recomputing, kind="repeatsonce"):
    """Is something else when it is recomputed a second time."""


class TidiesRepeats(Recomputing, kind="tidiesrepeats"):
    """The same, unless the pass for which it was recomputed had a proper end."""

    def repeated(self):
        at_the_end(self.tidy)

    def tidy(self):
        self.repeats = 0


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
    designs = {*Broken.__subclasses__(), *Recomputing.__subclasses__()} - {Recomputing}
    for design in designs:
        monkeypatch.setitem(BUILTIN["feed_forward"], design.kind, f"{__name__}:{design.__name__}")
    yield
    resolve.cache_clear()


def check(design, contract, **changes):
    attention = SelfAttention.Config(num_heads=4, num_kv_heads=2)
    sizes = {"vocab_size": 61, "dim": 32, "num_layers": 2, "max_positions": 64, "init_std": 0.2, **changes}
    config = Decoder.Config(attention=attention, feed_forward=design.Config(), **sizes)
    contract(config.build(), torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    ("design", "message"),
    [
        (Hoarding, "after the gradient of embedding.weight alone was asked for the gradient of .* is another"),
        (
            Withholds,
            "after the gradient of embedding.weight alone was asked for other parameters have gradients: .*scale",
        ),
        (Tidies, "after a backward pass that an exception ended the gradient of .* is another"),
        (FreesItself, "after two backward passes over one graph the gradient of .* is another"),
        (
            Remembers,
            "of two losses, one backward pass each instead of one for their sum, the gradient of .* is another",
        ),
        (
            RepeatsOnce,
            "with recompute, after the gradient of embedding.weight alone was asked for the gradient of .* is another",
        ),
        (TidiesRepeats, "with recompute, after a backward pass that an exception ended the gradient of .* is another"),
    ],
)
def test_broken_passes(design, message):
    with pytest.raises(AssertionError, match=f"^{message}"):
        check(design, check_gradients)


@pytest.mark.parametrize(
    ("design", "message"),
    [
        (Once, "it has no second derivatives, and the error does not say what to do: .*once_differentiable"),
        (Forgotten, "the second derivative along the gradient is .*; by differences it is"),
        (RepeatsOnce, "with recompute, the second derivative is .*; it is .* without"),
    ],
)
def test_broken_second_derivatives(design, message):
    with pytest.raises(AssertionError, match=f"^{message}"):
        check(design, check_second_derivatives)


@pytest.mark.parametrize("design", [Right, Supported, Refused])
def test_what_is_right_passes(design):
    check(design, check_gradients)
    check(design, check_second_derivatives)
