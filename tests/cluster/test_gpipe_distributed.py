"""GPipe with a rank per stage: the same gradients, messages, errors on every rank, replicas beside pipelines."""

import pipes

import pytest
import torch
import torch.nn.functional as F

from anabranch.testing import RankError, run_ranks

# Of one start of so many ranks: (model, items, options).
CASES = {
    2: [
        ("mlp", 7, {"micro_batches": 4, "checkpoint": "always"}),
        ("lm", 5, {"micro_batches": 3, "checkpoint": "never", "schedule": "1f1b"}),
        ("mlp", 6, {"micro_batches": 3, "schedule": "interleaved"}),
        ("lm", 5, {"micro_batches": 3, "schedule": "zero-bubble"}),
    ],
    3: [
        ("skips", 8, {"micro_batches": 2}),
        ("mlp", 5, {"micro_batches": 1, "checkpoint": "never"}),
        ("skips", 9, {"micro_batches": 4, "schedule": "zero-bubble", "checkpoint": "never"}),
    ],
}


@pytest.mark.parametrize("world", CASES)
def test_gradients_are_those_of_the_unsplit_model(world):
    by_rank = run_ranks(pipes.all_steps_of, world, CASES[world])
    for number, (kind, items, _) in enumerate(CASES[world]):
        check_steps(kind, world, items, [cases[number] for cases in by_rank])


def check_steps(kind, world, items, found):
    for step in range(2):
        model, (x, target) = pipes.MODELS[kind](), pipes.data_of(kind, items + step)
        loss, wanted = pipes.gradients(model, x, target, pipes.loss_of(kind))
        assert [rank["losses"][step] for rank in found] == [pytest.approx(loss.item(), rel=1e-12)] * world
    merged = {name: gradient for rank in found for name, gradient in rank["gradients"].items()}
    # Both names of what is tied have the sum.
    names = set(wanted) | ({"4.weight"} if kind == "lm" else set())
    assert set(merged) == names
    for name in names:
        gradient = wanted["0.weight" if (kind, name) == ("lm", "4.weight") else name]
        assert torch.allclose(merged[name], gradient, rtol=1e-10, atol=1e-12), name
    assert all(list(rank["state"]) == list(model.state_dict()) for rank in found)
    assert all(rank["is_read"] for rank in found)
    assert [rank["output"] is None for rank in found] == [True] * (world - 1) + [False]
    assert torch.allclose(found[-1]["output"], model(x))
    if kind == "skips":
        assert found[0]["log"].bytes_RR[0, 2] > 0
        assert found[0]["log"].of_kind("skip") > 0


def test_keys_of_no_layer_are_told_on_every_rank_and_those_of_a_layer_where_it_is():
    local = pipes.told_of_keys(0, 1, "local")
    found = run_ranks(pipes.told_of_keys, 2)
    for rank, told in enumerate(found):
        for what in ("of no layer", "of no layer at all", "not strict"):
            assert told[what] == local[what]
        assert told["of a layer"] == (None if rank else local["of a layer"])
        assert told["missing"].startswith("RuntimeError: ")
        assert ('"0.weight"' in told["missing"], '"4.weight"' in told["missing"]) == (not rank, bool(rank))


def test_an_error_of_a_stage_reaches_every_rank_and_the_next_step_works():
    where = [("forward", 1), ("backward", 0), ("backward", 2), ("boundary", 0)]
    found = run_ranks(pipes.failing_steps, 3, where)
    for number, (kind, stage) in enumerate(where):
        when, why = kind, "ValueError: out of luck"
        if kind == "boundary":
            when, why = "forward", "TypeError: a boundary of stages carries tensors"
        for rank, cases in enumerate(found):
            (told, cause), loss = cases[number]
            assert told.startswith(f"StageError: stage {stage} failed in the {when} of micro-batch 1: {why}")
            assert cause == (why.partition(":")[0] if rank == stage else "NoneType")
            assert loss == found[0][number][1]


def test_a_target_that_does_not_fit_ends_the_step_on_every_rank():
    first = "StageError: stage 1 failed in the forward of micro-batch 0: InputError: target has 3 items, and x has 4"
    for rank, told in enumerate(run_ranks(pipes.wrong_target, 2)):
        assert told[0].startswith(first)
        assert told[1].startswith(
            "InputError: the first stage was given no batch" if rank else "InputError: x has no items"
        )


def test_a_rank_that_vanishes_in_a_step_ends_the_others():
    with pytest.raises(RankError, match="rank 1: ended with code 3"):
        run_ranks(pipes.vanishing_step, 2, timeout_s=60)


@pytest.mark.parametrize("way", [pipes.replicas, pytest.param(pipes.sharded, marks=pytest.mark.slow)])
def test_pipelines_beside_each_other_average_their_gradients(way):
    found = run_ranks(way, 4, 8)
    _, wanted = pipes.gradients(pipes.mlp(), *pipes.batch(8), F.mse_loss)
    for rank in found:
        assert rank
        for name, gradient in rank.items():
            assert torch.allclose(gradient, wanted[name], rtol=1e-10)
    assert set(found[0]) | set(found[1]) == set(wanted)
