"""The data set that predictors are fitted on, and how they are judged: by hand, then against an engine's steps."""

from typing import Any

import numpy as np
import pytest

from anabranch.errors import ConfigError, DataError
from anabranch.lm import SamplingConfig, generate
from anabranch.routing import record_routing
from anabranch.serving.core.request import Sampling
from anabranch.serving.expertflow import Routes, find_pools, offload
from anabranch.serving.expertflow.predictors import Fingerprint, Frequency, Oracle, Slp, Tlp
from anabranch.serving.expertflow.predictors.accuracy import decode_accuracy
from anabranch.serving.expertflow.predictors.sampled import held_out, sample_routes
from expertflow_models import VOCAB, make_model, prompts


def routes_of(experts_SLT: list[list[list[int]]], num_experts: int = 4) -> Routes:
    """Routes of sequences whose tokens go to one expert in each layer; ids tell them apart."""
    chosen, sequence, position = [], [], []
    for number, layers in enumerate(experts_SLT):
        index_TL = np.array(layers).T
        chosen.append(np.eye(num_experts, dtype=bool)[index_TL])
        sequence += [number] * len(index_TL)
        position += range(len(index_TL))
    bits = np.packbits(np.concatenate(chosen), axis=-1)
    layers = len(experts_SLT[0])
    token = np.array(position, np.int32) + 10 * np.array(sequence, np.int32)
    columns = token, np.array(sequence), np.array(position, np.int32)
    return Routes(bits, *columns, (num_experts,) * layers, (1,) * layers)


def test_b_acc_by_hand() -> None:
    # Two sequences of four tokens, two layers; the first two tokens are the prompt.
    routes = routes_of([[[0, 1, 1, 2], [0, 1, 2, 2]], [[3, 3, 3, 3], [0, 0, 0, 3]]])
    fingerprint = Fingerprint((4, 4), (1, 1), "x")
    # Token 2: layer 0 wants {1, 3} and token 1 went to {1, 3}: all; layer 1 wants {2, 0}, token 1 went to {1, 0}: half of each.
    # Token 3: layer 0 wants {2, 3} after {1, 3}: half; layer 1 wants {2, 3} after {2, 0}: half.
    tlp = decode_accuracy(Tlp(fingerprint), routes, prompt=2, batch=2)
    assert (tlp.recall, tlp.precision, tlp.wanted, tlp.predicted) == (2.5 / 4, 2.5 / 4, 2, 2)
    # Layer 0 has no layer before it. Layer 1 of token 2: {2, 0} by {1, 3}: none; of token 3: {2, 3} by {2, 3}: all.
    slp = decode_accuracy(Slp(fingerprint), routes, prompt=2, batch=2)
    assert (slp.recall, slp.precision, slp.predicted) == (1 / 4, 1 / 2, 1)
    oracle = decode_accuracy(Oracle(fingerprint, routes), routes, prompt=2, batch=1)
    assert (oracle.recall, oracle.precision, oracle.wanted) == (1, 1, 1)


def test_shorter_sequences_begin_in_their_middle_and_end_with_the_shortest() -> None:
    routes = routes_of([[[0, 1]], [[0, 0, 0, 0, 0, 1]]])
    fingerprint = Fingerprint((4,), (1,), "x")
    # One step: token 1 wants {1, 0}, and token 0 went to {0}.
    both = decode_accuracy(Tlp(fingerprint), routes, prompt=50, batch=7)
    assert (both.recall, both.precision) == (0.5, 1)
    # Alone the other one decodes tokens 3, 4 and 5, of which the last one goes elsewhere.
    each = decode_accuracy(Tlp(fingerprint), routes, prompt=50, batch=1)
    assert each.recall == pytest.approx((0 + 1 + 1 + 0) / 4)
    with pytest.raises(DataError, match="no step to predict"):
        decode_accuracy(Tlp(fingerprint), routes_of([[[0]]]), prompt=1)


@pytest.mark.parametrize("kind", [Tlp, Slp, Frequency])
def test_an_engine_names_what_is_judged(kind: Any) -> None:
    """The shares of named experts that its steps have, of one sequence."""
    model = make_model()
    routes = sample_routes(model, prompts(6), samples=1, sampling=Sampling(max_tokens=6, temperature=0.0))
    number = int(np.argmax(np.diff(routes.starts)))
    one, prompt = routes.take([number]), len(prompts(6)[number])
    fingerprint = find_pools(model).fingerprint(f"vocab:{VOCAB}")
    made = Frequency(fingerprint, VOCAB).fit(routes) if kind is Frequency else kind(fingerprint)
    judged = decode_accuracy(made, one, prompt=prompt, batch=1)
    engine = offload(model, None, predictor=made)
    named: list[set[Any]] = []
    begin_step, expect = engine.cache.begin_step, engine.cache.expect
    layers = engine.layout.num_layers

    def note_step(steps: Any, certain: int) -> None:
        named.extend({expert.number for expert in step} for step in steps[:layers])
        begin_step(steps, certain)

    def note_layer(layer: int, experts: Any) -> None:
        named[len(named) - layers + layer] = {expert.number for expert in experts}
        expect(layer, experts)

    engine.cache.begin_step, engine.cache.expect = note_step, note_layer  # type: ignore[method-assign, assignment]
    generate(model, [one.token_N[:prompt].tolist()], SamplingConfig(max_tokens=len(one) - prompt + 1, temperature=0.0))
    engine.restore()
    wanted = [set(np.flatnonzero(row_E)) for row_LE in one.chosen()[prompt:] for row_E in row_LE]
    decoded = named[layers : layers + len(wanted)]
    shares = [len(want & have) / len(want) for want, have in zip(wanted, decoded, strict=True)]
    assert judged.recall == pytest.approx(np.mean(shares))
    assert judged.predicted == pytest.approx(np.mean([len(have) for have in decoded]))


@pytest.mark.parametrize("is_offloaded", [False, True])
def test_routes_are_those_of_the_tokens_that_were_sampled(is_offloaded: bool) -> None:
    model = make_model()
    engine = offload(model, find_pools(model).layout.total_bytes // 4) if is_offloaded else None
    told: list[int] = []
    routes = sample_routes(
        model,
        prompts(3),
        samples=2,
        sampling=Sampling(max_tokens=5),
        seed=7,
        batch=4,
        progress=told.append,
        hooks=[] if engine is None else [engine],
    )
    found = [routes.token_N[one].tolist() for one in routes.sequences()]
    assert len(found) == 6
    for number, prompt in enumerate(prompts(3)):
        first, second = found[2 * number : 2 * number + 2]
        assert first[: len(prompt)] == second[: len(prompt)] == prompt
        assert len(first) == len(second) == len(prompt) + 4
    assert len({tuple(each) for each in found}) > 3
    assert told == [6]
    with record_routing(model) as recorder:
        for ids in found:
            generate(model, [ids], SamplingConfig(max_tokens=1))
    if engine is not None:
        engine.restore()
    expected = Routes.from_trace(recorder.trace())
    np.testing.assert_array_equal(routes.chosen(), expected.chosen())
    assert (routes.num_experts, routes.top_k) == (expected.num_experts, expected.top_k)


def test_what_cannot_be_sampled_is_said() -> None:
    model = make_model(max_positions=16)
    with pytest.raises(ConfigError, match="have 17, and the model reads 16"):
        sample_routes(model, [[1] * 10], sampling=Sampling(max_tokens=7))
    with pytest.raises(DataError, match="there are no inputs"):
        sample_routes(model, [], sampling=Sampling(max_tokens=7))


@pytest.mark.parametrize(
    ("num", "share", "count"), [(2, 0.9, 1), (10, 0.1, 1), (10, 0.001, 1), (40, 0.25, 10), (3, 0.99, 2)]
)
def test_every_input_is_on_one_side(num: int, share: float, count: int) -> None:
    fit, judged = held_out(num, share, seed=3)
    assert (sorted([*fit, *judged]), len(judged)) == (list(range(num)), count)
    with pytest.raises(DataError, match="1 is too few"):
        held_out(1, share)
