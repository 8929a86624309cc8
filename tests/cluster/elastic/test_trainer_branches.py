"""Parameters without a part in a step are left as one process leaves them, in real processes, through kills, joins and checkpoints."""

import pytest
import torch

import elastic_branches as branches
from anabranch.cluster.elastic import Coordinator
from anabranch.cluster.elastic.saving import read_slices
from anabranch.testing import Ranks
from elastic_ranks import SECRET, train

STEPS, SAMPLES = 12, 10
COSTS = [1.0] * len(branches.layers_of())
SIZES = [sum(p.numel() for p in layer.parameters()) for layer in branches.layers_of()]
OPTIONS = {"makes": (branches.layers_of, branches.batch_of), "dtype": torch.float64}


def run(die=None, *, steps=STEPS, mesh=(2, 2), options=None, own=None, while_running=None, coordinator=None):
    """(what each rank that was not lost returned, what the coordinator did)."""
    replicas, stages = mesh
    with Coordinator(replicas=replicas, stages=stages, secret=SECRET, layer_costs=COSTS, **(coordinator or {})) as host:
        given = {"mesh": mesh, **OPTIONS, **(options or {})}
        arguments = (host.address, steps, given, die, 0.0, own)
        with Ranks(replicas * stages, train, *arguments, backend=None, timeout_s=60) as ranks:
            for rank in die or {}:
                ranks.expect_end(rank)
            if while_running is not None:
                while_running(ranks, host, given)
            return ranks.wait(), [what for _, what, _ in host.history]


def check(found, losses, weights):
    for one in found:
        for step, loss in one["losses"].items():
            assert loss == pytest.approx(losses[step], rel=1e-12), (one["rank"], step)
        for name, value in weights.items():
            assert torch.tensor(one["weights"][name], dtype=torch.float64) == pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.fixture(scope="module")
def one():
    losses, weights, without = branches.alone(STEPS, SAMPLES)
    # There are steps in which a whole stage has no part, and such in which an expert has none.
    assert {len({name.partition(".")[0] for name in names}) for names in without} >= {3, 4}
    return losses, weights


@pytest.mark.parametrize(
    ("mesh", "options", "coordinator"),
    [
        ((1, 1), {}, {}),
        ((2, 2), {}, {}),
        pytest.param((3, 1), {"exact": False}, {}, marks=pytest.mark.slow),
        ((1, 2), {"exact": False}, {}),
        pytest.param((1, 4), {"block": 2}, {}, marks=pytest.mark.slow),
    ],
)
def test_who_has_no_part_in_a_step_is_left_as_one_process_leaves_it(one, mesh, options, coordinator):
    check(run(mesh=mesh, options=options, coordinator=coordinator)[0], *one)


@pytest.mark.parametrize(
    "die", [{1: ("forward", 9)}, pytest.param({2: ("vote", 3)}, marks=pytest.mark.slow), {3: ("snapshot", 5)}]
)
def test_nor_does_a_loss_change_that(one, die):
    """Layers of the stage that lost a rank go to others in small chunks meanwhile, by gradients of which some have none."""
    found, did = run(die, coordinator={"chunk_bytes": 64})
    assert len(found) == 3
    assert "stream" in did
    check(found, *one)


def test_nor_does_one_that_comes(one):
    def join(ranks, host, given):
        assert host.wait_for(lambda host: any(what == "lost" for _, what, _ in host.history))
        ranks.join(train, host.address, STEPS, given, None, 0.0)

    found, did = run(
        {1: ("forward", 9)},
        while_running=join,
        own={rank: {"pace_step": 2} for rank in range(4)},
        coordinator={"chunk_bytes": 64},
    )
    assert sorted(one["rank"] for one in found) == [0, 2, 3, 4]
    assert "stream" in did
    check(found, *one)


def test_what_each_parameter_has_of_the_optimizer_is_in_a_checkpoint(one, tmp_path):
    folder = tmp_path / "kept"
    run(steps=4, options={"saves": (str(folder), [4])})
    version, slices = read_slices(folder, SIZES)
    assert version == 4
    # Of the first branches: taken in steps 0, 1 and 3, one in two of them each but for the last, in two.
    assert slices[0].scalars["step"].tolist() == [2, 2, 1, 1, 2, 2]
    check(run(mesh=(1, 3), options={"resume": str(folder)})[0], *one)
