"""Where two configs differ: every field by its path, and nothing else."""

from hypothesis import given
from hypothesis import strategies as st

from anabranch.lm import Decoder
from anabranch.lm.differences import Difference, differences, shown
from anabranch.nn import MoE, SwiGLU
from anabranch.routing import Router, SwitchLoss, TopK, TopP, ZLoss


def moe(**router):
    return Decoder.Config(num_layers=2, feed_forward=MoE.Config(num_experts=4, router=Router.Config(**router)))


def found(wanted, held):
    return {one.path: (one.wanted, one.held) for one in differences(wanted, held, "model")}


def test_fields_are_found_wherever_they_are():
    assert found(moe(), moe()) == {}
    assert found(moe(), moe(select=TopK.Config(top_k=1)).replace(dim=64)) == {
        "model.dim": (moe().dim, 64),
        "model.feed_forward.router.select.top_k": (2, 1),
    }


def test_parts_of_two_kinds_are_one_difference():
    select, other = TopK.Config(), TopP.Config()
    assert found(moe(select=select), moe(select=other)) == {"model.feed_forward.router.select": (select, other)}
    plain = Decoder.Config(num_layers=2, feed_forward=SwiGLU.Config())
    assert list(found(moe(), plain)) == ["model.feed_forward"]


def test_several_parts_are_compared_as_one_value():
    one, two = (SwitchLoss.Config(),), (SwitchLoss.Config(), ZLoss.Config())
    assert found(moe(balance=one), moe(balance=two)) == {"model.feed_forward.router.balance": (one, two)}


@given(st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1), st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1))
def test_a_field_is_within_itself_and_what_holds_it(path, whole):
    """Names count whole: ``ab`` is no field of ``a``."""
    one = Difference(".".join(path), 1, 2)
    assert one.is_within(".".join(whole)) == (path[: len(whole)] == whole)
    assert one.is_within("elsewhere", ".".join(whole)) == one.is_within(".".join(whole))
    assert not one.is_within()


def test_values_are_shown_in_few_words():
    assert shown(3) == "3"
    assert shown("low") == "'low'"
    assert shown(TopP.Config()) == "'top_p'"
    assert shown((SwitchLoss.Config(), ZLoss.Config())) == "['switch', 'z_loss']"
    assert shown(()) == "[]"
