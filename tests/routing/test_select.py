import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.routing import UNUSED, ExpertChoice, GroupTopK, Threshold, TopK, TopP, select
from anabranch.routing.select import stable_top_k
from strategies import naive_top_k, value_tables

INF = torch.inf


@pytest.fixture(autouse=True, scope="module", params=["few", "many"])
def _path(request):
    """Everything here twice: the way that few scores take, and the way that many do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "TINY", select.TINY if request.param == "few" else 0)
        torch.compiler.reset()
        yield


def rows(tensor_NK):
    """Lists of the used destinations of each item."""
    return [[e for e in row if e != UNUSED] for row in tensor_NK.tolist()]


# -- the order


@given(value_tables(), st.data())
def test_stable_top_k_is_a_naive_sort(value_NE, data):
    top_k = data.draw(st.integers(1, value_NE.shape[1]))
    for dtype in (torch.float32, torch.float64):
        index_NK = stable_top_k(value_NE.to(dtype), top_k)
        for row, values in zip(index_NK.tolist(), value_NE.tolist(), strict=True):
            assert row == sorted(range(len(values)), key=lambda e: (-values[e], e))[:top_k]


def test_ties_go_to_the_lowest_index():
    value_NE = torch.tensor([[0.5, 0.7, 0.7, 0.5, 0.7]])
    assert stable_top_k(value_NE, 4).tolist() == [[1, 2, 4, 0]]
    assert stable_top_k(value_NE.bfloat16(), 4).tolist() == [[1, 2, 4, 0]]
    assert stable_top_k(torch.tensor([[-0.0, 0.0]]), 2).tolist() == [[0, 1]]
    assert stable_top_k(torch.zeros(3, 64), 8).tolist() == [list(range(8))] * 3


def test_order_of_non_contiguous_values():
    value_EN = torch.rand(5, 7)
    assert torch.equal(stable_top_k(value_EN.T, 3), stable_top_k(value_EN.T.contiguous(), 3))


# -- top-k and what all selectors share


@given(value_tables(), st.data())
def test_top_k_is_a_naive_loop(value_NE, data):
    top_k = data.draw(st.integers(1, value_NE.shape[1]))
    routing = TopK.Config(top_k=top_k).build(value_NE.shape[1])(value_NE)
    assert routing.index_NK.tolist() == [naive_top_k(values, top_k) for values in value_NE.tolist()]


def test_weights_by_hand():
    logit_NE = torch.tensor([[0.0, math.log(2.0), math.log(5.0)]])
    score_NE = logit_NE.softmax(-1)  # 1 / 8, 2 / 8, 5 / 8

    def weight(**options):
        return TopK.Config(top_k=2, **options).build(3)(score_NE, logit_NE=logit_NE).weight_NK

    torch.testing.assert_close(weight(), torch.tensor([[5 / 8, 2 / 8]]))
    torch.testing.assert_close(weight(normalize="sum"), torch.tensor([[5 / 7, 2 / 7]]))
    torch.testing.assert_close(weight(normalize="softmax"), torch.tensor([[5 / 7, 2 / 7]]))
    torch.testing.assert_close(weight(normalize="sum", scale=2.5), torch.tensor([[12.5 / 7, 5 / 7]]))
    torch.testing.assert_close(weight(scale=2.0), torch.tensor([[10 / 8, 4 / 8]]))


def test_softmax_over_the_chosen_logits_is_not_over_sigmoid_scores():
    logit_NE = torch.randn(4, 6)
    routing = TopK.Config(top_k=3, normalize="softmax").build(6)(logit_NE.sigmoid(), logit_NE=logit_NE)
    torch.testing.assert_close(routing.weight_NK, logit_NE.topk(3).values.softmax(-1))


def test_k_of_all_is_the_dense_mixture():
    score_NE = torch.rand(5, 4)
    routing = TopK.Config(top_k=4).build(4)(score_NE)
    dense_NE = torch.zeros(5, 4).scatter(1, routing.index_NK, routing.weight_NK)
    assert torch.equal(dense_NE, score_NE)


def test_a_bias_moves_the_choice_but_not_the_weights():
    score_NE = torch.tensor([[0.6, 0.3, 0.1]], requires_grad=True)
    bias_E = torch.tensor([0.0, 0.0, 0.4])
    routing = TopK.Config(top_k=2).build(3)(score_NE, bias_E=bias_E)
    assert routing.index_NK.tolist() == [[0, 2]]  # 0.6, 0.5, 0.3
    torch.testing.assert_close(routing.weight_NK, torch.tensor([[0.6, 0.1]]))
    routing.weight_NK.sum().backward()
    assert score_NE.grad.tolist() == [[1.0, 0.0, 1.0]]
    assert routing.score_NE is score_NE


@pytest.mark.parametrize("normalize", ["none", "sum", "softmax"])
def test_weights_depend_on_the_bias_only_through_the_choice(normalize):
    generator = torch.Generator().manual_seed(0)
    logit_NE, bias_E = torch.randn(500, 8, generator=generator), torch.randn(8, generator=generator) * 0.2
    select = TopK.Config(top_k=3, normalize=normalize).build(8)
    biased = select(logit_NE.sigmoid(), logit_NE=logit_NE, bias_E=bias_E)
    # closing what the bias kept out makes the plain choice the same set; weights must then be the same
    open_NE = torch.zeros(500, 8, dtype=torch.bool).scatter(1, biased.index_NK, True)
    plain = select(logit_NE.sigmoid(), logit_NE=logit_NE, open_NE=open_NE)

    def dense(routing):
        return torch.zeros(500, 8).scatter(1, routing.index_NK, routing.weight_NK)

    torch.testing.assert_close(dense(biased), dense(plain))
    assert not torch.equal(biased.index_NK, select(logit_NE.sigmoid()).index_NK)


@pytest.mark.parametrize(
    "config",
    [TopK.Config(top_k=3), GroupTopK.Config(top_k=3, num_groups=4, top_groups=2)],
    ids=["top_k", "group_top_k"],
)
@pytest.mark.parametrize("constant", [-4.0, 0.5, 64.0])
def test_adding_a_constant_to_the_bias_changes_nothing(config, constant):
    # scores and biases are multiples of 2^-10, so adding the constant rounds nothing
    score_NE = torch.randint(0, 1024, (200, 8), generator=torch.Generator().manual_seed(0)) / 1024
    bias_E = torch.randint(-100, 100, (8,), generator=torch.Generator().manual_seed(1)) / 1024
    select = config.build(8)
    plain, shifted = select(score_NE, bias_E=bias_E), select(score_NE, bias_E=bias_E + constant)
    assert torch.equal(plain.index_NK, shifted.index_NK)
    assert torch.equal(plain.weight_NK, shifted.weight_NK)


EVERY = [
    TopK.Config(top_k=3),
    GroupTopK.Config(top_k=3, num_groups=4, top_groups=2),
    GroupTopK.Config(top_k=3, num_groups=4, top_groups=2, group_score="max"),
    TopP.Config(top_p=0.5),
    Threshold.Config(threshold=0.2),
    ExpertChoice.Config(capacity_factor=2.0),
]
NAMES = ["top_k", "group_top2", "group_max", "top_p", "threshold", "expert_choice"]


@pytest.mark.parametrize("config", EVERY, ids=NAMES)
@pytest.mark.parametrize("per_item", [False, True])
def test_closed_destinations_are_never_chosen_even_with_bias(config, per_item):
    """1.2 million draws: 100 000 items for each of 6 selectors, with one mask for all and with one per item."""
    generator = torch.Generator().manual_seed(1)
    num_items = 100_000
    score_NE = torch.randn(num_items, 8, generator=generator).sigmoid() * 1e-3
    open_NE = torch.rand(num_items, 8, generator=generator) < 0.5
    open_NE = open_NE if per_item else torch.tensor([True, False, True, True, False, False, True, False])
    bias_E = torch.randn(8, generator=generator).abs() * -5
    bias_E[1] = 100.0  # closed for half of the items, and the most wanted of all
    routing = config.build(8)(score_NE, bias_E=bias_E, open_NE=open_NE)
    used_NK, open_NE = routing.used_NK, open_NE.expand(num_items, 8)
    assert open_NE.gather(1, routing.index_NK.clamp_min(0))[used_NK].all()
    assert (routing.weight_NK[~used_NK] == 0).all()
    assert used_NK.any()


@pytest.mark.parametrize("config", EVERY, ids=NAMES)
@pytest.mark.parametrize("normalize", ["none", "sum", "softmax"])
def test_an_item_with_nothing_open_goes_nowhere_and_harms_no_gradient(config, normalize):
    logit_NE = torch.randn(3, 8, requires_grad=True)
    open_NE = torch.ones(3, 8, dtype=torch.bool)
    open_NE[1] = False
    score_NE = logit_NE.softmax(-1)
    routing = config.replace(normalize=normalize).build(8)(score_NE, logit_NE=logit_NE, open_NE=open_NE)
    assert rows(routing.index_NK)[1] == []
    assert (routing.weight_NK[1] == 0).all()
    routing.weight_NK.square().sum().backward()
    assert torch.isfinite(logit_NE.grad).all()
    assert (logit_NE.grad[1] == 0).all()


@pytest.mark.parametrize("config", EVERY, ids=NAMES)
def test_no_items(config):
    routing = config.build(8)(torch.zeros(0, 8))
    assert routing.num_items == 0
    assert routing.load_E().tolist() == [0] * 8


@pytest.mark.parametrize("config", EVERY, ids=NAMES)
def test_choices_of_an_item_are_distinct_and_permuting_items_permutes_them(config):
    score_NE = torch.rand(40, 8, generator=torch.Generator().manual_seed(3))
    order_N = torch.randperm(40, generator=torch.Generator().manual_seed(4))
    select = config.build(8)
    routing, permuted = select(score_NE), select(score_NE[order_N])
    for row in rows(routing.index_NK):
        assert len(set(row)) == len(row)
        assert row or not select.is_causal  # only expert choice may leave an item out
    assert torch.equal(permuted.index_NK, routing.index_NK[order_N])
    assert torch.equal(permuted.weight_NK, routing.weight_NK[order_N])


@pytest.mark.parametrize("config", EVERY, ids=NAMES)
def test_selection_compiles_into_one_graph(config):
    select, score_NE, bias_E = config.build(8), torch.rand(9, 8), torch.rand(8)

    def choose(score_NE, bias_E):
        routing = select(score_NE, bias_E=bias_E)
        return routing.index_NK, routing.weight_NK

    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    for ours, plain in zip(compiled(score_NE, bias_E), choose(score_NE, bias_E), strict=True):
        assert torch.equal(ours, plain)


# -- group-limited


def naive_group_top_k(values, config):
    size = len(values) // config.num_groups
    groups = [values[g * size : (g + 1) * size] for g in range(config.num_groups)]
    best = 1 if config.group_score == "max" else 2

    def group_score(group):
        opened = sorted((value for value in group if value > -INF), reverse=True)
        return sum(opened[:best]) if opened else -INF

    scores = [group_score(group) for group in groups]
    kept = sorted(range(config.num_groups), key=lambda g: (-scores[g], g))[: config.top_groups]
    limited = [value if e // size in kept else -INF for e, value in enumerate(values)]
    return naive_top_k(limited, config.top_k)


@given(
    st.lists(
        st.lists(st.sampled_from([-INF, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0]), min_size=12, max_size=12),
        min_size=0,
        max_size=6,
    ),
    st.sampled_from(["max", "top2_sum"]),
    st.sampled_from([(2, 1), (3, 2), (4, 2), (6, 3), (2, 2)]),
)
def test_group_top_k_is_a_naive_loop(values, group_score, groups):
    config = GroupTopK.Config(top_k=3, num_groups=groups[0], top_groups=groups[1], group_score=group_score)
    index_NK = config.build(12).choose(torch.tensor(values, dtype=torch.float32).view(-1, 12))
    assert index_NK.tolist() == [naive_group_top_k(row, config) for row in values]


def test_the_two_group_scores_differ_where_they_should():
    value_NE = torch.tensor([[0.9, 0.0, 0.5, 0.6]])  # max: 0.9 > 0.6; two best: 0.9 < 1.1
    one = {"top_k": 1, "num_groups": 2, "top_groups": 1}
    assert GroupTopK.Config(group_score="max", **one).build(4).choose(value_NE).tolist() == [[0]]
    assert GroupTopK.Config(group_score="top2_sum", **one).build(4).choose(value_NE).tolist() == [[3]]


def test_a_group_with_one_open_member_beats_a_closed_group():
    value_NE = torch.tensor([[-INF, -INF, -INF, 0.1]])
    select = GroupTopK.Config(top_k=1, num_groups=2, top_groups=1).build(4)
    assert select.choose(value_NE).tolist() == [[3]]


# -- top-p, threshold, expert choice


@given(st.integers(0, 2**16), st.sampled_from([0.1, 0.4, 0.75, 1.0]), st.sampled_from([None, 1, 3]))
def test_top_p_is_a_naive_loop(seed, top_p, max_k):
    # multiples of 2^-6 sum without rounding
    part_NE = torch.randint(0, 8, (6, 5), generator=torch.Generator().manual_seed(seed)) / 64
    part_NE[:, 4] = 1 - part_NE[:, :4].sum(-1)
    routing = TopP.Config(top_p=top_p, max_k=max_k).build(5)(part_NE)
    for row, values in zip(rows(routing.index_NK), part_NE.tolist(), strict=True):
        expected, total = [], 0.0
        for e in naive_top_k(values, max_k or 5):
            if total >= top_p and expected:
                break
            expected.append(e)
            total += values[e]
        assert row == expected


def test_top_p_by_hand():
    score_NE = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]])
    assert rows(TopP.Config(top_p=0.5).build(3)(score_NE).index_NK) == [[0], [1]]
    assert rows(TopP.Config(top_p=0.6).build(3)(score_NE).index_NK) == [[0, 1], [1, 0]]
    assert rows(TopP.Config(top_p=0.8).build(3)(score_NE).index_NK) == [[0, 1, 2], [1, 0, 2]]
    assert rows(TopP.Config(top_p=0.8, max_k=2).build(3)(score_NE).index_NK) == [[0, 1], [1, 0]]


@given(value_tables(), st.sampled_from([-1.0, 0.0, 0.25, 0.6]), st.booleans())
def test_threshold_is_a_naive_loop(value_NE, threshold, limited):
    num_destinations = value_NE.shape[1]
    max_k = 1 + (num_destinations - 1) // 2 if limited else None
    routing = Threshold.Config(threshold=threshold, max_k=max_k).build(num_destinations)(value_NE)
    for row, values in zip(rows(routing.index_NK), value_NE.tolist(), strict=True):
        best = [e for e in naive_top_k(values, max_k or num_destinations) if e != UNUSED]
        assert row == best[:1] + [e for e in best[1:] if values[e] >= threshold]


@given(st.integers(0, 2**16), st.integers(0, 9), st.sampled_from([0.5, 1.0, 2.0, 9.0]))
def test_expert_choice_is_a_naive_loop(seed, num_items, capacity_factor):
    score_NE = torch.randint(0, 9, (num_items, 4), generator=torch.Generator().manual_seed(seed)) / 8
    routing = ExpertChoice.Config(capacity_factor=capacity_factor).build(4)(score_NE)
    capacity = min(num_items, math.ceil(capacity_factor * num_items / 4))
    for e in range(4):
        taken = naive_top_k(score_NE[:, e].tolist(), capacity)
        assert sorted(taken) == [n for n in range(num_items) if routing.index_NK[n, e] == e]
    assert ((routing.index_NK == UNUSED) | (routing.index_NK == torch.arange(4))).all()
    assert routing.load_E().tolist() == [capacity] * 4


def test_expert_choice_gives_closed_items_no_room():
    score_NE = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
    real_N = torch.tensor([True, False, True, False, True, True])
    select = ExpertChoice.Config(capacity_factor=1.0).build(2)
    padded = select(score_NE, open_NE=real_N.unsqueeze(-1).expand(6, 2))
    alone = select(score_NE[real_N])
    assert padded.load_E().tolist() == [2, 2]  # ceil(1.0 * 4 real items / 2)
    assert torch.equal(padded.index_NK[real_N], alone.index_NK)
    assert (padded.index_NK[~real_N] == UNUSED).all()


def test_who_is_causal():
    assert TopK.is_causal
    assert GroupTopK.is_causal
    assert not ExpertChoice.is_causal


# -- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK.Config(top_k=0), "top_k is 0; it must be greater than or equal to 1"),
        (lambda: TopK.Config(top_k=80).build(64), "top_k is 80, but there are 64 destinations; use 1 to 64"),
        (lambda: TopK.Config(normalize="l2"), "normalize is 'l2'; it must be 'none', 'sum' or 'softmax'"),
        (lambda: TopK.Config(scale=0.0), "scale is 0.0; it must be greater than 0"),
        (lambda: TopK.Config(topk=2), "TopK has no field 'topk'; did you mean 'top_k'"),
        (lambda: GroupTopK.Config(top_groups=9), "top_groups is 9, but there are 8 groups; use at most that"),
        (lambda: GroupTopK.Config().build(12), "num_groups is 8, which does not divide 12 destinations"),
        (lambda: GroupTopK.Config().build(8), "top2_sum needs groups of at least 2 destinations, they have 1"),
        (lambda: GroupTopK.Config(top_k=9).build(16), "top_k is 9, but top_groups=4 groups of 2 hold only 8"),
        (lambda: GroupTopK.Config(top_k=17).build(16), "top_k is 17, but there are 16 destinations; use 1 to 16"),
        (lambda: GroupTopK.Config(group_score="mean"), "group_score is 'mean'; it must be 'max' or 'top2_sum'"),
        (lambda: TopP.Config(top_p=0.0), "top_p is 0.0; it must be greater than 0"),
        (lambda: TopP.Config(top_p=1.5), "top_p is 1.5; it must be less than or equal to 1"),
        (lambda: TopP.Config(max_k=9).build(8), "max_k is 9, but there are 8 destinations; use 1 to 8"),
        (lambda: Threshold.Config(max_k=9).build(8), "max_k is 9, but there are 8 destinations; use 1 to 8"),
        (lambda: ExpertChoice.Config(capacity_factor=0.0), "capacity_factor is 0.0; it must be greater than 0"),
    ],
)
def test_messages(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
