"""A run is to the bit the same in any layout of processes: stages, pipelines, recomputation, and after one of them was killed."""

import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from anabranch import presets
from anabranch.cluster.gradients import PairwiseSums
from anabranch.cluster.ranks import RankError, Ranks
from anabranch.config import override
from anabranch.errors import ConfigError, InputError
from anabranch.experts.rexmoe import ProgressiveScaling
from anabranch.routing import BiasBalancer, SwitchLoss, ZLoss
from anabranch.train import Trainer, checkpoints, read_metrics
from anabranch.train.config import Parallel
from anabranch.train.exact import Terms, norm_in_order, weighted_means
from anabranch.train.pipeline import check_cut
from exact_ranks import train
from ranks import _with_kernels


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A function from a run to (its folder, the folder of what one process made of it), once for each."""
    made = {}

    def of(config):
        key = repr(config.model)
        if key not in made:
            folder = tmp_path_factory.mktemp("exact")
            config.save(folder)
            train(0, 1, str(folder / "one"), {})
            made[key] = folder
        return made[key]

    return of


@pytest.fixture
def config(make_run, balanced_model):
    """Of all that could differ: masks drawn for each token, losses of a micro-batch, biases moved by loads, a clipped norm, a tied head."""
    model = balanced_model(SwitchLoss.Config(), ZLoss.Config(), BiasBalancer.Config(), scope="token")
    run = make_run(model.replace(tie_embeddings=True), steps=4, checkpoint_every=1, eval_every=None, clip=0.05)
    return run.replace(train=run.train.replace(batch_size=8), parallel=Parallel(exact=4))


def assert_same_bits(one, two):
    ours, theirs = ([line for line in read_metrics(run) if line["kind"] == "train"] for run in (one, two))
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("step", "loss", "cross_entropy", "auxiliary", "gradient_norm", "max_violation_by_layer"):
            assert mine.get(name) == other.get(name), name
    for file in ("model.safetensors", "optimizer.safetensors"):
        mine, other = (load_file(checkpoints(run)[-1] / file) for run in (one, two))
        assert mine.keys() == other.keys()
        assert [name for name in mine if not torch.equal(mine[name], other[name])] == []


def run_in(world, out, layout):
    _with_kernels()
    with Ranks(world, train, str(out), layout, timeout_s=120) as ranks:
        ranks.wait()


def test_a_killed_run_goes_on_in_another_layout_to_the_bit(alone, config):
    """Two pipelines of two stages lose a process; one pipeline goes on, by another schedule."""
    folder = alone(config)
    out = folder / "killed"
    _with_kernels()
    with Ranks(4, train, str(out), {"pipeline": 2, "data": 2}, True, timeout_s=120) as ranks:
        until = time.monotonic() + 120
        while len(checkpoints(out)) < 2:
            assert time.monotonic() < until
            time.sleep(0.01)
        ranks.kill(3)
        with pytest.raises(RankError, match="PeerError: another process of this run has ended"):
            ranks.wait()
    assert 2 <= len(read_metrics(out)) < config.train.steps
    run_in(2, out, {"pipeline": 2, "recompute": True, "schedule": "zero-bubble"})
    assert_same_bits(folder / "one", out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {"data": 2}),
        (4, {"data": 4}),
        (4, {"pipeline": 4}),
        (2, {"pipeline": 2, "schedule": "1f1b"}),
        (4, {"pipeline": 4, "schedule": "zero-bubble"}),
        (4, {"pipeline": 2, "data": 2, "recompute": True}),
    ],
    ids=str,
)
def test_every_layout_learns_the_same_bits(alone, config, world, layout):
    folder = alone(config)
    out = folder / f"{world}-{'-'.join(layout)}"
    run_in(world, out, layout)
    assert_same_bits(folder / "one", out)


# All but the one that runs parallel streams.
CUT = [name for name in presets.names() if name != "parscale"]


def run_of(make_run, name, **settings):
    """Two steps of a preset that is made small."""
    model = override(presets.find(name)("tiny"), {"model.dim": 32, "model.vocab_size": 257}).model
    run = make_run(model, steps=2, checkpoint_every=None, eval_every=None, **settings)
    return run.replace(train=run.train.replace(batch_size=8), parallel=Parallel(exact=4))


@pytest.mark.slow
@pytest.mark.parametrize("name", CUT)
def test_every_preset_has_the_same_bits_in_another_layout_that_recomputes(alone, make_run, name):
    """And where gradients of weights come later."""
    folder = alone(run_of(make_run, name))
    for out, layout in (
        ("four", {"pipeline": 2, "data": 2, "recompute": True}),
        ("later", {"pipeline": 2, "data": 2, "schedule": "zero-bubble"}),
    ):
        run_in(4, folder / out, layout)
        assert_same_bits(folder / "one", folder / out)


def test_a_preset_that_is_not_cut_says_so(make_run, tmp_path):
    run = run_of(make_run, "parscale")
    with pytest.raises(ConfigError, match=r"parallel\.exact is 4, and the model runs parallel streams"):
        Trainer(run, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"parallel\.pipeline is 2, and the model runs parallel streams"):
        check_cut(run.model.build(seed=0), "parallel.pipeline is 2")


@pytest.mark.parametrize(
    ("parallel", "settings", "message"),
    [
        ({"exact": 3}, {}, "exact is 3, and sums that are exact are of 1, 2, 4, 8"),
        ({"exact": 16}, {}, "exact is 16, which does not divide train.batch_size=8"),
        ({"exact": 4}, {"accumulation": 2}, "exact is 4, and train.accumulation is set"),
        ({"exact": 4, "micro_batches": 2}, {}, "exact is 4, and parallel.micro_batches is set"),
        ({"exact": 4}, {"compile": True}, "exact is 4, and train.compile is set"),
        ({"exact": 4, "experts": 2}, {}, "exact is 4, and parallel.experts is set"),
        ({"exact": 4, "schedule": "interleaved"}, {}, "exact is 4, and parallel.schedule=interleaved is set"),
        ({"exact": 4}, {"parallel": "fsdp"}, "exact is 4, and train.parallel=fsdp is set"),
    ],
)
def test_what_does_not_go_with_exactness_is_told(tmp_path, config, parallel, settings, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(config.replace(parallel=Parallel(**parallel), train=config.train.replace(**settings)), tmp_path / "run")


def test_a_run_keeps_its_number_of_micro_batches(alone, config):
    folder = alone(config)
    with pytest.raises(ConfigError, match=r"parallel\.exact was 4 and is now 2"):
        Trainer(config.replace(parallel=Parallel(exact=2)), folder / "one", resume=True)


# What is beneath.


@given(st.integers(0, 5), st.integers(0, 5), st.randoms(use_true_random=False))
def test_sums_in_pairs_are_a_function_of_their_number(log_total, log_ranks, draw):
    total, ranks = 2**log_total, 2 ** min(log_ranks, log_total)
    values = torch.tensor([draw.uniform(-1, 1) * 10 ** draw.randint(-6, 6) for _ in range(total)])

    def summed(numbers, first=0):
        sums = PairwiseSums(len(numbers))
        for number in numbers:
            sums.add(number - first, [values[number].clone(), None, values[number].clone() if number % 2 else None])
        return sums.total()

    order = list(range(total))
    expected = summed(order)
    draw.shuffle(order)
    assert torch.equal(summed(order)[0], expected[0])
    assert expected[1] is None
    # Each rank has as many in a row, and then they are added likewise.
    size = total // ranks
    of_ranks = PairwiseSums(ranks)
    for rank in range(ranks):
        of_ranks.add(rank, summed(range(rank * size, (rank + 1) * size), rank * size))
    for mine, other in zip(of_ranks.total(), expected, strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or torch.equal(mine, other)


def test_sums_in_pairs_are_refused_where_they_cannot_be():
    with pytest.raises(InputError, match="there are 6 micro-batches"):
        PairwiseSums(6)
    sums = PairwiseSums(2)
    sums.add(1, [torch.ones(1)])
    with pytest.raises(InputError, match="some are missing"):
        sums.total()
    with pytest.raises(InputError, match="micro-batch 2 is none of 0 to 1"):
        sums.add(2, [torch.ones(1)])


def test_means_do_not_depend_on_the_order_of_micro_batches():
    told = [Terms(number, 1, {"a": value}) for number, value in enumerate([1e16, 1.0, -1e16, 3.0])]
    assert weighted_means(told) == weighted_means(told[::-1]) == {"a": 1.0}
    assert weighted_means([replace(told[1], size=3), told[3]]) == {"a": 1.5}


def test_a_norm_is_that_of_all_parameters():
    gradients = [torch.tensor([3.0]), None, torch.tensor([[4.0]])]
    assert norm_in_order(gradients, None) == 5.0
    assert norm_in_order([torch.tensor([float("nan")])], None) != norm_in_order([], None) == 0.0


def test_masks_are_drawn_for_each_token(config):
    # Else the test of layouts would say nothing of draws.
    psr = config.model.feed_forward.psr
    assert isinstance(psr, ProgressiveScaling.Config)
    assert psr.scope == "token"
