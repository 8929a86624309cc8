"""GPipe with a rank per stage: the same gradients, messages, errors on every rank, replicas beside pipelines."""

import pipes

import pytest
import torch
import torch.nn.functional as F

from anabranch.testing import run_ranks


@pytest.mark.parametrize(
    ("kind", "world", "items", "options"),
    [
        ("mlp", 2, 7, {"micro_batches": 4, "checkpoint": "always"}),
        ("skips", 3, 8, {"micro_batches": 2}),
        ("lm", 2, 5, {"micro_batches": 3, "checkpoint": "never", "schedule": "1f1b"}),
        ("mlp", 2, 6, {"micro_batches": 3, "schedule": "interleaved"}),
    ],
)
def test_gradients_are_those_of_the_unsplit_model(kind, world, items, options):
    found = run_ranks(pipes.steps_of, world, kind, items, options)
    loss_fn = pipes.loss_of(kind)
    for step in range(2):
        model, (x, target) = pipes.MODELS[kind](), pipes.data_of(kind, items + step)
        loss, wanted = pipes.gradients(model, x, target, loss_fn)
        assert [rank["losses"][step] for rank in found] == [pytest.approx(loss.item(), rel=1e-12)] * world
    merged = {name: gradient for rank in found for name, gradient in rank["gradients"].items()}
    # Both names of what is tied have the sum.
    names = set(wanted) | ({"4.weight"} if kind == "lm" else set())
    assert set(merged) == names
    for name in names:
        gradient = wanted["0.weight" if (kind, name) == ("lm", "4.weight") else name]
        assert torch.allclose(merged[name], gradient, rtol=1e-10, atol=1e-12), name
    assert all(list(rank["state"]) == list(model.state_dict()) for rank in found)
    assert [rank["output"] is None for rank in found] == [True] * (world - 1) + [False]
    assert torch.allclose(found[-1]["output"], model(x))
    if kind == "skips":
        assert found[0]["log"].bytes_RR[0, 2] > 0
        assert found[0]["log"].of_kind("skip") > 0


@pytest.mark.parametrize(("kind", "stage"), [("forward", 1), ("backward", 0), ("backward", 2)])
def test_an_error_of_a_stage_reaches_every_rank_and_the_next_step_works(kind, stage):
    found = run_ranks(pipes.failing_step, 3, kind, stage)
    for rank, (told, loss) in enumerate(found):
        assert told[0] == f"StageError: stage {stage} failed in the {kind} of micro-batch 1: ValueError: out of luck"
        assert told[1] == (repr(ValueError("out of luck")) if rank == stage else "None")
        assert loss == found[0][1]


def test_pipelines_beside_each_other_average_their_gradients():
    found = run_ranks(pipes.replicas, 4, 8)
    _, wanted = pipes.gradients(pipes.mlp(), *pipes.batch(8), F.mse_loss)
    for rank in found:
        assert rank
        for name, gradient in rank.items():
            assert torch.allclose(gradient, wanted[name], rtol=1e-10)
    assert set(found[0]) | set(found[1]) == set(wanted)
