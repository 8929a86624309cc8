"""The record of a call of experts: what it is taken apart into makes it again, and casts are seen by autograd."""

import torch

from anabranch.nn.expert_call import ExpertCall
from anabranch.routing.decision import Routing
from anabranch.routing.dispatch import plan_dispatch


def make(dtype=torch.float32):
    """Three items, of which the second leaves one of its two choices unused."""
    index = torch.tensor([[0, 1], [1, -1], [1, 0]])
    plan = plan_dispatch(Routing(index, torch.ones(3, 2), torch.ones(3, 2)))
    tensors = (
        torch.randn(3, 4),
        plan.choice_R,
        plan.offset_E,
        torch.ones(3, 2),
        torch.randn(2, 6, 4),
        torch.randn(2, 4, 3),
    )
    return ExpertCall(*tensors, on_input=False, dtype=dtype, backend="torch", activation="swiglu")


def test_tensors_and_options_make_the_call_again():
    call = make()
    assert all(isinstance(part, torch.Tensor) for part in call.tensors)
    assert not any(isinstance(part, torch.Tensor) for part in call.options)
    again = ExpertCall(*call.tensors, *call.options)
    assert all(ours is theirs for ours, theirs in zip(again, call, strict=True))


def test_the_plan_is_the_one_that_it_was_made_of():
    plan = make().plan
    assert (plan.num_items, plan.num_choices) == (3, 2)
    assert plan.load_E.tolist() == [2, 3]
    assert plan.item_R[:5].tolist() == [0, 2, 0, 1, 2]


def test_casts_are_of_items_and_matrices_and_have_gradients():
    call = make(torch.bfloat16)
    call = call._replace(x_ND=call.x_ND.requires_grad_(), w2_EDF=call.w2_EDF.requires_grad_())
    cast = call.cast()
    assert [part.dtype for part in (cast.x_ND, cast.w13_EFD, cast.w2_EDF)] == [torch.bfloat16] * 3
    assert cast.weight_NK is call.weight_NK
    (cast.x_ND.sum() + 2 * cast.w2_EDF.sum()).backward()
    assert call.x_ND.grad is not None
    assert (call.x_ND.grad == 1).all()
    assert (call.w2_EDF.grad == 2).all()
