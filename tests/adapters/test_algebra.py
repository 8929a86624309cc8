"""`combine`: the exact sum against deltas added up here, and ``linear`` against its formula."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapter_models import make_adapter
from anabranch.adapters import Adapter, Pair, combine, read_peft, write_peft
from anabranch.adapters.algebra import METHODS
from anabranch.adapters.thinning import RULES, merged
from anabranch.errors import ConfigError

NAMES = [f"model.layers.{layer}.mlp.up_proj" for layer in range(3)]


def adapter(ranks, alpha=8.0, rslora=False, seed=0, dtype=torch.float64, **table):
    """One with a pair for each rank that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        name: Pair(
            torch.randn(rank, 5, generator=generator, dtype=dtype),
            torch.randn(4, rank, generator=generator, dtype=dtype),
            alpha,
            rslora,
        )
        for name, rank in zip(NAMES, ranks, strict=True)
        if rank
    }
    return Adapter({"peft_type": "LORA", **table}, pairs)


@given(
    ranks=st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3).filter(any), min_size=1, max_size=3),
    weights=st.lists(st.floats(-2, 2), min_size=3, max_size=3),
    rslora=st.booleans(),
)
def test_exact_is_the_sum(ranks, weights, rslora):
    adapters = [adapter(own, 3.0 + n, rslora and n == 0, seed=n) for n, own in enumerate(ranks)]
    weights = weights[: len(adapters)]
    made = combine(adapters, weights)
    assert made.error == 0
    for name in NAMES:
        parts = [(one.pairs[name], weight) for one, weight in zip(adapters, weights, strict=True) if name in one.pairs]
        if not parts:
            assert name not in made.adapter.pairs
            continue
        found = made.adapter.pairs[name]
        assert (found.rank, found.scale) == (sum(pair.rank for pair, _ in parts), 1)
        wanted = sum(
            pair.alpha / (math.sqrt(pair.rank) if pair.rslora else pair.rank) * weight * (pair.b_OR @ pair.a_RC)
            for pair, weight in parts
        )
        torch.testing.assert_close(found.delta(), wanted)


def test_linear_sums_halves_and_says_what_that_costs():
    first, second = adapter([2, 2, 2]), adapter([2, 2, 2], 4.0, seed=1)
    made = combine([first, second], [0.5, -0.25], "linear")
    missed = total = 0.0
    for name in NAMES:
        (a1, b1), (a2, b2) = ((one.pairs[name].a_RC, one.pairs[name].b_OR) for one in (first, second))
        c1, c2 = math.sqrt(0.5 * 4), math.sqrt(0.25 * 2)
        found = made.adapter.pairs[name]
        assert found.rank == 2
        torch.testing.assert_close(found.delta(), (c1 * b1 + c2 * b2) @ (c1 * a1 - c2 * a2))
        wanted = 2 * b1 @ a1 - 0.5 * b2 @ a2
        missed, total = missed + (found.delta() - wanted).square().sum(), total + wanted.square().sum()
    assert made.error == pytest.approx(float((missed / total).sqrt()))
    # Alone there is no other half to mix with.
    assert combine([first], [-1.5], "linear").error < 1e-12
    assert combine([first], [0.0], "linear").error == 0


def test_a_mean_is_that_of_each_half():
    """Weights are shares; scales go into both halves, and products of halves of different adapters come in."""
    first, second = adapter([2, 2, 0]), adapter([2, 0, 2], -4.0, seed=1)
    made = combine([first, second], [3.0, 1.0], "mean")
    (a1, b1), (a2, b2) = ((one.pairs[NAMES[0]].a_RC, one.pairs[NAMES[0]].b_OR) for one in (first, second))
    first_scale, second_scale = math.sqrt(8 / 2), math.sqrt(4 / 2)
    half_b = 0.75 * first_scale * b1 + 0.25 * second_scale * b2
    half_a = 0.75 * first_scale * a1 - 0.25 * second_scale * a2
    torch.testing.assert_close(made.adapter.pairs[NAMES[0]].delta(), half_b @ half_a)
    # Where one of them adds nothing it counts as zeros, once.
    torch.testing.assert_close(made.adapter.pairs[NAMES[1]].delta(), 0.75 * first.pairs[NAMES[1]].delta())
    # It is told how far that is from the mean of what they add.
    assert made.error > 0.1
    assert combine([first, first], [1.0, 1.0], "mean").error < 1e-12
    assert combine([first], [7.0], "mean").error < 1e-12
    # Great weights have a sum too.
    again = combine([first, second], [3e307, 1e307], "mean")
    torch.testing.assert_close(again.adapter.pairs[NAMES[0]].delta(), half_b @ half_a)


@pytest.mark.parametrize("weights", [[1.0, -0.5], [0.0, 0.0]])
def test_a_mean_takes_nothing_away(weights):
    with pytest.raises(ConfigError, match="a mean has weights of 0 and above, of which one is not 0"):
        combine([adapter([1, 1, 1])] * 2, weights, "mean")


@pytest.mark.parametrize("rank", [1, 2, 3, 9, None])
def test_svd_is_the_best_of_its_rank_and_says_what_it_lacks(rank):
    adapters, weights = [adapter([2, 1, 2]), adapter([1, 2, 0], 4.0, True, seed=1)], [0.5, -1.5]
    exact, made = combine(adapters, weights).adapter, combine(adapters, weights, "svd", rank=rank)
    missed = total = 0.0
    for name in NAMES:
        whole, found = exact.pairs[name].delta(), made.adapter.pairs[name]
        left, value, right = torch.linalg.svd(whole)
        kept = min(rank or max(one.pairs[name].rank for one in adapters if name in one.pairs), exact.pairs[name].rank)
        assert found.rank == kept
        best = left[:, :kept] @ torch.diag(value[:kept]) @ right[:kept]
        torch.testing.assert_close(found.delta(), best)
        missed, total = missed + float(value[kept:].square().sum()), total + float(value.square().sum())
    assert made.error == pytest.approx(math.sqrt(missed / total), abs=1e-7)


def test_svd_of_nothing_is_one_rank_of_nothing():
    made = combine([adapter([2, 2, 2])], [0.0], "svd")
    assert {pair.rank for pair in made.adapter.pairs.values()} == {1}
    assert not any(pair.delta().any() for pair in made.adapter.pairs.values())
    # As of an adapter that has learned nothing.
    assert all(pair.a_RC.any() for pair in made.adapter.pairs.values())
    assert made.error == 0


@pytest.mark.parametrize(
    ("method", "rank", "message"),
    [("exact", 2, "rank is 2, and method 'exact' has none to choose"), ("svd", 0, "rank is 0; it must be at least 1")],
)
def test_ranks_that_cannot_be(method, rank, message):
    with pytest.raises(ConfigError, match=message):
        combine([adapter([1, 1, 1])], [1.0], method, rank=rank)


@pytest.mark.parametrize(
    ("method", "option", "message"),
    [
        ("exact", {"density": 0.5}, "density is 0.5, and method 'exact' keeps all numbers"),
        ("ties", {"density": 0.0}, "density is 0.0; it is the share of numbers that are kept"),
        ("ties", {"density": math.nan}, "density is nan; it is the share"),
        ("ties", {"density": 1.5}, "density is 1.5; it is the share"),
        ("ties", {"seed": 1}, "seed is 1, and method 'ties' draws nothing"),
        ("dare", {"seed": -1}, "seed is -1; it must be from 0 to"),
        ("dare", {"majority": "total"}, "majority is total, and method 'dare' elects no signs"),
        ("ties", {"majority": "most"}, "majority is 'most'; use one of total, frequency"),
        ("ties", {"rank": 2}, "rank is 2, and method 'ties' has none to choose"),
    ],
)
def test_options_that_cannot_be(method, option, message):
    with pytest.raises(ConfigError, match=message):
        combine([adapter([1, 1, 1])], [1.0], method, **option)


def test_ties_of_halves_and_of_matrices():
    """Against the rule on the tensors themselves, and errors against matrices made here."""
    adapters, weights = [adapter([2, 2, 2]), adapter([2, 2, 2], 4.0, seed=1)], [0.5, -0.25]
    rule, roots = RULES["ties"], [math.sqrt(0.5 * 4), math.sqrt(0.25 * 2)]
    halves = combine(adapters, weights, "ties", density=0.5)
    whole = combine(adapters, weights, "ties_svd", density=0.5, rank=2)
    missed = cut = total = held = 0.0
    for name in NAMES:
        pairs = [one.pairs[name] for one in adapters]
        a = merged([pair.a_RC for pair in pairs], [roots[0], -roots[1]], rule, 0.5, ())
        b = merged([pair.b_OR for pair in pairs], roots, rule, 0.5, ())
        torch.testing.assert_close(halves.adapter.pairs[name].delta(), b @ a)
        matrix = merged([pair.delta() for pair in pairs], weights, rule, 0.5, ())
        left, value, right = torch.linalg.svd(matrix)
        found = whole.adapter.pairs[name].delta()
        torch.testing.assert_close(found, left[:, :2] @ torch.diag(value[:2]) @ right[:2])
        exact = sum(weight * pair.delta() for weight, pair in zip(weights, pairs, strict=True))
        missed, total = missed + float((found - exact).square().sum()), total + float(exact.square().sum())
        cut, held = cut + float(value[2:].square().sum()), held + float(matrix.square().sum())
    assert whole.error == pytest.approx(math.sqrt(missed / total))
    assert whole.cut_off == pytest.approx(math.sqrt(cut / held))
    assert halves.cut_off == 0 < halves.error


@pytest.mark.parametrize("method", ["dare", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_what_is_dropped_depends_on_the_seed_and_on_the_layer_alone(method):
    one, other = adapter([2, 2, 2]), adapter([2, 2, 2], seed=1)
    made = combine([one, other], [1, 1], method, density=0.4, seed=5).adapter.pairs
    torch.manual_seed(9)
    few = [Adapter(each.table, {NAMES[2]: each.pairs[NAMES[2]]}) for each in (one, other)]
    again = combine(few, [1, 1], method, density=0.4, seed=5).adapter.pairs
    assert torch.equal(again[NAMES[2]].delta(), made[NAMES[2]].delta())
    another = combine([one, other], [1, 1], method, density=0.4, seed=6).adapter.pairs
    assert not torch.equal(another[NAMES[2]].delta(), made[NAMES[2]].delta())


def test_layers_that_are_alike_lose_other_numbers():
    pair = adapter([4, 0, 0]).pairs[NAMES[0]]
    both = Adapter({"peft_type": "LORA"}, {NAMES[0]: pair, NAMES[1]: pair})
    made = combine([both], [1.0], "dare").adapter.pairs
    assert not torch.equal(made[NAMES[0]].a_RC, made[NAMES[1]].a_RC)


def test_both_halves_of_a_layer_lose_other_numbers():
    """Halves of one shape: numbers that were dropped of both in the same places would be a pattern."""
    square = Pair(torch.ones(8, 8, dtype=torch.float64), torch.ones(8, 8, dtype=torch.float64), 8.0)
    made = combine([Adapter({"peft_type": "LORA"}, {NAMES[0]: square})], [1.0], "dare").adapter.pairs[NAMES[0]]
    assert set(made.a_RC.flatten().tolist()) == set(made.b_OR.flatten().tolist()) == {0.0, 2.0}
    assert not torch.equal(made.a_RC, made.b_OR)


def test_dare_is_dare_linear():
    adapters = [adapter([2, 2, 2]), adapter([2, 2, 2], seed=1)]
    first, second = (combine(adapters, [1, 1], name).adapter.pairs[NAMES[0]] for name in ("dare", "dare_linear"))
    assert torch.equal(first.delta(), second.delta())


def test_an_adapter_minus_itself_is_nothing():
    one = adapter([2, 3, 0])
    assert all(pair.delta().abs().max() < 1e-12 for pair in combine([one, one], [1, -1]).adapter.pairs.values())


def test_the_config_says_what_the_sum_is(tmp_path):
    """Targets that differ, ranks that differ, both scalings; what is not of the sum stays as the first adapter has it."""
    layers = dict.fromkeys(NAMES, (5, 4))
    make_adapter(
        tmp_path / "a",
        dict(list(layers.items())[:2]),
        use_rslora=True,
        layers_to_transform=[0, 1],
        mine="kept",
        init_lora_weights="gaussian",
    )
    make_adapter(
        tmp_path / "b", layers, rank=2, seed="b", rank_pattern={"up_proj": 2}, base_model_name_or_path="elsewhere"
    )
    first, second = read_peft(tmp_path / "a"), read_peft(tmp_path / "b")
    write_peft(tmp_path / "c", combine([first, second], [1, 1]).adapter)
    back = read_peft(tmp_path / "c")
    assert {name: pair.rank for name, pair in back.pairs.items()} == dict(zip(NAMES, (6, 6, 2), strict=True))
    assert back.table["mine"] == "kept"
    assert back.table["base_model_name_or_path"] is None
    assert not {"init_lora_weights", "layers_to_transform"} & back.table.keys()
    for name in NAMES:
        wanted = second.pairs[name].delta() + (first.pairs[name].delta() if name in first.pairs else 0)
        torch.testing.assert_close(back.pairs[name].delta(), wanted)


def test_half_types_are_summed_in_float32():
    one = adapter([2, 2, 2], dtype=torch.bfloat16)
    made = combine([one, one], [0.3, 0.7]).adapter.pairs[NAMES[0]]
    assert made.b_OR.dtype == torch.float32
    torch.testing.assert_close(made.delta(), one.pairs[NAMES[0]].delta(), rtol=1e-6, atol=1e-6)


def other_widths():
    return Adapter({}, {NAMES[0]: Pair(torch.ones(2, 7), torch.ones(4, 2), 1.0)})


@pytest.mark.parametrize(
    ("make", "weights", "method", "message"),
    [
        (lambda: [], [], "exact", "there are 0 weights for 0 adapters; give one for each"),
        (lambda: [adapter([1, 1, 1])], [1, 2], "exact", "there are 2 weights for 1 adapters"),
        (lambda: [adapter([1, 1, 1])], [math.nan], "exact", "a weight is nan; it must be a finite number"),
        (lambda: [adapter([1, 1, 1])], [1], "cat", "method is 'cat'; use one of exact, svd, linear"),
        (
            lambda: [adapter([1, 0, 0]), other_widths()],
            [1, 1],
            "exact",
            r"has \(inputs, outputs\) \[\(5, 4\), \(7, 4\)\]",
        ),
        (
            lambda: [adapter([1, 2, 0]), adapter([1, 3, 0])],
            [1, 1],
            "linear",
            r"has ranks \[2, 3\]; method 'linear' needs one, 'exact' does not",
        ),
        (
            lambda: [adapter([1, 2, 0]), adapter([1, 3, 0])],
            [1, 1],
            "dare",
            r"has ranks \[2, 3\]; method 'dare' needs one, 'dare_linear_svd' does not",
        ),
        (
            lambda: [adapter([1, 1, 1]), Adapter({}, adapter([1, 1, 1]).pairs, {"lm_head.weight": torch.ones(1)})],
            [1, 1],
            "exact",
            r"adapter 2 brings lm_head\.weight whole, which has no sum",
        ),
    ],
)
def test_what_cannot_be_combined(make, weights, method, message):
    with pytest.raises(ConfigError, match=message):
        combine(make(), weights, method)


@pytest.mark.parametrize("method", METHODS)
def test_a_sum_that_its_type_cannot_hold_is_refused(method):
    """And not written, as nobody reads it."""
    # Of a mean weights are shares, so that scales alone are too great.
    one = adapter([2, 2, 2], alpha=2e78 if method == "mean" else 2e9, dtype=torch.float32)
    message = r"the sum has numbers in \S+ that float32 cannot hold; give weights nearer to 0"
    with pytest.raises(ConfigError, match=message):
        combine([one] * 2, [3e38, 3e38], method)


def test_svd_keeps_a_direction_that_is_small_and_real():
    """Only what rounding leaves is dropped: of two directions one is a thousandth of the other."""
    a_RC = torch.eye(2, 5, dtype=torch.float64)
    b_OR = torch.eye(4, 2, dtype=torch.float64) * torch.tensor([1.0, 1e-4], dtype=torch.float64)
    one = Adapter({"peft_type": "LORA"}, {NAMES[0]: Pair(a_RC, b_OR, 2.0)})
    made = combine([one], [1.0], "svd").adapter.pairs[NAMES[0]]
    assert made.rank == 2
    torch.testing.assert_close(made.delta(), one.pairs[NAMES[0]].delta())


def test_what_a_config_says_of_one_training_is_not_said_of_a_sum():
    told = {
        "revision": "abc",
        "init_lora_weights": "eva",
        "loftq_config": {"bits": 4},
        "eva_config": {},
        "corda_config": {},
    }
    made = combine([adapter([1, 1, 1], **told, mine=1)], [1.0]).adapter.table
    assert not told.keys() & made.keys()
    assert made["mine"] == 1
