"""Recorded routes, predictors, and how they are measured."""

from pathlib import Path

import numpy as np
import pytest
import torch

from anabranch.errors import CheckpointError, ConfigError, DataError
from anabranch.lm import SamplingConfig, generate
from anabranch.nn import kernels
from anabranch.routing import record_routing
from anabranch.routing.cache_policy import check_routes
from anabranch.serving.expertflow import Expert, Layout, Routes, find_pools, offload
from anabranch.serving.expertflow.predictors import (
    EncoderDecoder,
    Fingerprint,
    Frequency,
    Oracle,
    Slp,
    Tlp,
    load_predictor,
)
from anabranch.serving.expertflow.predictors.base import Naming, Row, choose
from anabranch.serving.expertflow.predictors.encdec import Settings
from anabranch.serving.expertflow.predictors.network import PathNetwork
from anabranch.serving.expertflow.predictors.steps import CompiledSteps, TorchSteps, make_steps
from anabranch.serving.expertflow.routes import batch_accuracy
from expertflow_models import VOCAB, make_model

FINGERPRINT = Fingerprint((4, 6), (1, 2), "vocab:50")
SMALL = Settings(dim=16, feed_forward=32, window=4, max_input=6, steps=2, batch=4, length=8)


def made_routes(sequences: int = 6, length: int = 30, seed: int = 0) -> Routes:
    """Routes that follow from the token id and the one before."""
    generator = np.random.default_rng(seed)
    number = sequences * length
    token_N = generator.integers(50, size=number).astype(np.int32)
    before_N = np.roll(token_N, 1)
    chosen_NLE = np.zeros((number, 2, 6), bool)
    rows = np.arange(number)
    chosen_NLE[rows, 0, token_N % 4] = True
    chosen_NLE[rows, 1, token_N % 3] = True
    chosen_NLE[rows, 1, 3 + before_N % 3] = True
    return Routes(
        np.packbits(chosen_NLE, axis=-1),
        token_N,
        np.repeat(np.arange(sequences), length),
        np.tile(np.arange(length, dtype=np.int32), sequences),
        (4, 6),
        (1, 2),
    )


def test_routes_are_what_the_trace_says(tmp_path: Path) -> None:
    model = make_model()
    with record_routing(model) as recorder, torch.inference_mode():
        model(torch.arange(20).view(2, 10))
    trace = recorder.trace()
    routes = Routes.from_trace(trace)
    assert routes.bits_NLP.shape == (20, 4, 2)
    assert routes.token_N.tolist() == list(range(20))
    for layer in range(4):
        index_NK = trace.decisions(layer).index_NK
        chosen_NE = routes.chosen()[:, layer]
        assert chosen_NE.sum() == index_NK.size
        assert chosen_NE[np.arange(20)[:, None], index_NK].all()
        index_STK = check_routes(routes.index_STK(layer), 16)
        assert np.array_equal(np.sort(index_STK.reshape(20, 2)), np.sort(index_NK))
    routes.save(tmp_path / "routes.npz")
    again = Routes.load(tmp_path / "routes.npz")
    assert np.array_equal(again.bits_NLP, routes.bits_NLP)
    assert (again.num_experts, again.top_k) == (routes.num_experts, routes.top_k)
    both = Routes.concatenate([routes, again])
    assert len(both) == 40
    assert [rows.stop - rows.start for rows in both.sequences()] == [10, 10, 10, 10]
    assert np.array_equal(both.take([3]).token_N, routes.take([1]).token_N)
    with pytest.raises(DataError, match="recorded routes"):
        Routes.load(__file__)
    with pytest.raises(DataError, match="different shapes"):
        Routes.concatenate([routes, made_routes()])


def test_routes_of_ragged_sequences() -> None:
    model, given = make_model(), [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    with record_routing(model) as recorder:
        generate(model, given, SamplingConfig(max_tokens=3, temperature=0.0))
    routes = Routes.from_trace(recorder.trace())
    for prompt, rows in zip(given, routes.sequences(), strict=True):
        assert routes.token_N[rows][: len(prompt)].tolist() == prompt
        assert routes.position_N[rows].tolist() == list(range(len(prompt) + 2))


def test_batch_accuracy_by_hand() -> None:
    chosen, predicted = np.zeros((2, 2, 4), bool), np.zeros((2, 2, 4), bool)
    chosen[0, 0, 0] = chosen[1, 0, 1] = chosen[0, 1, 2] = chosen[1, 1, 2] = True  # unions {0, 1}, {2}
    predicted[0, 0, 0] = predicted[1, 0, 3] = predicted[0, 1, 2] = predicted[1, 1, 1] = True  # {0, 3}, {1, 2}
    found = batch_accuracy(chosen, predicted)
    assert found.recall == (0.5 + 1) / 2
    assert found.precision == (0.5 + 0.5) / 2
    assert (found.wanted, found.predicted) == (1.5, 2.0)


def test_choose_takes_k_and_one_more_of_each_token_likeliest_first() -> None:
    layout = Layout.plain((4, 6), (1, 2))
    prob_TE = np.array([[0.05, 0.9, 0.3, 0.0, 0.0, 0.0], [0.2, 0.8, 0.0, 0.0, 0.0, 0.0]], np.float32)
    assert [expert.number for expert in choose(prob_TE, layout, 0)] == [1, 2, 0]
    assert [expert.number for expert in choose(prob_TE, layout, 0, extra=0)] == [1]
    assert choose(np.zeros((2, 6), np.float32), layout, 1) == []


def test_probabilities_of_a_batch_by_hand() -> None:
    layout = Layout.plain((4, 6), (1, 1))
    prob_TE = np.array([[0.2, 0.3, 0.5, 0.0, 0.0, 0.0], [0.2, 0.8, 0.0, 0.0, 0.0, 0.9]], np.float32)
    # at least one of two tokens: 1 - .8 * .8 = .36, 1 - .7 * .2 = .86, .5; the last two columns are of no expert of layer 0
    assert [expert.number for expert in Naming(least=0.3).layer(prob_TE, layout, 0, True)] == [1, 2, 0]
    assert [expert.number for expert in Naming(least=0.4).layer(prob_TE, layout, 0, True)] == [1, 2]
    assert Naming(least=0.9).step(prob_TE[:, None].repeat(2, 1), layout, True) == [[], [Expert(1, 5)]]


def test_all_layers_are_named_as_each_by_itself() -> None:
    layout, generator = Layout((0, 1, 0, 2), (1, 2, 1, 1), (4, 7, 1), (0, 0, 0), (1,)), np.random.default_rng(0)
    for tokens in (1, 2, 5):
        prob_TLE = generator.integers(0, 9, size=(tokens, 4, 7)).astype(np.float32) / 8  # with ties
        for least in (0.3, 0.9):
            wanted = []
            for layer, pool in enumerate(layout.pool_of_layer):
                prob_E = 1 - np.prod(1 - prob_TLE[:, layer, : layout.num_experts[pool]], axis=0)
                index = [one for one in np.argsort(-prob_E, kind="stable").tolist() if prob_E[one] >= least]
                wanted.append([Expert(pool, one) for one in index])
            assert Naming(least=least).step(prob_TLE, layout, True) == wanted
            assert [Naming(least=least).layer(prob_TLE[:, at], layout, at, True) for at in range(4)] == wanted


def test_scores_that_are_no_probabilities_only_order() -> None:
    layout, prob_TE = Layout.plain((4,), (1,)), np.array([[0.01, 0.02, 0.03, 0.0]], np.float32)
    assert [expert.number for expert in Naming(extra=1).layer(prob_TE, layout, 0, False)] == [2, 1]
    assert Naming(extra=1).layer(prob_TE, layout, 0, True) == []


@pytest.mark.parametrize("wrong", [{"least": 0.0}, {"least": 1.5}, {"extra": -1}])
def test_wrong_namings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="least must be"):
        Naming(**wrong)


def row(ids: list[int], new: int, prompt: int, key: str = "a") -> Row:
    return Row(key, np.array(ids, np.int32), new, prompt)


def test_the_network_continues_as_if_it_had_read_all_at_once() -> None:
    predictor = EncoderDecoder(FINGERPRINT, 50, SMALL).fit(made_routes())
    ids, others = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [7, 7, 2, 1]
    predictor.predict(np.array(ids[:3]), [row(ids[:3], 3, 3)])
    predictor.predict(np.array(others[:2]), [row(others[:2], 2, 2, "b")])
    for end in range(4, len(ids) + 1):
        rows = [row(ids[:end], 1, 3)]
        if end <= 5:
            rows.append(row(others[: end - 1], 1, 2, "b"))  # a batch of two whose inputs differ in length
        found_TLE = predictor.predict(np.array([one.ids[-1] for one in rows]), rows)
        for one, found_LE in zip(rows, found_TLE, strict=True):
            fresh = EncoderDecoder.restore(
                FINGERPRINT, {**predictor.network.state_dict(), "vocab_size": 50, "config": vars(SMALL)}
            )
            ids_of = one.ids.tolist()
            whole = fresh.predict(np.array(ids_of), [row(ids_of, len(ids_of), one.prompt_length, "c")])
            np.testing.assert_allclose(found_LE, whole[-1], atol=1e-5)
    predictor.forget("a")
    assert set(predictor._states) <= {"b"}


@pytest.mark.skipif(kernels.load() is None, reason="no compiled kernels on this machine")
@pytest.mark.parametrize(
    ("dim", "feed_forward", "depth", "heads", "window", "experts", "number"),
    [
        (16, 32, 1, 4, 4, 6, 3),
        (48, 80, 3, 3, 5, 7, 7),
        (32, 64, 2, 1, 33, 6, 13),
        (16, 16, 2, 16, 1, 1, 1),
        (528, 1040, 1, 4, 3, 6, 2),
    ],
)
def test_compiled_steps_are_those_of_torch(
    dim: int, feed_forward: int, depth: int, heads: int, window: int, experts: int, number: int
) -> None:
    network = PathNetwork(
        50, 3, experts, dim=dim, feed_forward=feed_forward, depth=depth, heads=heads, window=window
    ).eval()
    for weight in network.parameters():
        weight.data += 0.1 * torch.randn_like(weight) * (16 / dim) ** 0.5
    plain, compiled, generator = TorchSteps(network), CompiledSteps(network), np.random.default_rng(0)
    states: tuple[list, list] = ([], [])
    for _ in range(number):
        prompt, count = int(generator.integers(1, 40)), int(generator.integers(1, 2 * window + 1))
        cross, past = [torch.randn(prompt, 2 * dim) for _ in range(depth)], torch.randn(depth, window, 2 * dim)
        for steps, kept in zip((plain, compiled), states, strict=True):
            kept.append(steps.begin(cross, past, count))
    for step in range(2 * window + 3):  # the ring is filled and goes round
        rows = generator.permutation(number)[: 1 + step % number]  # sequences that are not of a step stay as they are
        id_B = generator.integers(-2, 53, size=len(rows))  # and unknown ids
        found = [
            steps.step([kept[row] for row in rows], id_B) for steps, kept in zip((plain, compiled), states, strict=True)
        ]
        np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-5)


def test_a_sequence_without_a_prompt_is_continued() -> None:
    predictor = EncoderDecoder(FINGERPRINT, 50, SMALL)
    for end in (1, 2, 3):
        assert np.isfinite(predictor.predict(np.array([end]), [row(list(range(end)), 1, 0)])).all()


def test_what_is_not_compiled_is_continued_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = PathNetwork(50, 2, 6, dim=12, feed_forward=32, depth=1, heads=4, window=4)
    assert isinstance(make_steps(odd), TorchSteps)
    monkeypatch.setattr(kernels, "load", lambda: None)
    predictor = EncoderDecoder(FINGERPRINT, 50, SMALL)
    predictor.predict(np.array([1, 2]), [row([1, 2], 2, 2)])
    assert isinstance(predictor._steps, TorchSteps)
    assert predictor.predict(np.array([3]), [row([1, 2, 3], 1, 2)]).shape == (1, 2, 6)


def test_new_weights_are_used_from_then_on() -> None:
    predictor = EncoderDecoder(FINGERPRINT, 50, SMALL)
    first = [row([1, 2], 2, 2)]
    for _ in range(2):
        predictor.predict(first[0].ids, first)
        found_TLE = predictor.predict(np.array([3]), [row([1, 2, 3], 1, 2)])
        fresh_TLE = predictor.predict(np.array([2, 3]), [row([1, 2, 3], 2, 2, "b")])
        np.testing.assert_allclose(found_TLE[0], fresh_TLE[-1], atol=1e-5)
        predictor.fit(made_routes())


@pytest.mark.slow
def test_the_network_learns_routes_that_follow_from_tokens(tmp_path: Path) -> None:
    routes = made_routes(24)
    settings = Settings(dim=32, feed_forward=64, depth=1, window=4, max_input=8, steps=250, batch=16, length=24)
    predictor = EncoderDecoder(FINGERPRINT, 50, settings).fit(routes)
    test = made_routes(2, seed=9)
    accuracy = batch_recall(predictor, test)
    assert accuracy > 0.8
    assert accuracy > batch_recall(Tlp(FINGERPRINT), test) + 0.2
    predictor.save(tmp_path / "rpp.safetensors")
    again = load_predictor(tmp_path / "rpp.safetensors")
    rows = [row([1, 2, 3], 3, 3)]
    np.testing.assert_array_equal(again.predict(rows[0].ids, rows), predictor.predict(rows[0].ids, rows))
    assert again.fingerprint == FINGERPRINT


def batch_recall(predictor, routes: Routes) -> float:
    layout, found = Layout.plain((4, 6), (1, 2)), []
    for rows in routes.sequences():
        ids = routes.token_N[rows].tolist()
        for end in range(4, len(ids)):
            if isinstance(predictor, Tlp) and end > 4:
                for layer in range(2):
                    index_K = np.flatnonzero(routes.chosen(slice(rows.start + end - 2, rows.start + end - 1))[0, layer])
                    predictor.observe(layer, index_K[None], [row(ids[: end - 1], 1, 3, str(rows.start))])
            prob_TLE = predictor.predict(np.array(ids[end - 1 : end]), [row(ids[:end], 1, 3, str(rows.start))])
            actual_LE = routes.chosen(slice(rows.start + end - 1, rows.start + end))[0]
            for layer in range(2):
                named = {expert.number for expert in choose(prob_TLE[:, layer], layout, layer, extra=0)}
                wanted = set(np.flatnonzero(actual_LE[layer]).tolist())
                found.append(len(named & wanted) / len(wanted))
    return float(np.mean(found))


def test_a_predictor_for_another_model_is_refused(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(CheckpointError, match="experts by layer"):
        offload(model, None, predictor=EncoderDecoder(FINGERPRINT, 50, SMALL))
    right = find_pools(model).fingerprint(f"vocab:{VOCAB}")
    for wrong, what in (
        (Fingerprint(right.num_experts, (1,) * 4, right.tokenizer), "active experts"),
        (Fingerprint(right.num_experts, right.top_k, "vocab:97:abc"), "tokenizer"),
    ):
        with pytest.raises(CheckpointError, match=what):
            offload(model, None, predictor=EncoderDecoder(wrong, VOCAB, SMALL))
    with pytest.raises(DataError, match="the predictor is for"):
        EncoderDecoder(right, VOCAB, SMALL).fit(made_routes())
    with pytest.raises(ConfigError, match="has to be fitted"):
        offload(model, None, predictor="encdec")
    with pytest.raises(ConfigError, match="no predictor 'psychic'"):
        offload(model, None, predictor="psychic")
    with pytest.raises(DataError, match="holds no route predictor"):
        offload(model, None, predictor=__file__)


def test_token_and_layer_baselines() -> None:
    tlp = Tlp(FINGERPRINT)
    first = [row([1], 1, 1), row([2], 1, 1, "b")]
    assert not tlp.predict(np.array([1, 2]), first).any()
    tlp.observe(0, np.array([[3], [1]]), first)
    tlp.observe(1, np.array([[3, 0], [1, -1]]), first)
    prob_TLE = tlp.predict(np.array([5]), [row([2, 5], 1, 1, "b")])
    assert np.argwhere(prob_TLE).tolist() == [[0, 0, 1], [0, 1, 1]]
    slp = Slp(FINGERPRINT)
    found = slp.refine(0, torch.zeros(1, 2), torch.tensor([[3]]))
    assert found is not None
    assert found[0] == 1
    assert np.flatnonzero(found[1]).tolist() == [3]
    assert slp.refine(1, torch.zeros(1, 2), torch.tensor([[3, 5]])) is None


def test_frequencies_of_ids(tmp_path: Path) -> None:
    routes = made_routes()
    frequency = Frequency(FINGERPRINT, 51, weight=1.0)
    with pytest.raises(ConfigError, match="fit it first"):
        frequency.predict(np.array([1]), [])
    frequency.fit(routes)
    token = int(routes.token_N[0])
    seen = int((routes.token_N == token).sum())
    mean_E = routes.chosen()[:, 0].mean(0)
    prob_TLE = frequency.predict(np.array([token, 50]), [])
    np.testing.assert_allclose(prob_TLE[0, 0, token % 4], (seen + mean_E[token % 4]) / (seen + 1), rtol=1e-5)
    np.testing.assert_allclose(prob_TLE[1, 0], mean_E, rtol=1e-5)  # an id that was never seen
    frequency.save(tmp_path / "f.safetensors")
    np.testing.assert_array_equal(
        load_predictor(tmp_path / "f.safetensors").predict(np.array([3]), []), frequency.predict(np.array([3]), [])
    )


def test_an_oracle_knows_what_comes_too() -> None:
    routes = made_routes(2, 5)
    oracle = Oracle(FINGERPRINT, routes, steps_ahead=2)
    ids = routes.token_N[:5].tolist()
    rows = [row(ids[:3], 2, 1)]
    assert np.array_equal(oracle.predict(np.array(ids[1:3]), rows), routes.chosen(slice(1, 3)))
    ahead = oracle.predict_ahead(rows)
    assert [
        np.array_equal(prob_TLE, routes.chosen(slice(at, at + 1))) for prob_TLE, at in zip(ahead, (3, 4), strict=True)
    ] == [True, True]
    assert not oracle.predict(np.array([1]), [row([77, 1], 1, 1)]).any()
