"""Parameters of several stages, over steps whose gradients are left there: as in one process, frozen, unused and hooked ones too."""

import pytest
import torch

import tied_pipes as tied
from anabranch.cluster import GPipe
from anabranch.cluster.gpipe import StageError
from anabranch.testing import run_ranks


def check_same(case, found):
    """What one process or rank has against one process without stages."""
    (steps, seen), (wanted, expected) = found, tied.alone(case)
    for number, ((loss, gradients, weights), (wanted_loss, *of_all)) in enumerate(zip(steps, wanted, strict=True)):
        assert loss == pytest.approx(wanted_loss, rel=1e-12), f"loss of step {number}"
        for what, values, others in zip(("gradient", "weight"), (gradients, weights), of_all, strict=True):
            for name, value in values.items():
                said = f"{what} of {name} in step {number}"
                assert (value is None) == (others[name] is None), said
                assert value is None or torch.allclose(value, others[name], rtol=1e-9, atol=1e-11), said
    here = {name.rpartition(".")[2] for name in steps[0][1]}
    expected = [told for told in expected if told[0] in here]
    # Each hook once a step; those of two parameters in any order.
    for name in case["ties"]:
        mine, theirs = ([value for told, value in each if told == name] for each in (seen, expected))
        assert len(mine) == len(theirs), f"calls of hooks of {name}"
        assert all(torch.allclose(*pair, rtol=1e-9, atol=1e-11) for pair in zip(mine, theirs, strict=True)), name


@pytest.mark.parametrize("stages", [2, 3])
def test_in_threads(stages):
    for seed in range(25):
        case = tied.drawn(seed, stages)
        check_same(case, tied.in_stages(case))


def test_over_ranks():
    cases = [tied.drawn(seed, 2) for seed in range(100, 110)]
    for found in run_ranks(tied.all_in_stages, 2, cases):
        for case, of_case in zip(cases, found, strict=True):
            check_same(case, of_case)


def wanted_of(kind):
    build, (name, _), x = tied.KINDS[kind]
    model = build()
    for _ in range(2):
        (model(x()) ** 2).mean().backward()
    return model.get_parameter(name).grad.to_dense()


def test_layers_that_keep_what_is_tied_in_other_places_too_and_sparse_gradients():
    by_rank = run_ranks(tied.over_ranks, 2)
    for kind in tied.KINDS:
        for found in (tied.gradient_of(kind).to_dense(), *(rank[kind] for rank in by_rank)):
            assert torch.allclose(found, wanted_of(kind), rtol=1e-5), kind


def test_what_ranks_cannot_agree_on_is_told_on_all_of_them():
    for found in run_ranks(tied.errors, 2):
        assert found[0].startswith(
            "InputError: 0.weight and 1.weight are one parameter of 2 stages, and requires_grad is set on 1 of them; freeze it on all ranks"
        )
        assert "InputError: 0.weight and 1.weight are one parameter of several stages with hooks" in found[1]
        # Nothing is sent of one that learns nothing.
        assert found[2] == ()


def test_hooks_that_would_see_parts_are_refused_and_what_was_there_stays():
    model = tied.read_elsewhere(True)
    pipe = GPipe(model, stages=2, tied="auto")
    before = model[0].weight.grad = torch.ones(tied.WIDTH, tied.WIDTH)
    with pytest.raises(StageError, match="a layer works with it by another way than its own attribute"):
        pipe.step(torch.ones(3, tied.WIDTH), torch.zeros(3, tied.WIDTH), torch.nn.functional.mse_loss)
    assert model[0].weight.grad is before
    assert model[0].weight is model[1].weight
