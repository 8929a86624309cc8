"""A step's work without links: whoever has which samples, sums, masks and losses are the same."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anabranch.cluster import KeyedDropout
from anabranch.cluster.elastic.execution import StageStep, StepSettings, Work, check_batch, draws_of
from anabranch.cluster.elastic.layout import Grid, Layout
from anabranch.cluster.elastic.tree import TreeSum
from anabranch.errors import ConfigError, InputError

WIDTH, SAMPLES = 5, 6


class Noise(nn.Module):
    """A layer that draws by itself, of two tensors."""

    def forward(self, value):
        x = value[0] if isinstance(value, tuple) else value
        return x + torch.randn_like(x), x * torch.rand(len(x), 1)


class Joined(nn.Module):
    """Its inputs added, with a mask."""

    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(WIDTH, 3), nn.Dropout(0.4)

    def forward(self, value):
        return self.linear(self.drop(value[0] + value[1]))


def layers_of():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)), Noise(), Joined()]


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SAMPLES, WIDTH, generator=generator), torch.randint(3, (SAMPLES,), generator=generator)


def keyed_of(also_by_itself=True):
    """Layers whose masks are keyed, beside torch's own ones and without."""
    torch.manual_seed(0)
    more = [nn.Dropout(0.3)] if also_by_itself else []
    first = nn.Sequential(nn.Linear(WIDTH, WIDTH), KeyedDropout(0.5), *more, KeyedDropout(0.5))
    return [first, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)]


def run(
    replicas, *, is_exact, micro_batches=2, block=1, step=3, loss=F.cross_entropy, samples=SAMPLES, layers_of=layers_of, draws=True, seed=7
):  # fmt: skip
    """(loss, gradients by layer) of all ranks of one stage."""
    layout = Layout(Grid.full(replicas=replicas, stages=1), (), 3)
    settings = StepSettings(samples, micro_batches, block, is_exact, loss, seed, (draws,) * 3)
    leaves = settings.leaves(replicas)
    losses, sums, terms = TreeSum(leaves), {}, {}
    for rank in range(replicas):
        layers = layers_of()
        made = StageStep(Work(layout, rank, settings, "1f1b", [1.0] * 3), settings, layers, None, step)
        made.run(tuple(part[:samples] for part in batch()), lambda state: None)
        for own, all_of in [
            (made.losses, losses),
            *((tree, sums.setdefault(n, TreeSum(leaves))) for n, tree in made.sums.items()),
        ]:
            for node, value in own.nodes():
                all_of.add_node(node, value)
        for name, tree in made.terms.items():
            for node, value in tree.nodes():
                terms.setdefault(name, TreeSum(leaves)).add_node(node, value)
        for leaf in made.absent:
            losses.add(leaf, 0.0)
    return losses.root(), {n: tree.root() for n, tree in sums.items()}, terms


@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
@pytest.mark.parametrize("is_exact", [True, False])
def test_masks_are_functions_of_the_sample_whoever_has_it(replicas, is_exact):
    """Without a fixed order of sums masks were those of a rank's first sample, so each loss of a rank changed them all."""
    whole, gradients, _ = run(1, is_exact=True)
    found, other, _ = run(replicas, is_exact=is_exact)
    assert found == pytest.approx(whole, rel=1e-6)
    if is_exact:
        assert found == whole
    for number, gradient in gradients.items():
        assert torch.allclose(other[number], gradient, rtol=1e-5, atol=1e-7)
        assert not is_exact or torch.equal(other[number], gradient)
    # And of the step.
    assert run(replicas, is_exact=is_exact, step=4)[0] != pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize(("also_by_itself", "draws"), [(True, True), (False, True), (False, False)])
def test_keyed_masks_are_those_of_their_samples_whatever_else_draws(also_by_itself, draws):
    """Beside a module of torch's that draws every sample of a run had the mask of its first."""

    def found(replicas, **more):
        return run(replicas, layers_of=partial(keyed_of, also_by_itself), draws=draws, **more)[0]

    whole = found(1, is_exact=True)
    for replicas in (1, 2, 3):
        assert found(replicas, is_exact=False) == pytest.approx(whole, rel=1e-6)
        assert found(replicas, is_exact=True) == whole
    # And functions of the seed, which every rank has from the trainer.
    assert found(1, is_exact=True, seed=8) != pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("micro_batches", [1, 3, 6])
def test_masks_do_not_depend_on_micro_batches(micro_batches):
    assert run(2, is_exact=False, micro_batches=micro_batches)[0] == pytest.approx(run(1, is_exact=True)[0], rel=1e-6)


@pytest.mark.parametrize("is_exact", [True, False])
def test_ranks_without_samples_add_nothing(is_exact):
    """A rank with nothing to do made the loss of all not a number, or its vote not a whole one."""
    few = run(1, is_exact=True, samples=2)
    found = run(5, is_exact=is_exact, samples=2)
    assert found[0] == pytest.approx(few[0], rel=1e-6)
    assert torch.allclose(found[1][0], few[1][0], rtol=1e-5, atol=1e-7)


def test_a_loss_that_tells_other_terms_of_some_samples_is_refused():
    calls = []

    def loss(output, target):
        calls.append(1)
        return F.cross_entropy(output, target), {"z": 1.0} if len(calls) < 3 else {}

    with pytest.raises(ConfigError, match=r"told \['z'\] of some samples and \[\] of others"):
        run(1, is_exact=True, loss=loss)


@pytest.mark.parametrize("is_exact", [True, False])
def test_terms_are_means_over_all_samples(is_exact):
    def loss(output, target):
        return F.cross_entropy(output, target), {"z": float(target.float().mean())}

    *_, terms = run(3, is_exact=is_exact, loss=loss)
    assert terms["z"].root() == pytest.approx(float(batch()[1].float().mean()))


def test_a_loss_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match=r"the loss has shape \[1, 3\]"):
        run(1, is_exact=True, loss=partial(lambda output, target: output))


def test_a_batch_of_another_size_is_refused():
    check_batch(batch(), SAMPLES)
    for wrong in (batch()[0], (batch()[0][:3], batch()[1]), (batch()[0], None), (torch.tensor(1.0), batch()[1])):
        with pytest.raises(InputError):
            check_batch(wrong, SAMPLES)


def test_layers_that_draw_are_found():
    assert [draws_of(layer) for layer in layers_of()] == [True, False, True]
    assert draws_of(nn.TransformerEncoderLayer(4, 1, 4))
    assert not draws_of(nn.Linear(2, 2))
