"""The Token Scheduler and the pipeline of two batches."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import CapacityError, InputError
from anabranch.lm import SamplingConfig, generate
from anabranch.nn import SelfAttention, kernels
from anabranch.routing import record_routing
from anabranch.serving.expertflow import Routes, find_pools, offload
from anabranch.serving.expertflow.dual_batch import DualBatch, RowStore
from anabranch.serving.expertflow.predictors import Frequency
from anabranch.serving.expertflow.token_scheduler import TokenScheduler, likeliest, objective, reindex
from anabranch.serving.fast import FastDecoder
from expertflow_models import VOCAB, make_model, prompts


def drawn(tokens: int, layers: int, experts: int, top_k: int, generator: np.random.Generator) -> np.ndarray:
    order = generator.random((tokens, layers, experts)).argsort(-1)
    return order < top_k


def test_the_worst_case_is_halved() -> None:
    chosen_XLE = np.zeros((8, 1, 4), bool)
    chosen_XLE[np.arange(8), 0, np.arange(8) % 4] = True  # each batch of four goes to all four experts
    plan = TokenScheduler().regroup(chosen_XLE)
    assert (plan.objective_before, plan.objective_after) == (8, 4)
    assert sorted(plan.order_X) == list(range(8))


def test_it_finds_the_best_split_nearly_always() -> None:
    generator, best_found = np.random.default_rng(0), []
    for _ in range(200):
        number = 2 * int(generator.integers(2, 6))
        chosen_XLE = drawn(
            number,
            int(generator.integers(1, 4)),
            int(generator.choice([4, 8])),
            int(generator.integers(1, 3)),
            generator,
        )
        plan = TokenScheduler().regroup(chosen_XLE)
        splits = itertools.combinations(range(number), number // 2)
        best = min(objective(chosen_XLE, np.isin(np.arange(number), split)) for split in splits)
        best_found.append(plan.objective_after == best)
        assert plan.objective_after >= best
    assert np.mean(best_found) >= 0.9


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 13), st.integers(0, 2**32 - 1), st.booleans())
def test_it_is_never_worse_and_is_undone_by_its_inverse(number: int, seed: int, exchanges: bool) -> None:
    generator = np.random.default_rng(seed)
    size = int(generator.integers(0, number + 1))
    chosen_XLE = drawn(number, 3, 8, 2, generator)
    plan = TokenScheduler(max_exchanges=32 if exchanges else 0).regroup(chosen_XLE, size)
    first = np.zeros(number, bool)
    first[plan.order_X[:size]] = True
    assert objective(chosen_XLE, first) == plan.objective_after <= plan.objective_before
    rows = torch.randn(number, 4, 3).unbind(0)  # keys and values of each token
    again = reindex(reindex(rows, plan.order_X), plan.inverse_X)
    assert all(one is other for one, other in zip(again, rows, strict=True))  # the same memory, so the same bits


@pytest.mark.skipif(kernels.load() is None, reason="no compiled kernels on this machine")
@settings(max_examples=100, deadline=None)
@given(
    shape=st.one_of(
        st.tuples(
            st.integers(2, 9), st.integers(1, 2), st.integers(1, 4)
        ),  # few cells: everything is tied with something
        st.tuples(st.integers(2, 64), st.integers(1, 27), st.integers(1, 64)),
    ),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
    rounds=st.sampled_from([0, 1, 10]),
    exchanges=st.sampled_from([0, 1, 32]),
)
def test_the_compiled_regrouping_is_that_of_numpy(
    shape: tuple[int, int, int], density: float, seed: int, rounds: int, exchanges: int
) -> None:
    generator = np.random.default_rng(seed)
    chosen_XLE = generator.random(shape) < density
    scheduler, size = TokenScheduler(rounds, exchanges), int(generator.integers(1, shape[0]))
    plain, compiled = scheduler._plain(chosen_XLE, size), scheduler._compiled(chosen_XLE, size)
    np.testing.assert_array_equal(plain.order_X, compiled.order_X)
    assert plain.objective_before == compiled.objective_before
    assert plain.objective_after == compiled.objective_after


def test_routes_need_not_lie_in_one_piece() -> None:
    chosen_XLE = drawn(9, 3, 8, 2, np.random.default_rng(1))
    spread = np.repeat(chosen_XLE, 2, axis=2)[:, :, ::2]
    np.testing.assert_array_equal(
        TokenScheduler().regroup(spread).order_X, TokenScheduler().regroup(chosen_XLE).order_X
    )


def test_bad_routes_are_refused() -> None:
    with pytest.raises(InputError, match="axes"):
        TokenScheduler().regroup(np.zeros((3, 4), bool))
    with pytest.raises(InputError, match="0 to 3"):
        TokenScheduler().regroup(np.zeros((3, 1, 4), bool), 4)


@pytest.mark.parametrize("number", [1, 2, 5, 9])  # one sequence; half a unit; units that are not full
@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize("use_kernel", [True, False])
def test_tokens_do_not_depend_on_the_scheduler(number: int, is_on: bool, use_kernel: bool) -> None:
    model, asked = make_model(attention=SelfAttention.Config(num_heads=2)), prompts(number)
    assert not use_kernel or kernels.load() is None or FastDecoder.supports(model) is None
    greedy = SamplingConfig(max_tokens=7, temperature=0.0)
    free = generate(model, asked, greedy)
    greedy = greedy.replace(stop=(free[0][3],))  # sequences end within a unit
    expected = generate(model, asked, greedy)
    assert len(expected[0]) < 7
    with record_routing(model) as recorder:
        generate(model, asked, greedy)
    found = find_pools(model)
    routes = Routes.from_trace(recorder.trace())
    frequency = Frequency(found.fingerprint(f"vocab:{VOCAB}"), VOCAB).fit(routes)
    engine = offload(model, found.layout.total_bytes // 4, predictor=frequency)
    scheduler = TokenScheduler() if is_on else None
    pipeline = DualBatch(engine, batch_size=2, scheduler=scheduler, use_kernel=use_kernel)
    assert pipeline.generate(asked, greedy) == expected
    assert pipeline.objective_after <= pipeline.objective_before
    assert (pipeline.objective_before > 0) == (is_on and number > 2)
    assert pipeline.generate(asked[:1], greedy.replace(max_tokens=0)) == [[]]
    assert pipeline.generate(asked[::-1], greedy) == expected[::-1]  # in another store
    engine.restore()


def test_who_begins_to_listen_between_two_batches_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = make_model(attention=SelfAttention.Config(num_heads=2)), prompts(3)
    greedy, seen, steps = SamplingConfig(max_tokens=7, temperature=0.0), [], []
    expected = generate(model, asked, greedy)
    with offload(model, None) as engine:
        begin = engine.begin

        def begun(*given: Any) -> None:
            steps.append(given)
            if len(steps) == 6:
                model.blocks[0].register_forward_hook(lambda *_: seen.append(len(steps)))
            begin(*given)

        monkeypatch.setattr(engine, "begin", begun)
        assert DualBatch(engine, batch_size=2).generate(asked, greedy) == expected
    assert seen == [*range(6, len(steps) + 1)]


@pytest.mark.parametrize("use_kernel", [True, False])
def test_a_trace_of_regrouped_batches_is_that_of_their_sequences(use_kernel: bool) -> None:
    model, asked = make_model(attention=SelfAttention.Config(num_heads=2)), prompts(5)
    greedy = SamplingConfig(max_tokens=7, temperature=0.0)
    greedy = greedy.replace(stop=(generate(model, asked, greedy)[0][3],))
    with record_routing(model) as recorder:
        generate(model, asked, greedy)
    expected = Routes.from_trace(recorder.trace())
    with offload(model, None) as engine:
        pipeline = DualBatch(engine, batch_size=2, scheduler=TokenScheduler(), use_kernel=use_kernel)
        pipeline.generate(asked[:2], greedy)  # packs what it compiles, before anyone listens
        with record_routing(model) as recorder:
            pipeline.generate(asked, greedy)
            DualBatch(engine, batch_size=2, use_kernel=use_kernel).generate(asked[:1], greedy)
    found = Routes.from_trace(recorder.trace())

    def sequences(routes: Routes) -> list[tuple[bytes, ...]]:
        columns = routes.token_N, routes.position_N, routes.bits_NLP
        return sorted(tuple(column[rows].tobytes() for column in columns) for rows in routes.sequences())

    assert sequences(found) == sorted([*sequences(expected), *sequences(expected.take([0]))])


@pytest.mark.parametrize("top_k", [(2, 2, 2), (1, 2, 1)])
def test_the_likeliest_of_each_layer_are_chosen(top_k: tuple[int, ...]) -> None:
    prob_TLE = np.random.default_rng(0).random((5, 3, 6)).astype(np.float32)
    chosen_TLE = likeliest(prob_TLE, top_k)
    for layer, places in enumerate(top_k):
        least_T = np.sort(prob_TLE[:, layer])[:, -places]
        np.testing.assert_array_equal(chosen_TLE[:, layer], prob_TLE[:, layer] >= least_T[:, None])


def test_it_runs_without_predictions() -> None:
    model, asked = make_model(), prompts(3)
    greedy = SamplingConfig(max_tokens=4, temperature=0.0)
    expected = generate(model, asked, greedy)
    engine = offload(model, None, policy="lru")
    assert DualBatch(engine, batch_size=1).generate(asked, greedy) == expected
    engine.restore()


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that nobody has written yet is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_rows_of_different_lengths_see_only_what_was_written(poison: None) -> None:
    torch.manual_seed(0)
    store, parts = (
        RowStore(3, 6, (1, 2, 4)),
        {row: torch.randn(3, 1, 2, length, 4) for row, length in enumerate((1, 4, 4))},
    )
    for rows in ([0], [1, 2]):
        query, key, value = torch.cat([parts[row] for row in rows], 1)
        store.select(rows, query.shape[2])
        made = store.attend(0, query, key, value)
        torch.testing.assert_close(made, F.scaled_dot_product_attention(query, key, value, is_causal=True))
        store.advance(query.shape[2])
    new = torch.randn(3, 3, 2, 1, 4)
    store.select([2, 0, 1], 1)
    made = store.attend(0, *new)
    for at, row in enumerate((2, 0, 1)):
        seen = [torch.cat((part, new[number, at : at + 1]), 2) for number, part in enumerate(parts[row])]
        expected = F.scaled_dot_product_attention(new[0, at : at + 1], seen[1], seen[2])
        torch.testing.assert_close(made[at : at + 1], expected)


def test_a_full_store_says_so() -> None:
    store = RowStore(1, 2, (1, 1, 4))
    with pytest.raises(CapacityError, match="2 positions, but 3"):
        store.select([0], 3)
