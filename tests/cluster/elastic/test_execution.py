"""A step's work without links: whoever has which samples, sums, masks and losses are the same."""

import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import elastic_branches as branches
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


def batch_of():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SAMPLES, WIDTH, generator=generator), torch.randint(3, (SAMPLES,), generator=generator)


def keyed_of(also_by_itself=True):
    """Layers whose masks are keyed, beside torch's own ones and without."""
    torch.manual_seed(0)
    more = [nn.Dropout(0.3)] if also_by_itself else []
    first = nn.Sequential(nn.Linear(WIDTH, WIDTH), KeyedDropout(0.5), *more, KeyedDropout(0.5))
    return [first, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)]


def run(
    replicas,
    *,
    is_exact,
    micro_batches=2,
    block=1,
    step=3,
    loss=F.cross_entropy,
    samples=SAMPLES,
    layers_of=layers_of,
    draws=True,
    seed=7,
):
    """(loss, gradients by layer) of all ranks of one stage."""
    layout = Layout(Grid.full(replicas=replicas, stages=1), (), 3)
    settings = StepSettings(samples, micro_batches, block, is_exact, loss, seed, (draws,) * 3)
    leaves = settings.leaves(replicas)
    losses, sums, terms = TreeSum(leaves), {}, {}
    for rank in range(replicas):
        layers = layers_of()
        made = StageStep(Work(layout, rank, settings, "1f1b", [1.0] * 3), settings, layers, None, step)
        made.run(tuple(part[:samples] for part in batch_of()), lambda state: None)
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


class Wires:
    """Links of ranks that are threads of this process."""

    def __init__(self):
        self.arrived, self.sent = threading.Condition(), {}

    def of(self, rank):
        wires = self

        class Links:
            def send(self, target, tag, tensors, **more):
                with wires.arrived:
                    wires.sent[rank, target, tag] = [tensor.clone() for tensor in tensors], more
                    wires.arrived.notify_all()

            def receive(self, source, tag):
                with wires.arrived:
                    assert wires.arrived.wait_for(lambda: (source, rank, tag) in wires.sent, 60)
                    return wires.sent.pop((source, rank, tag))

        return Links()


def grid_of(stages, schedule, *, is_exact=True, micro_batches=2, layers_of=layers_of, depth=3, batch=None):
    """(loss, gradients by layer, the most bytes that each rank kept, what each made) of stages that have so many ranks each."""
    batch = batch or batch_of()
    ranks = iter(range(sum(stages)))
    grid = Grid(tuple(tuple(next(ranks) for _ in range(count)) for count in stages), max(stages))
    layout = Layout(grid, tuple(range(1, len(stages))), depth)
    settings = StepSettings(SAMPLES, micro_batches, 1, is_exact, F.cross_entropy, 7, (True,) * depth)
    wires, found, errors = Wires(), {}, []
    # Before there are threads: they would draw from one generator.
    layers = {rank: layers_of() for rank in grid.ranks}

    def work(rank):
        try:
            made = StageStep(
                Work(layout, rank, settings, schedule, [1.0] * depth), settings, layers[rank], wires.of(rank), 3
            )
            made.run(batch, lambda state: None)
            assert made.meter.now == 0
            found[rank] = made
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in grid.ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    losses, sums = TreeSum(settings.leaves(stages[-1])), {}
    for stage in grid.stages:
        for rank in stage:
            for node, value in found[rank].losses.nodes():
                losses.add_node(node, value)
            for layer, tree in found[rank].sums.items():
                for node, value in tree.nodes():
                    sums.setdefault(layer, TreeSum(settings.leaves(len(stage)))).add_node(node, value)
    made = [found[rank] for rank in grid.ranks]
    return losses.root(), {n: tree.root() for n, tree in sums.items()}, [one.meter.most for one in made], made


@pytest.mark.parametrize("schedule", ["zero-bubble", "decoupled"])
@pytest.mark.parametrize(("stages", "micro_batches"), [((1,), 3), ((2, 2), 3), ((1, 2), 2), ((2, 1, 3), 6)])
@pytest.mark.parametrize("is_exact", [True, False])
def test_gradients_of_weights_that_come_later_are_the_same(schedule, stages, micro_batches, is_exact):
    options = {"is_exact": is_exact, "micro_batches": micro_batches, "layers_of": plain_of}
    loss, gradients, kept, _ = grid_of(stages, schedule, **options)
    at_once, wanted, nothing, _ = grid_of(stages, "1f1b", **options)
    assert loss == at_once
    assert gradients.keys() == wanted.keys()
    for layer, gradient in gradients.items():
        assert gradient.any()
        assert torch.equal(gradient, wanted[layer])
    assert min(kept) > 0
    assert not any(nothing), "a backward at once is not counted"


@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble", "decoupled"])
@pytest.mark.parametrize("stages", [(1,), (2, 1), (1, 2, 1)])
@pytest.mark.parametrize("is_exact", [True, False])
def test_what_has_no_part_in_a_step_is_told_through_all_stages(schedule, stages, is_exact):
    """Also where a layer behind makes nothing of what it is given: layers in front had gradients of 0 then."""
    sizes = [len(list(layer.parameters())) for layer in branches.layers_of()]
    for step, names in enumerate(branches.alone(8, SAMPLES)[2]):
        wanted = {n: set() for n in range(len(sizes))}
        for name in names:
            layer, _, rest = name.partition(".")
            wanted[int(layer)].add([own for own, _ in branches.layers_of()[int(layer)].named_parameters()].index(rest))
        layers = {"layers_of": lambda: [layer.float() for layer in branches.layers_of()], "depth": len(sizes)}
        *_, made = grid_of(
            stages, schedule, is_exact=is_exact, batch=branches.batch_of(step, SAMPLES, torch.float32), **layers
        )
        found = {}
        for one in made:
            for layer, without in one.without.items():
                found[layer] = found.get(layer, frozenset(range(sizes[layer]))) & without
        assert found == wanted, step


def plain_of():
    torch.manual_seed(0)
    middle = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3))
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)), middle, nn.Linear(WIDTH, 3)]


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
    assert terms["z"].root() == pytest.approx(float(batch_of()[1].float().mean()))


def test_a_loss_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match=r"the loss has shape \[1, 3\]"):
        run(1, is_exact=True, loss=partial(lambda output, target: output))


def test_a_batch_of_another_size_is_refused():
    check_batch(batch_of(), SAMPLES)
    for wrong in (
        batch_of()[0],
        (batch_of()[0][:3], batch_of()[1]),
        (batch_of()[0], None),
        (torch.tensor(1.0), batch_of()[1]),
    ):
        with pytest.raises(InputError):
            check_batch(wrong, SAMPLES)


def test_layers_that_draw_are_found():
    assert [draws_of(layer) for layer in layers_of()] == [True, False, True]
    assert draws_of(nn.TransformerEncoderLayer(4, 1, 4))
    assert not draws_of(nn.Linear(2, 2))
