"""`Skips`: what blocks compute of requests whose prompts are pruned, decided once, kept as long as the request, and told once."""

import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.depth.ftp import FactorConfig, TokenRouter, TokenSkipper, static_keep
from anabranch.depth.gathered import Looks
from anabranch.errors import CheckpointError, ConfigError, InputError
from anabranch.serving import Request, Sampling
from anabranch.serving.engine.skips import Choosing, Kept, Skips, check_skips, skipper_of, stores_of
from skipped_models import BLOCKS, decoder, router

CPU = torch.device("cpu")
# The third block decodes nothing, the fourth does not run.
SCHEDULE = (0.0, 0.3, 0.6, 1.0, 0.5)
GOES = [True, True, False, False, True]
NONE_STORED = np.zeros(BLOCKS, np.bool_)
LOOKS = Looks(scale=1.0)


def asking(id="a", prompt=(1, 2, 3, 4), **fields):
    return Request(id=id, prompt=prompt, skips_tokens=True, **fields)


def test_what_is_kept_by_hand():
    """Two blocks, a prompt of four; the second passes over tokens 1 and 2, and over all behind the prompt."""
    kept = Kept(np.array([[1, 1, 1, 1], [1, 0, 0, 1]], np.bool_), np.array([True, False]), NONE_STORED[:2])
    assert [kept.stored(0, at) for at in range(7)] == [0, 1, 2, 3, 4, 5, 6]
    assert [kept.stored(1, at) for at in range(7)] == [0, 1, 1, 1, 2, 2, 2]
    assert [kept.places(1, start, 3).tolist() for start in (0, 1, 2, 3, 4)] == [[0], [2], [1], [0], []]
    assert [kept.places(0, start, 3).tolist() for start in (0, 3, 5)] == [[0, 1, 2]] * 3
    assert (kept.computed, kept.path, kept.num_prompt) == ((4, 2), (0,), 4)
    assert [kept.passed(1, start, 3).tolist() for start in range(4)] == [[]] * 4


def test_what_is_kept_by_hand_of_a_block_that_stores_all():
    """The same prompt; keys and values of tokens 1 and 2 are made, too."""
    kept = Kept(np.array([[1, 0, 0, 1], [1, 0, 0, 1]], np.bool_), np.array([True, False]), np.array([True, True]))
    assert [kept.stored(0, at) for at in range(7)] == [0, 1, 2, 3, 4, 5, 6]
    assert [kept.stored(1, at) for at in range(7)] == [0, 1, 2, 3, 4, 4, 4]
    assert [kept.places(0, start, 3).tolist() for start in (0, 1, 2, 3, 4)] == [[0], [2], [1, 2], [0, 1, 2], [0, 1, 2]]
    assert [kept.passed(0, start, 3).tolist() for start in (0, 1, 2, 3, 4)] == [[1, 2], [0, 1], [0], [], []]
    assert (kept.positions(0, 6).tolist(), kept.positions(1, 6).tolist()) == ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3])
    assert (kept.computed, kept.path) == ((2, 2), (0,))


@given(
    keep=st.integers(1, 9).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=4)
    ),
    goes=st.lists(st.booleans(), min_size=4, max_size=4),
    stores=st.lists(st.booleans(), min_size=4, max_size=4),
    start=st.integers(0, 14),
    count=st.integers(0, 6),
)
def test_what_is_kept_is_counted_token_by_token(keep, goes, stores, start, count):
    kept = Kept(np.array(keep, np.bool_), np.array(goes[: len(keep)]), np.array(stores[: len(keep)]))

    def computes(layer, position):
        return keep[layer][position] if position < len(keep[layer]) else goes[layer]

    for layer in range(len(keep)):
        naive = [computes(layer, position) for position in range(start + count)]
        stored = [is_run or (stores[layer] and at < len(keep[layer])) for at, is_run in enumerate(naive)]
        assert kept.stored(layer, start) == kept.stored_I(start)[layer] == sum(stored[:start])
        assert kept.places(layer, start, count).tolist() == [at for at in range(count) if naive[start + at]]
        passed = [at for at in range(count) if stored[start + at] and not naive[start + at]]
        assert kept.passed(layer, start, count).tolist() == passed
        assert kept.positions(layer, start).tolist() == [at for at in range(start) if stored[at]]
    assert kept.computed == tuple(map(sum, keep))
    assert kept.path == tuple(layer for layer in range(len(keep)) if goes[layer])


def test_by_place_nothing_is_looked_at():
    choosing = Choosing(TokenSkipper(decoder(), SCHEDULE), 10, CPU)
    real = torch.ones(1, 10, dtype=torch.bool)
    for layer, sparsity in enumerate(SCHEDULE):
        wanted = static_keep(real, sparsity)[0].nonzero().flatten().tolist()
        assert choosing.decide(layer, None).tolist() == wanted
        assert not choosing.wants_scores(layer)
    assert choosing.kept().keep_IN[1].nonzero()[0].tolist() == [0, 4, 5, 6, 7, 8, 9]
    assert choosing.kept().computed == (10, 7, 4, 0, 5)
    assert choosing.kept().goes_I.tolist() == GOES


def test_blocks_are_decided_about_in_order():
    choosing = Choosing(TokenSkipper(decoder(), SCHEDULE), 3, CPU)
    with pytest.raises(AssertionError, match="in order"):
        choosing.decide(1, None)
    choosing.decide(0, None)
    with pytest.raises(AssertionError, match="in order"):
        choosing.decide(0, None)


def by_attention():
    """A router that wants tokens by how much attention they get."""
    made = TokenRouter(seed=0).requires_grad_(False)
    for parameter in made.parameters():
        parameter.zero_()
    # Unit 0 is N a_j, and what speaks for computing.
    made.first.weight[0, 1] = 1.0
    made.second.weight[1, 0] = 1.0
    return made


def looking_at(token, *, length=6):
    """(query_1HRD, key_1GRD) of two heads that share keys: each query looks at ``token`` wherever it stands before it."""
    query, key = torch.zeros(1, 2, length, 2), torch.zeros(1, 1, length, 2)
    query[..., 0], key[:, :, token, 0] = 1.0, 20.0
    return query, key


def test_the_next_block_computes_what_this_one_attended_to():
    """Six tokens, half of which pass: token 0 as the first, token 2 that all look at, and one of equals."""
    choosing = Choosing(TokenSkipper(decoder(2), (0.0, 0.5), by_attention()), 6, CPU)
    assert choosing.decide(0, None).tolist() == list(range(6))
    assert choosing.wants_scores(0)
    choosing.looked(0, *looking_at(2), LOOKS)
    kept = choosing.decide(1, torch.zeros(1, 6, 32)).tolist()
    assert {0, 2} <= set(kept)
    assert len(kept) == 3
    assert not choosing.wants_scores(1), "nothing comes behind it"


def test_a_token_that_is_passed_over_keeps_its_score():
    """Block 1 passes over tokens 3 and 4; what it sees stands at the places of those that it computed."""
    choosing = Choosing(TokenSkipper(decoder(3), (0.0, 0.4, 0.5), by_attention()), 6, CPU)
    choosing.decide(0, None)
    choosing.looked(0, *looking_at(5), LOOKS)
    first = choosing._table.score_BL.clone()
    computed = choosing.decide(1, torch.zeros(1, 6, 32))
    assert 5 in computed
    assert len(computed) == 4
    # Of the computed the third is looked at.
    choosing.looked(1, *looking_at(2, length=4), LOOKS)
    second = choosing._table.score_BL
    over = sorted(set(range(6)) - set(computed.tolist()))
    assert torch.equal(second[0, over], first[0, over])
    # Queries behind it give it all, the one before it none: a mean over those at or behind it.
    assert second[0, computed[2]] == pytest.approx(1.0, abs=1e-6)
    assert computed[2] in choosing.decide(2, torch.zeros(1, 6, 32))


def test_keys_that_are_kept_take_their_share_of_attention():
    """Block 1 keeps keys of the two tokens that it passes over: a query of no preference weighs all at or before it alike."""
    skipper = TokenSkipper(decoder(3), (0.0, 0.4, 0.5), by_attention(), kv="keep")
    choosing = Choosing(skipper, 6, CPU)
    choosing.decide(0, None)
    assert (choosing.stores(0), choosing.passed(0).tolist()) == (True, [])
    choosing.looked(0, *looking_at(5), LOOKS)
    computed = choosing.decide(1, torch.zeros(1, 6, 32)).tolist()
    passed = choosing.passed(1).tolist()
    assert (len(passed), sorted(passed + computed)) == (2, list(range(6)))
    choosing.looked(1, torch.zeros(1, 2, 4, 2), torch.zeros(1, 1, 4, 2), LOOKS, torch.zeros(1, 1, 2, 2))
    for place in computed:
        behind = [1 / (query + 1) for query in computed if query >= place]
        assert float(choosing._table.score_BL[0, place]) == pytest.approx(sum(behind) / len(behind))


def test_blocks_that_are_not_there_keep_nothing():
    skipper = TokenSkipper(decoder(), SCHEDULE, kv="keep")
    assert stores_of(skipper).tolist() == [True, True, True, False, True]
    assert not stores_of(TokenSkipper(decoder(), SCHEDULE)).any()
    skips = Skips(skipper, CPU)
    skips.add(asking(prompt=tuple(range(10))))
    kept = skips.kept("a")
    assert [kept.stored(layer, 10) for layer in range(BLOCKS)] == [10, 10, 10, 0, 10]
    assert kept.computed == (10, 7, 4, 0, 5)


def test_factors_of_earlier_tokens_are_each_tokens_own_weight():
    skipper = TokenSkipper(decoder(2), (0.0, 0.5), by_attention(), mode="threshold", factors=FactorConfig(causal=True))
    choosing = Choosing(skipper, 4, CPU)
    choosing.decide(0, None)
    choosing.looked(0, torch.zeros(1, 2, 4, 2), torch.zeros(1, 1, 4, 2), LOOKS)
    # A query that weighs alike what it sees gives itself 1, 1/2, 1/3, 1/4.
    torch.testing.assert_close(choosing._table.score_BL, torch.tensor([[1, 1 / 2, 1 / 3, 1 / 4]]))


def test_a_block_that_computes_nothing_is_not_looked_at():
    choosing = Choosing(TokenSkipper(decoder(3), (0.0, 1.0, 0.5), by_attention()), 4, CPU)
    choosing.decide(0, None)
    choosing.looked(0, *looking_at(1, length=4), LOOKS)
    assert choosing.decide(1, torch.zeros(1, 4, 32)).tolist() == []
    assert not choosing.wants_scores(1)
    assert 1 in choosing.decide(2, torch.zeros(1, 4, 32))


@pytest.mark.parametrize("by", ["static", "random"])
def test_by_place_a_request_is_decided_when_it_comes_and_told_once(by):
    skips = Skips(TokenSkipper(decoder(), SCHEDULE, by, seed=3), CPU)
    prompt = tuple(range(10))
    skips.add(asking(prompt=prompt))
    assert skips.prompt_of("a") is None
    wanted = skips.skipper.prefill(list(prompt)).keep_IBL[:, 0].numpy()
    assert np.array_equal(skips.kept("a").keep_IN, wanted)
    assert skips.take_untold("a") is skips.kept("a")
    assert skips.take_untold("a") is None
    # Who computes it again, after it was preempted, computes the same.
    assert np.array_equal(skips.kept("a").keep_IN, wanted)


def test_with_a_router_it_waits_until_it_is_chosen():
    skips = Skips(TokenSkipper(decoder(), SCHEDULE, router()), CPU)
    skips.add(asking())
    skips.add(asking("b", (5, 6)))
    assert skips.prompt_of("a") == (1, 2, 3, 4)
    assert skips.take_untold("a") is None, "nothing is decided yet"
    choosing = skips.choosing("a")
    assert choosing.decide(0, None).tolist() == [0, 1, 2, 3]
    kept = Kept(np.ones((BLOCKS, 4), np.bool_), np.array(GOES), NONE_STORED)
    skips.chosen("a", kept)
    assert (skips.prompt_of("a"), skips.kept("a"), skips.take_untold("a"), skips.take_untold("a")) == (
        None,
        kept,
        kept,
        None,
    )
    assert skips.prompt_of("b") == (5, 6), "another goes on waiting"


@pytest.mark.parametrize("by", ["static", "random", "learned"])
def test_a_prompt_of_one_token_is_never_pruned(by):
    skips = Skips(TokenSkipper(decoder(), SCHEDULE, router() if by == "learned" else by), CPU)
    skips.add(asking(prompt=(7,)))
    assert skips.prompt_of("a") is None
    assert skips.kept("a").computed == (1,) * BLOCKS
    assert skips.kept("a").goes_I.tolist() == GOES


def test_of_others_nothing_is_kept_and_of_nobody_once_it_ended():
    skips = Skips(TokenSkipper(decoder(), SCHEDULE, router()), CPU)
    skips.add(Request(id="whole", prompt=(1, 2)))
    assert (skips.prompt_of("whole"), skips.take_untold("whole")) == (None, None)
    with pytest.raises(KeyError):
        skips.kept("whole")
    skips.add(asking("waits"))
    skips.add(asking("decided", (7,)))
    for id in ("whole", "waits", "decided", "waits"):
        skips.forget(id)
    assert (skips._waiting, skips._kept, skips._untold) == ({}, {}, set())
    # An id may come again, and is another request.
    skips.add(asking("waits", (9, 8)))
    assert skips.prompt_of("waits") == (9, 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"routes_depth": True}, "so is routes_depth: both say what runs"),
        ({"path": (0, 1)}, "so is path: both say what runs"),
        ({"record_routing": True}, "so is record_routing: experts of tokens that blocks pass over are not told"),
        ({"sampling": Sampling(prompt_logprobs=1)}, "so is prompt_logprobs: .* would leak these"),
        ({"pooling": "last"}, "so is pooling: vectors are of whole texts"),
    ],
)
def test_what_does_not_go_with_it(fields, message):
    given = {"sampling": Sampling(), **fields}
    usual = {"routes_depth": False, "path": None, "record_routing": False, "pooling": None}
    request = types.SimpleNamespace(skips_tokens=True, **{**usual, **given})
    skips = Skips(TokenSkipper(decoder(), SCHEDULE), CPU)
    with pytest.raises(InputError, match=message):
        check_skips(request, skips)
    request.skips_tokens = False
    check_skips(request, skips)
    check_skips(request, None)


def test_a_request_is_refused_without_a_skipper_and_taken_with_one():
    with pytest.raises(InputError, match=r"the engine has no skipper of tokens \(engine.depth.skipper\)"):
        check_skips(asking(), None)
    check_skips(asking(), Skips(TokenSkipper(decoder(), SCHEDULE), CPU))


def test_a_skipper_is_held_against_the_model(tmp_path):
    model = decoder()
    skipper = TokenSkipper(model, SCHEDULE)
    assert skipper_of(model, None) is None
    assert skipper_of(model, skipper) is skipper
    skipper.save(tmp_path / "skipper")
    assert skipper_of(model, tmp_path / "skipper").schedule == skipper.schedule
    with pytest.raises(CheckpointError, match="of a model with fingerprint"):
        skipper_of(decoder(seed=1), tmp_path / "skipper")
    with pytest.raises(ConfigError, match="of another model than the engine's"):
        skipper_of(decoder(), skipper)
    seen = TokenSkipper(decoder(window=4), SCHEDULE)
    assert skipper_of(seen.stack.module, seen) is seen
