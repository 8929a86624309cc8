"""What a step leaves behind: buffers under recomputation, skips and layers that work in place, stages that hang."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anabranch.cluster import GPipe, Pop, Stash
from anabranch.errors import InputError


def learned(model, *, steps=2, **options):
    """Losses, gradients and buffers of some steps."""
    torch.manual_seed(1)
    x, target = torch.randn(8, 6), torch.randn(8, 2)
    pipe = GPipe(copy.deepcopy(model), **options)
    losses = [float(pipe.step(x, target, F.mse_loss)) for _ in range(steps)]
    return losses, {name: one.grad for name, one in pipe.named_parameters()}, dict(pipe.named_buffers())


class Counting(nn.Module):
    """Adds what it has counted so far: a forward that is done again must begin from the same count."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1
        return x + self.count


def with_instance_norm():
    return [nn.Unflatten(1, (3, 2)), nn.InstanceNorm1d(3, track_running_stats=True), nn.Flatten()]


NORMS = {
    "instance norm": with_instance_norm,
    "batch norm": lambda: [nn.BatchNorm1d(6)],
    "spectral norm": lambda: [nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))],
    "spectral norm by hooks": lambda: [nn.utils.spectral_norm(nn.Linear(6, 6))],
    "a buffer that is replaced": lambda: [Counting()],
    "one that does not move": lambda: [nn.BatchNorm1d(6).eval()],
}


@pytest.mark.parametrize("checkpoint", ["always", "except_last"])
@pytest.mark.parametrize("name", NORMS)
def test_a_recomputation_finds_buffers_as_they_were_and_leaves_them_as_they_are(name, checkpoint):
    model = nn.Sequential(nn.Linear(6, 6), *NORMS[name](), nn.Tanh(), nn.Linear(6, 2))
    kept = learned(model, stages=2, micro_batches=2, checkpoint="never")
    again = learned(model, stages=2, micro_batches=2, checkpoint=checkpoint)
    assert again[0] == kept[0]
    for found, expected in zip(again[1:], kept[1:], strict=True):
        assert found.keys() == expected.keys()
        assert [key for key in found if not torch.equal(found[key], expected[key])] == []


def test_buffers_are_looked_at_anew_when_other_modules_are_in_training():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    x, target = torch.randn(8, 6), torch.randn(8, 2)
    pipes = [GPipe(copy.deepcopy(model), stages=1, micro_batches=2, checkpoint=how) for how in ("never", "always")]
    for pipe in pipes:
        pipe.get_submodule("1").eval()
        pipe.step(x, target, F.mse_loss)
        pipe.get_submodule("1").train()
        pipe.step(x, target, F.mse_loss)
    for kept, again in zip(pipes[0].buffers(), pipes[1].buffers(), strict=True):
        assert torch.equal(kept, again)


def skipping(inplace):
    return nn.Sequential(
        nn.Linear(6, 6), Stash("s"), nn.ReLU(inplace=inplace), nn.Linear(6, 6), Pop("s", torch.add), nn.Linear(6, 2)
    )


@pytest.mark.parametrize("checkpoint", ["always", "never"])
@pytest.mark.parametrize("balance", [[6], [3, 3], [2, 4], [1, 1, 4]], ids=str)
def test_what_is_stashed_is_kept_though_the_next_layer_works_in_place(balance, checkpoint):
    torch.manual_seed(0)
    model = skipping(inplace=False)
    expected = learned(model, balance=[6], checkpoint="never")
    model[2] = nn.ReLU(inplace=True)
    found = learned(model, balance=balance, checkpoint=checkpoint)
    assert found[0] == expected[0]
    for name, gradient in found[1].items():
        assert torch.equal(gradient, expected[1][name]), name


def test_a_skip_that_was_changed_since_is_refused_where_nobody_kept_a_copy():
    with pytest.raises(InputError, match="stashed under 's' was changed in place by a later layer"):
        skipping(inplace=True)(torch.randn(2, 6))
    skipping(inplace=False)(torch.randn(2, 6))


class Held(nn.Module):
    """Waits in its first pass until it is let go."""

    def __init__(self):
        super().__init__()
        self.go, self.passes = threading.Event(), 0

    def __deepcopy__(self, memo):
        raise AssertionError("not copied here")

    def forward(self, x):
        self.passes += 1
        if self.passes == 1:
            self.go.wait(60)
        return x


def test_a_stage_that_hangs_is_told_and_the_pipe_goes_on_when_it_has_ended():
    held = Held()
    pipe = GPipe(nn.Sequential(nn.Linear(2, 2), held, nn.Linear(2, 2)), balance=[1, 1, 1], timeout_s=2.0)
    x = torch.randn(4, 2)
    for _ in range(2):
        # In the second nothing is begun.
        with pytest.raises(TimeoutError, match="stage 1 did not end within"):
            pipe.step(x, x, F.mse_loss)
        pipe.timeout_s = 0.1
    assert held.passes == 1
    held.go.set()
    pipe.timeout_s = 30.0
    pipe.zero_grad()
    expected = copy.deepcopy([pipe.get_submodule("0"), pipe.get_submodule("2")])
    loss = pipe.step(x, x, F.mse_loss)
    F.mse_loss(expected[1](expected[0](x)), x).backward()
    assert loss > 0
    torch.testing.assert_close(pipe.get_submodule("0").weight.grad, expected[0].weight.grad)


class Fickle(nn.Module):
    """Computes otherwise where no gradient is wanted, as a layer with another kernel for inference."""

    def __init__(self):
        super().__init__()
        self.scale, self.graphs = nn.Parameter(torch.ones(())), []

    def forward(self, x):
        self.graphs.append(torch.is_grad_enabled())
        return x * self.scale if torch.is_grad_enabled() else x * self.scale + 1e-3


def test_an_exact_pipeline_recomputes_by_the_kernels_of_training():
    x, target = torch.randn(8, 4), torch.randn(8, 4)
    model = nn.Sequential(nn.Linear(4, 4), Fickle(), nn.Linear(4, 4), nn.Linear(4, 4))
    found = {}
    for checkpoint, is_exact in (("never", False), ("always", False), ("always", True)):
        pipe = GPipe(copy.deepcopy(model), balance=[2, 2], micro_batches=2, checkpoint=checkpoint, is_exact=is_exact)
        meters = pipe.measure_saved()
        loss = pipe.step(x, target, F.mse_loss)
        found[checkpoint, is_exact] = loss, [one.grad for one in pipe.parameters()], sum(m.most for m in meters)
        assert all(pipe.get_submodule("1").graphs) == (is_exact or checkpoint == "never")
    kept, plain, exact = found.values()
    assert exact[0] == kept[0] != plain[0]
    assert all(map(torch.equal, exact[1], kept[1]))
    # Nothing of the first forward is kept.
    assert exact[2] == plain[2]


def test_gradients_of_each_micro_batch_can_be_taken():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, dtype=torch.float64) for _ in range(4)))
    x, target = torch.randn(2, 8, 4, dtype=torch.float64)
    whole = GPipe(copy.deepcopy(model), stages=2, micro_batches=4, schedule="interleaved")
    whole.step(x, target, F.mse_loss)
    taken = {}

    def take(micro_batch, layers):
        for layer in layers:
            for parameter in layer.parameters():
                taken.setdefault(id(parameter), {})[micro_batch] = parameter.grad
                parameter.grad = None

    pipe = GPipe(copy.deepcopy(model), stages=2, micro_batches=4, schedule="interleaved")
    pipe.step(x, target, F.mse_loss, after_backward=take)
    for parameter, expected in zip(pipe.parameters(), whole.parameters(), strict=True):
        assert parameter.grad is None
        assert sorted(taken[id(parameter)]) == [0, 1, 2, 3]
        torch.testing.assert_close(sum(taken[id(parameter)].values()), expected.grad)


def test_what_is_drawn_is_keyed_by_the_micro_batch_of_all_pipelines():
    """Two pipelines of two micro-batches draw what one of four does."""
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 4))
    x, target = torch.randn(8, 4), torch.randn(8, 4)

    def loss(rows, micro_batches, first):
        pipe = GPipe(copy.deepcopy(model), stages=1, micro_batches=micro_batches)
        return float(pipe.step(x[rows], target[rows], F.mse_loss, first_micro_batch=first))

    one, first, second = loss(slice(8), 4, 0), loss(slice(4), 2, 0), loss(slice(4, 8), 2, 2)
    assert (first + second) / 2 == pytest.approx(one, rel=1e-6)
    assert loss(slice(4, 8), 2, 0) != second
