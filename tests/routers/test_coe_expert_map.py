import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError, InputError
from anabranch.routers.coe import Limits, QualityTable, frontier_of_budget, frontier_of_trade_off, solve_map
from anabranch.routers.coe.limits import Problem
from anabranch.routers.coe.milp import least_host

SAME = 1e-9  # objectives are sums of a few products of numbers near 1


def drawn(generator, *, experts=8, categories=8, decimals=6, missing=0.1):
    """A table with some cells missing, sizes, and shares of which some may be 0."""
    num_e, num_c = generator.integers(1, experts + 1), generator.integers(1, categories + 1)
    quality_CE = generator.random((num_c, num_e)).round(decimals)
    quality_CE[generator.random(quality_CE.shape) < missing] = np.nan
    quality_CE[np.arange(num_c), generator.integers(0, num_e, num_c)] = 0.5  # every category has an expert
    names = [f"e{number}" for number in range(num_e)]
    share = {f"c{row}": float(generator.integers(0, 4) + (row == 0)) for row in range(num_c)}
    table = QualityTable.of(
        {f"c{row}": {name: quality_CE[row, at] for at, name in enumerate(names)} for row in range(num_c)}, share=share
    )
    return table, {name: float(generator.integers(1, 20)) for name in names}


def enumerated(table, parameters, limits):
    """The best objective over every assignment, by trying all of them; None if none fits. No set or share is treated apart."""
    sizes = np.array([parameters[name] for name in table.experts])
    best = None
    for choice in itertools.product(range(len(sizes)), repeat=len(table.categories)):
        used = sorted(set(choice))
        quality = table.quality_CE[np.arange(len(choice)), list(choice)]
        active = float(table.share_C @ sizes[list(choice)])
        if (
            np.isnan(quality).any()
            or sizes[used].sum() > (np.inf if limits.budget is None else limits.budget)
            or len(used) > (limits.max_experts or len(sizes))
            or active > (np.inf if limits.active is None else limits.active) + SAME
        ):
            continue
        value = float(table.share_C @ quality) - limits.trade_off * active
        best = value if best is None else max(best, value)
    return best


def same_map(found, other):
    return (
        found.choice == other.choice and found.chosen == other.chosen and abs(found.objective - other.objective) < SAME
    )


# By hand


TWO = QualityTable.of({"maths": {"small": 0.4, "big": 0.9}, "chat": {"small": 0.7, "big": 0.8}})
SIZES = {"small": 8.0, "big": 70.0}


@pytest.mark.parametrize("solver", ["exact", "milp", "greedy"])
@pytest.mark.parametrize(
    ("limits", "maths", "chat", "objective", "active", "host"),
    [
        (Limits(), "big", "big", 0.85, 70, 70),  # (0.9 + 0.8) / 2
        (Limits(budget=78), "big", "big", 0.85, 70, 70),
        (Limits(budget=70), "big", "big", 0.85, 70, 70),
        (Limits(budget=69.9), "small", "small", 0.55, 8, 8),
        (
            Limits(trade_off=0.005),
            "big",
            "small",
            0.8 - 0.005 * 39,
            39,
            78,
        ),  # chat: 0.1 for 62 is below 0.005 each; maths: 0.5
        (Limits(trade_off=0.005, max_experts=1), "small", "small", 0.55 - 0.04, 8, 8),  # against 0.85 - 0.35
        (Limits(active=40), "big", "small", 0.8, 39, 78),
        (Limits(active=38), "small", "small", 0.55, 8, 8),
        (Limits(active=40, budget=70), "small", "small", 0.55, 8, 8),
    ],
)
def test_by_hand(solver, limits, maths, chat, objective, active, host):
    found = solve_map(TWO, SIZES, limits=limits, solver=solver)
    assert (found["maths"], found["chat"]) == (maths, chat)
    assert found.objective == pytest.approx(objective)
    assert (found.active, found.host) == (pytest.approx(active), host)
    assert found.quality == pytest.approx(objective + limits.trade_off * active)


def test_shares_weigh():
    """Three quarters of the requests are chats: 0.75 * 0.1 for 0.75 * 62 is as dear for lambda as before, but A sees 23.5."""
    table = QualityTable.of(
        {"maths": {"small": 0.4, "big": 0.9}, "chat": {"small": 0.7, "big": 0.8}}, share={"maths": 1, "chat": 3}
    )
    found = solve_map(table, SIZES, limits=Limits(trade_off=0.005))
    assert (found["maths"], found["chat"], found.active) == ("big", "small", pytest.approx(0.25 * 70 + 0.75 * 8))


# Against enumeration


@pytest.mark.parametrize("decimals", [6, 1], ids=["generic", "many ties"])
def test_integer_program_equals_enumeration_on_200_instances(decimals):
    generator = np.random.default_rng(decimals)
    unreachable = 0
    for number in range(100):
        table, parameters = drawn(generator, decimals=decimals)
        limits = Limits(
            budget=float(generator.integers(1, 90)),
            trade_off=float(generator.choice([0.0, 0.01])),
            max_experts=int(generator.integers(1, 5)) if number % 3 == 0 else None,
        )
        try:
            exact = solve_map(table, parameters, limits=limits, solver="exact")
        except InputError as error:
            unreachable += 1
            with pytest.raises(InputError, match=f"^{str(error)[:30]}"):
                solve_map(table, parameters, limits=limits, solver="milp")
            continue
        assert same_map(exact, solve_map(table, parameters, limits=limits, solver="milp")), (number, limits)
        greedy = solve_map(table, parameters, limits=limits, solver="greedy")
        assert greedy.objective <= exact.objective + SAME
        assert greedy.host <= limits.budget
    assert unreachable < 40  # or little was compared


def test_both_equal_trying_every_assignment():
    generator = np.random.default_rng(5)
    for number in range(60):
        table, parameters = drawn(generator, experts=4, categories=5, decimals=1 + number % 3)
        limits = Limits(
            budget=float(generator.integers(5, 60)) if number % 2 else None,
            trade_off=float(generator.choice([0.0, 0.02])),
            active=float(generator.integers(2, 15)) if number % 3 else None,
            max_experts=int(generator.integers(1, 4)) if number % 5 == 0 else None,
        )
        best = enumerated(table, parameters, limits)
        for solver in ("exact", "milp"):
            if best is None:
                with pytest.raises(InputError):
                    solve_map(table, parameters, limits=limits, solver=solver)
            else:
                found = solve_map(table, parameters, limits=limits, solver=solver)
                assert found.objective == pytest.approx(best, abs=SAME), (number, solver, limits)
                assert set(found.choice.values()) == set(found.chosen)


def test_integer_program_at_40_by_30_is_what_auto_takes():
    generator = np.random.default_rng(0)
    quality_CE = generator.random((40, 30))
    table = QualityTable.of({f"c{c}": {f"e{e}": quality_CE[c, e] for e in range(30)} for c in range(40)})
    parameters = {f"e{e}": float(generator.uniform(1, 100)) for e in range(30)}
    # About a second; a benchmark holds it to two.
    found = solve_map(table, parameters, limits=Limits(budget=50.0), solver="milp")
    assert found.host <= 50
    assert solve_map(table, parameters, limits=Limits(budget=50.0)).choice == found.choice  # auto takes it


# Properties


@given(st.integers(0, 10**6), st.sampled_from(["exact", "milp"]))
def test_frontiers_are_monotone(seed, solver):
    table, parameters = drawn(np.random.default_rng(seed), experts=5, categories=5)
    by_budget = frontier_of_budget(table, parameters, solver=solver)
    for less, more in itertools.pairwise(by_budget):
        assert less.host < more.host
        assert less.objective < more.objective + SAME
    assert by_budget[-1].quality == pytest.approx(solve_map(table, parameters).quality)
    by_trade_off = frontier_of_trade_off(table, parameters, solver=solver)
    for less, more in itertools.pairwise(by_trade_off):
        assert less.limits.trade_off < more.limits.trade_off
        assert less.quality >= more.quality - SAME
        assert less.active >= more.active - SAME


@given(st.integers(0, 10**6))
def test_frontier_of_budget_misses_no_map(seed):
    generator = np.random.default_rng(seed)
    table, parameters = drawn(generator, experts=5, categories=4)
    frontier = frontier_of_budget(table, parameters)
    for budget in generator.uniform(frontier[0].host, sum(parameters.values()) + 1, 5):
        wanted = solve_map(table, parameters, limits=Limits(budget=float(budget)))
        best = max((one for one in frontier if one.host <= budget), key=lambda one: one.host)
        assert (best.choice, best.host) == (wanted.choice, wanted.host)


@given(st.integers(0, 10**6))
def test_frontier_of_trade_off_misses_no_map(seed):
    generator = np.random.default_rng(seed)
    table, parameters = drawn(generator, experts=5, categories=4)
    limits = Limits(budget=float(sum(parameters.values()) * 0.7)) if seed % 2 else Limits()
    try:
        frontier = frontier_of_trade_off(table, parameters, limits=limits)
    except InputError:
        return
    for value in generator.uniform(0, 0.2, 5):
        wanted = solve_map(table, parameters, limits=limits.replace(trade_off=float(value)))
        best = max(one.quality - value * one.active for one in frontier)
        assert best == pytest.approx(wanted.objective, abs=1e-8)


@given(st.integers(0, 10**6), st.sampled_from(["exact", "milp", "greedy"]))
def test_every_category_is_served_by_a_chosen_expert_that_may_serve_it(seed, solver):
    generator = np.random.default_rng(seed)
    table, parameters = drawn(generator, missing=0.4)
    budget = least_host(Problem.of(table, parameters, None, Limits())) * 1.5
    try:
        found = solve_map(table, parameters, limits=Limits(budget=budget), solver=solver)
    except InputError:
        assert solver == "greedy"
        return
    assert set(found.choice) == set(table.categories)
    assert set(found.choice.values()) == set(found.chosen)
    assert all(not np.isnan(table.quality_CE[table.row(c), table.column(e)]) for c, e in found.choice.items())
    assert found.host == pytest.approx(sum(parameters[name] for name in found.chosen))
    assert found.host <= budget


@pytest.mark.parametrize("solver", ["exact", "milp", "greedy"])
def test_one_category_takes_the_best_single(solver):
    table = QualityTable.of({"all": {"a": 0.3, "b": 0.8, "c": 0.6}})
    found = solve_map(table, {"a": 1, "b": 9, "c": 3}, solver=solver)
    assert (found["all"], found.chosen, found.host) == ("b", ("b",), 9)
    assert solve_map(table, {"a": 1, "b": 9, "c": 3}, limits=Limits(budget=8), solver=solver)["all"] == "c"


@pytest.mark.parametrize("solver", ["exact", "milp", "greedy"])
@pytest.mark.parametrize(
    ("parameters", "prices", "first"),
    [
        ({"a": 9, "b": 3, "c": 5}, {}, "b"),  # the smallest
        ({"a": 3, "b": 3, "c": 3}, {"a": 2.0, "b": 2.0, "c": 1.0}, "c"),  # then the cheapest
        ({"a": 3, "b": 3, "c": 3}, {"a": 1.0, "b": 1.0, "c": 1.0}, "a"),  # then the first name
    ],
)
def test_identical_experts_go_by_size_price_name(solver, parameters, prices, first):
    row = {"c": 0.5, "b": 0.5, "a": 0.5}
    found = solve_map(QualityTable.of({"x": row, "y": row}), parameters, prices=prices, solver=solver)
    assert (found["x"], found["y"], found.chosen) == (first, first, (first,))


@pytest.mark.parametrize("solver", ["exact", "milp"])
def test_equal_sets_take_the_smaller(solver):
    """One of 6 does what two of 4 do; the pair of 2 and 3 does it too, with less."""
    table = QualityTable.of({"x": {"all": 1.0, "x4": 1.0, "x2": 1.0}, "y": {"all": 1.0, "y4": 1.0, "y3": 1.0}})
    sizes = {"all": 6, "x4": 4, "y4": 4, "x2": 2, "y3": 3}
    assert solve_map(table, sizes, solver=solver).chosen == ("x2", "y3")
    assert solve_map(table, {**sizes, "all": 4.5}, solver=solver).chosen == ("all",)


def test_zero_share_still_has_an_expert():
    table = QualityTable.of({"x": {"a": 0.1, "b": 0.9}, "rare": {"a": 0.8, "b": 0.2}}, share={"x": 1, "rare": 0})
    found = solve_map(table, {"a": 1, "b": 2})
    assert found["x"] == "b"
    assert found["rare"] == "b"  # hosting another for it would gain nothing


# Bad input


def test_budget_below_the_smallest_names_it():
    for solver in ("exact", "milp", "greedy"):
        with pytest.raises(InputError, match=r"a budget of 7 .* the smallest that does is 8$"):
            solve_map(TWO, SIZES, limits=Limits(budget=7), solver=solver)
    needs_both = QualityTable.of({"x": {"a": 0.5}, "y": {"b": 0.5}, "z": {"a": 0.1, "b": 0.2, "c": 0.3}})
    with pytest.raises(InputError, match=r"the smallest that does is 5$"):  # a for x, b for y
        solve_map(needs_both, {"a": 2, "b": 3, "c": 1}, limits=Limits(budget=4))


def test_other_limits_that_cannot_be_kept():
    with pytest.raises(InputError, match=r"at least 8 billion .* active allows 5"):
        solve_map(TWO, SIZES, limits=Limits(active=5))
    needs_both = QualityTable.of({"x": {"a": 0.5}, "y": {"b": 0.5}})
    with pytest.raises(InputError, match=r"max_experts 1 .* together"):
        solve_map(needs_both, {"a": 2, "b": 3}, limits=Limits(max_experts=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": {"small": 8.0}, "limits": Limits(budget=80)}, "how many parameters 'big' has is not known"),
        ({"parameters": {"small": 8.0, "big": -1.0}}, "'big' has -1.0 billion"),
        ({"parameters": {"small": 8.0, "big": float("nan")}}, "'big' has nan billion"),
        ({"solver": "best"}, "solver is 'best'; it must be one of auto, exact, milp, greedy"),
    ],
)
def test_arguments_that_may_not_be(change, message):
    with pytest.raises(InputError, match=message):
        solve_map(**{"table": TWO, "parameters": SIZES, **change})


def test_sizes_may_be_unknown_without_limits_on_them():
    assert solve_map(TWO, {}).chosen == ("big",)
    assert solve_map(TWO, {}, limits=Limits(max_experts=1)).chosen == ("big",)


def test_missing_cells_are_never_chosen_and_a_row_of_them_is_an_error():
    table = QualityTable.of({"x": {"a": 0.1}, "y": {"a": 0.2, "b": 0.9}})
    assert solve_map(table, {"a": 50, "b": 1}).choice == {"x": "a", "y": "b"}
    with pytest.raises(InputError, match="no expert has a quality in category 'y'"):
        solve_map(QualityTable.of({"x": {"a": 0.1}, "y": {"a": float("nan")}}), {"a": 1})


def test_unknown_category_of_a_map():
    with pytest.raises(InputError, match="no category 'law' in the map; it has maths, chat"):
        solve_map(TWO, SIZES)["law"]


def test_negative_limits():
    for field in ("budget", "trade_off", "active"):
        with pytest.raises(ConfigError, match=f"{field} is -1"):
            Limits(**{field: -1.0})


def test_too_many_experts_for_enumeration():
    experts = {f"e{number:02d}": 0.5 + number / 100 for number in range(16)}  # larger ones are better: none dominates
    sizes = {name: 1.0 + number for number, name in enumerate(experts)}
    table = QualityTable.of({"x": experts})
    with pytest.raises(InputError, match=r"takes 15 experts, and 16 may matter; use solver 'milp'"):
        solve_map(table, sizes, solver="exact")
    assert solve_map(table, sizes)["x"] == "e15"
    backwards = {name: 17.0 - size for name, size in sizes.items()}  # the best is the smallest: it dominates all others
    assert solve_map(table, backwards, solver="exact")["x"] == "e15"
