"""GPipe with gradients of weights as work of their own: the bits of 1F1B, what is kept until then, and errors there."""

import pipes

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule

from anabranch.cluster import GPipe
from anabranch.cluster.gpipe import StageError
from anabranch.errors import InputError


def stepped(kind, schedule, *, items=10, dropout=None, **options):
    """(losses of two steps, gradients, the most bytes that each stage kept)."""
    model = pipes.MODELS[kind]() if dropout is None else pipes.language_model(dropout=dropout)
    pipe = GPipe(model, tied="auto" if kind == "lm" else (), schedule=schedule, **options)
    meters = pipe.measure_saved()
    x, target = pipes.data_of(kind, items)
    losses = [pipe.step(x, target, pipes.loss_of(kind)) for _ in range(2)]
    assert not any(meter.now for meter in meters)
    return losses, {name: one.grad for name, one in pipe.named_parameters()}, [meter.most for meter in meters]


def check_same(one, other):
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert torch.equal(gradient, other[1][name]), name


@pytest.mark.parametrize("kind", pipes.MODELS)
@pytest.mark.parametrize("checkpoint", ["always", "except_last", "never"])
@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (2, 1), (2, 5), (3, 2), (4, 10)])
def test_gradients_have_the_bits_of_a_backward_at_once(kind, checkpoint, stages, micro_batches):
    options = {"stages": stages, "micro_batches": micro_batches, "checkpoint": checkpoint}
    check_same(stepped(kind, "zero-bubble", **options), stepped(kind, "1f1b", **options))


class Tables(nn.Module):
    """Looks its sparse table up twice, which it multiplies with too or not, and mixes rows by a sparse matrix."""

    def __init__(self, is_head):
        super().__init__()
        self.table, self.is_head = nn.Embedding(8, 8, sparse=True), is_head

    def forward(self, x):
        x = torch.tanh(x + self.table(torch.tensor([1, 3])).sum(0)) * self.table(torch.tensor([3, 2])).sum(0)
        x = torch.sparse.mm(torch.eye(len(x), dtype=x.dtype).to_sparse() * 2, x)
        return F.linear(x, self.table.weight) if self.is_head else x


@pytest.mark.parametrize("checkpoint", ["always", "never"])
@pytest.mark.parametrize("measures", [False, True])
def test_sparse_tensors_and_gradients(measures, checkpoint):
    """As of one process, and as sparse as autograd makes them."""

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), Tables(False), Tables(True), nn.Linear(8, 8), Tables(False)).double()

    x, target = pipes.batch(6)
    alone = model()
    for _ in range(2):
        F.mse_loss(alone(x), target).backward()
    for schedule in ("1f1b", "zero-bubble"):
        made = model()
        pipe = GPipe(made, stages=2, micro_batches=3, schedule=schedule, checkpoint=checkpoint)
        meters = pipe.measure_saved() if measures else []
        for _ in range(2):
            pipe.step(x, target, F.mse_loss)
        assert not any(meter.now for meter in meters)
        for (name, one), other in zip(made.named_parameters(), alone.parameters(), strict=True):
            assert one.grad.layout == other.grad.layout, name
            assert torch.allclose(one.grad.to_dense(), other.grad.to_dense(), rtol=1e-9), name


def test_dropout_is_the_same():
    options = {"stages": 3, "micro_batches": 4, "dropout": 0.3, "seed": 5, "checkpoint": "always"}
    check_same(stepped("lm", "zero-bubble", **options), stepped("lm", "1f1b", **options))


def test_what_is_kept_until_the_gradients_of_weights():
    """Stage k keeps K - k micro-batches whole, and of k others what their products wait with."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), Sine()) for _ in range(4))).double()
    x, target = pipes.batch(8)
    found = {}
    for schedule in ("1f1b", "zero-bubble"):
        pipe = GPipe(model, stages=4, micro_batches=8, checkpoint="never", schedule=schedule)
        meters = pipe.measure_saved()
        pipe.step(x, target, F.mse_loss)
        found[schedule] = [meter.most for meter in meters]
    one = x.nbytes // 8
    # A product keeps its input, sine keeps its own; the first input is a part of the whole batch, and the loss keeps the difference from
    # the target, with the whole batch of targets. Noted for later are the gradients of what products gave.
    assert found["1f1b"] == [x.nbytes + 4 * one, 3 * 2 * one, 2 * 2 * one, 2 * one + one + x.nbytes]
    assert found["zero-bubble"] == [
        x.nbytes + 4 * one,
        (3 * 2 + 1 * 2) * one,
        (2 * 2 + 2 * 2) * one,
        (3 + 3 * 2) * one + x.nbytes,
    ]


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(x)


def test_whoever_takes_gradients_by_micro_batch_gets_them_when_they_are_whole():
    x, target = pipes.batch(8)
    found = []
    for schedule in ("1f1b", "zero-bubble"):
        pipe = GPipe(pipes.mlp(), 3, 4, schedule=schedule)
        taken = {}

        def take(micro_batch, layers, taken=taken):
            for layer in layers:
                for parameter in layer.parameters():
                    taken.setdefault(micro_batch, []).append(parameter.grad)
                    parameter.grad = None

        pipe.step(x, target, F.mse_loss, after_backward=take)
        found.append(taken)
    assert found[0].keys() == found[1].keys() == set(range(4))
    for micro_batch, gradients in found[0].items():
        # Stages are threads: which of them comes first is of no account.
        one, other = (sorted(each, key=lambda g: g.sum().item()) for each in (gradients, found[1][micro_batch]))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_under_autocast():
    x, target = pipes.batch(4, dtype=torch.float32)
    found = []
    for schedule in ("1f1b", "zero-bubble"):
        pipe = GPipe(pipes.mlp(dtype=torch.float32), 3, 2, schedule=schedule)
        with torch.autocast("cpu", torch.bfloat16):
            pipe.step(x, target, F.mse_loss)
        found.append([parameter.grad for parameter in pipe.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_layers_without_parameters_and_frozen_ones():
    x, target = pipes.batch(6)
    model = pipes.mlp()
    model[2].requires_grad_(False)
    pipe = GPipe(model, balance=[1, 1, 1, 1, 2], micro_batches=3, schedule="zero-bubble")
    pipe.step(x, target, F.mse_loss)
    found = [parameter.grad for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
    wanted = pipes.gradients(model, x, target, F.mse_loss)[1]
    assert [gradient is None for gradient in found] == [False, False, True, True, False, False]
    assert all(torch.allclose(a, b) for a, b in zip([g for g in found if g is not None], wanted.values(), strict=True))


def test_an_error_of_gradients_of_weights_says_so_and_the_next_step_works():
    x, target = pipes.batch(8)
    model = pipes.mlp()
    calls = iter([0, 1 / 1, "raise"])

    def fail(gradient):
        if next(calls, None) == "raise":
            raise ValueError("out of luck")

    model[2].weight.register_hook(fail)
    pipe = GPipe(model, balance=[2, 2, 2], micro_batches=4, schedule="zero-bubble")
    meters = pipe.measure_saved()
    with pytest.raises(
        StageError, match="stage 1 failed in the gradients of weights of micro-batch 2: ValueError: out of luck"
    ):
        pipe.step(x, target, F.mse_loss)
    assert not any(meter.now for meter in meters)
    pipe.zero_grad()
    pipe.step(x, target, F.mse_loss)
    _, wanted = pipes.gradients(pipes.mlp(), x, target, F.mse_loss)
    assert all(torch.allclose(one.grad, wanted[name]) for name, one in pipe.named_parameters())


def test_layers_in_shards_are_refused():
    layer = nn.Linear(8, 8)
    layer.__class__ = type("FSDPLinear", (FSDPModule, nn.Linear), {})
    pipe = GPipe(nn.Sequential(layer, nn.Linear(8, 8)), 2, 2, schedule="zero-bubble")
    with pytest.raises(InputError, match="schedule is 'zero-bubble', and layers are in shards"):
        pipe.step(torch.zeros(4, 8), torch.zeros(4, 8), F.mse_loss)
