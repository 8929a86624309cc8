"""FTP at inference: kept sets, features, and passes that agree with the dense model, with gathered rows, and with and without caches."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from anabranch.depth.ftp import (
    FactorConfig,
    RouterConfig,
    TokenRouter,
    TokenSkipper,
    column_means,
    factors_of,
    random_keep,
    skip_count,
    static_keep,
)
from anabranch.depth.ftp.passes import gather_places
from anabranch.depth.ftp.router import decide
from anabranch.depth.gathered import Looks
from anabranch.depth.stack import run_path, stack_of
from anabranch.errors import ConfigError, InputError, NotFiniteError
from skipped_models import BLOCKS, VOCAB, decoder, tokens
from skipped_models import router as undecided

SCHEDULE = (0.0, 0.3, 0.5, 0.75, 0.2)
EVERY = list(itertools.product(("static", "random", "learned"), ("drop", "keep")))


def router_of(name):
    return undecided() if name == "learned" else name


def skipper_of(name="learned", kv="drop", schedule=SCHEDULE, model=None, **options):
    return TokenSkipper(model or decoder(), schedule, router_of(name), kv=kv, **options)


def real(length, batch=1):
    return torch.ones(batch, length, dtype=torch.bool)


# Who is kept


def test_the_static_router_by_hand():
    assert static_keep(real(10), 0.3)[0].nonzero().flatten().tolist() == [0, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("sparsity", "count", "skipped"),
    [
        (0.3, 10, 3),
        (0.29, 100, 29),
        (0.7, 10, 7),
        (0.9, 10, 9),
        (0.99, 10, 9),
        (1.0, 10, 10),
        (1.0, 1, 0),
        (0.5, 1, 0),
        (0.5, 0, 0),
        (0.0, 9, 0),
    ],
)
def test_how_many_are_skipped(sparsity, count, skipped):
    assert skip_count(sparsity, count) == skipped


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 12), st.integers(0, 5)), min_size=1, max_size=4),
    sparsity=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_counts_are_exact_whoever_decides_and_wherever_padding_is(rows, sparsity, seed):
    length = max(map(sum, rows))
    real_BL = torch.tensor([[0] * a + [1] * n + [0] * (length - a - n) for a, n, _ in rows]).bool()
    score_BL2 = torch.randn(*real_BL.shape, 2, generator=torch.Generator().manual_seed(seed))
    found = [static_keep(real_BL, sparsity), random_keep(real_BL, sparsity, torch.Generator().manual_seed(seed))]
    if sparsity < 1:
        found.append(decide(score_BL2, real_BL, sparsity, "topk"))
    for keep_BL in found:
        assert not (keep_BL & ~real_BL).any(), "padding is never kept"
        for row, (before, count, _) in enumerate(rows):
            assert int(keep_BL[row].sum()) == count - skip_count(sparsity, count)
            assert bool(keep_BL[row, before]) or (sparsity == 1 and count > 1), "the first token is always computed"
    threshold = decide(score_BL2, real_BL, min(sparsity, 0.99), "threshold")
    for row, (before, _, _) in enumerate(rows):
        assert threshold[row, before]
    wanted_BL = (score_BL2[..., 1] >= score_BL2[..., 0]) & real_BL
    assert (threshold >= wanted_BL).all()
    assert int((threshold & ~wanted_BL).sum(1).max()) <= 1


def test_topk_keeps_the_largest_margins():
    margin = torch.tensor([[-9.0, 3.0, 1.0, 2.0, -1.0, 2.0]])
    score = torch.stack((torch.zeros_like(margin), margin), dim=-1)
    assert decide(score, real(6), 0.5, "topk")[0].tolist() == [True, True, False, True, False, False]
    assert decide(score, real(6), 0.5, "threshold")[0].tolist() == [True, True, True, True, False, True]


def test_scores_that_are_no_numbers_are_told():
    score = torch.zeros(1, 4, 2)
    score[0, 2, 1] = torch.nan
    with pytest.raises(NotFiniteError, match="scores that are not numbers"):
        decide(score, real(4), 0.5, "topk")


def test_rows_are_gathered_in_order():
    keep = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1]]).bool()
    place_BK, real_BK = gather_places(keep)
    assert place_BK[0].tolist() == [0, 2, 3]
    assert place_BK[1, :2].tolist() == [1, 3]
    assert real_BK.tolist() == [[True] * 3, [True, True, False]]
    assert gather_places(keep[:1])[1] is None


# What the router looks at


def test_the_router_has_450_parameters():
    assert TokenRouter().num_parameters == 450
    assert TokenRouter(RouterConfig(inputs="both", dim=32)).num_parameters == 36 * 64 + 64 + 130


def test_factors_by_hand():
    score = torch.tensor([[0.0, 0.4, 0.1, 0.1, 0.2, 0.0]])
    real_BL = torch.tensor([[0, 1, 1, 1, 1, 0]]).bool()
    found = factors_of(score, real_BL, 0.3, FactorConfig(most_score=1.5))
    expected = [[0, 1.5, 1, 0.3], [1 / 3, 0.4, 0, 0.3], [2 / 3, 0.4, 1 / 3, 0.3], [1, 0.8, 2 / 3, 0.3]]
    torch.testing.assert_close(found[0, 1:5], torch.tensor(expected))
    assert not found[0, [0, 5]].any()
    alone = factors_of(score[:, 1:2], real_BL[:, 1:2], 0.5, FactorConfig())
    torch.testing.assert_close(alone, torch.tensor([[[0, 0.4, 0, 0.5]]]))


def test_causal_factors_know_nothing_of_later_tokens():
    config, score = (
        FactorConfig(causal=True, positions=100),
        torch.rand(1, 9, generator=torch.Generator().manual_seed(0)),
    )
    whole = factors_of(score, real(9), 0.3, config)
    for end in range(1, 9):
        torch.testing.assert_close(factors_of(score[:, :end], real(end), 0.3, config), whole[:, :end])
    by_hand = [sum(score[0, k] <= score[0, j] for k in range(j)) / max(j, 1) for j in range(9)]
    torch.testing.assert_close(whole[0, :, 2], torch.tensor(by_hand, dtype=torch.float32))


def attention_of(query, key, scale, seen):
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    score = (query @ key.transpose(2, 3) * scale).masked_fill(~seen[:, None], -torch.inf)
    return score.softmax(-1)


@pytest.mark.parametrize("elements", [1, 7, 30, 10**6])
@pytest.mark.parametrize("window", [None, 3])
def test_column_means_are_those_of_the_whole_matrix(elements, window):
    draw = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 8, 6, generator=draw), torch.randn(2, 2, 8, 6, generator=draw)
    place = torch.tensor([[0, 1, 2, 4, 7, 8, 9, 12]]).expand(2, 8)
    behind = place.unsqueeze(2) - place.unsqueeze(1)
    seen = (behind >= 0) & (behind < (window or 99))
    weight = attention_of(query, key, 0.4, seen)
    expected = weight.mean(1).sum(1) / (behind >= 0).sum(1)
    found = column_means(
        query, key, Looks(0.4, window), query_position_BQ=place, key_position_BS=place, elements=elements
    )
    torch.testing.assert_close(found, expected)
    own = column_means(
        query, key, Looks(0.4, window), query_position_BQ=place, key_position_BS=place, own_only=True, elements=elements
    )
    torch.testing.assert_close(own, weight.mean(1).diagonal(dim1=1, dim2=2))


def test_column_means_leave_padding_and_sinks_out():
    draw = torch.Generator().manual_seed(0)
    query, key, sink = (torch.randn(shape, generator=draw) for shape in ((1, 2, 5, 4), (1, 2, 5, 4), (2,)))
    place, real_BS = torch.arange(5)[None], torch.tensor([[1, 1, 1, 1, 0]]).bool()
    options = {"query_position_BQ": place, "key_position_BS": place}
    padded = column_means(query, key, Looks(0.5), query_real_BQ=real_BS, key_real_BS=real_BS, **options)
    short = {name: value[:, :4] for name, value in options.items()}
    torch.testing.assert_close(padded[:, :4], column_means(query[:, :, :4], key[:, :, :4], Looks(0.5), **short))
    score = (query @ key.transpose(2, 3) * 0.5).masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
    weight = torch.cat((score, sink.view(1, 2, 1, 1).expand(1, 2, 5, 1)), dim=-1).softmax(-1)[..., :-1]
    expected = weight.mean(1).sum(1) / torch.arange(5, 0, -1)
    for elements in (None, 5, 10):
        found = column_means(query, key, Looks(0.5, sink_H=sink), **options, elements=elements)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("window", [None, 2])
def test_column_means_know_nothing_of_a_query_that_sees_no_key(window):
    """Padding in front sees nothing, not even itself: its weights are NaN, which times 0 is NaN still, of every key."""
    query, key = torch.randn(2, 1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    place, real_BS = torch.arange(5)[None], torch.tensor([[0, 0, 1, 1, 1]]).bool()
    options = {"query_position_BQ": place, "key_position_BS": place}
    for elements in (None, 5, 10):
        padded = column_means(
            query, key, Looks(0.5, window), query_real_BQ=real_BS, key_real_BS=real_BS, **options, elements=elements
        )
        alone = {name: value[:, 2:] for name, value in options.items()}
        torch.testing.assert_close(
            padded[:, 2:], column_means(query[:, :, 2:], key[:, :, 2:], Looks(0.5, window), **alone)
        )
        assert not padded[:, :2].any()


class Largest(TorchDispatchMode):
    """Notes the most numbers that a tensor made here has."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, torch.Tensor):
                self.most = max(self.most, one.numel())
        return made


def test_no_matrix_of_all_heads_is_made_of_a_long_prompt():
    length, heads = 1280, 2
    query = torch.zeros(1, heads, length, 2)
    place = torch.arange(length)[None]
    with Largest() as seen:
        column_means(query, query[:, :1], Looks(1.0), query_position_BQ=place, key_position_BS=place)
    assert seen.most < heads * length * length
    assert seen.most <= heads * 1024 * 1024


def test_the_table_keeps_what_was_skipped():
    """Scores of a block that skipped tokens are those of the tokens it computed, among themselves; others keep their old."""
    model = decoder()
    skipper = TokenSkipper(model, (0.0, 0.5, 0.5, 0.0, 0.0), undecided())
    seen = {}
    decider = skipper.decider

    def spied(real_BL):
        made = decider(real_BL)
        scores = made.scores

        def look(layer, x_BLD, table):
            seen[layer] = (x_BLD, table.score_BL.clone())
            return scores(layer, x_BLD, table)

        made.scores = look
        return made

    skipper.decider = spied
    keep = skipper.prefill(tokens(1, 12)).keep_IBL[1, 0]
    x_BLD = seen[1][0][:, keep]
    block, context = model.blocks[1], model.context(tokens(1, 12))
    query, key, _ = block.attention.project(
        block.attention_norm(x_BLD),
        type(context)(position_BL=keep.nonzero().T, rotary=model.rotary(keep.nonzero().T, torch.float32)),
    )
    weight = attention_of(query, key, 8**-0.5, torch.ones(1, *[len(query[0, 0])] * 2).tril().bool())
    expected = weight.mean(1).sum(1)[0] / torch.arange(int(keep.sum()), 0, -1)
    torch.testing.assert_close(seen[2][1][0, keep], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen[2][1][0, ~keep], seen[1][1][0, ~keep])


# Passes


VARIANTS = {
    "plain": {},
    "window": {"window": 4},
    "sinks": {"sinks": True},
    "window and sinks": {"window": 4, "sinks": True},
    "norms": {"qk_norm": "head", "qkv_bias": True, "scale": 0.3},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("router", ["static", "learned"])
def test_nothing_to_skip_is_the_dense_model_bit_for_bit(variant, router):
    model, token_BL = decoder(**VARIANTS[variant]), tokens(2, 9)
    with torch.no_grad():
        dense_BV = run_path(stack_of(model), token_BL, last_only=True)[:, -1]
        own_BV = model(token_BL, last_only=True).logits_BLV[:, -1]
    prefilled = TokenSkipper(model, [0.0] * BLOCKS, router_of(router)).prefill(token_BL)
    assert torch.equal(prefilled.logits_BV, dense_BV)
    assert torch.equal(prefilled.logits_BV, own_BV)
    assert prefilled.report.saved == 0
    assert prefilled.report.overhead == 0


def test_all_to_skip_is_the_embedding_straight_to_the_norm():
    model, token_BL = decoder(), tokens(2, 9)
    with torch.no_grad():
        expected = model.logits(model.norm(model.embed(token_BL)))[:, -1]
    for kv in ("drop", "keep"):
        prefilled = TokenSkipper(model, [1.0] * BLOCKS, kv=kv).prefill(token_BL)
        torch.testing.assert_close(prefilled.logits_BV, expected)
        assert prefilled.report.saved == prefilled.report.sparsity == 1
        assert prefilled.cache.lengths == [0] * BLOCKS


@pytest.mark.parametrize("variant", VARIANTS)
def test_skipping_is_the_block_on_gathered_rows_at_their_places(variant):
    model, token_BL = decoder(**VARIANTS[variant]), tokens(1, 12)
    skipper = TokenSkipper(model, (0.0, 0.5, 0.0, 0.25, 0.0), undecided())
    prefilled = skipper.prefill(token_BL)
    x_BLD, window = model.embed(token_BL), VARIANTS[variant].get("window")
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            place = prefilled.keep_IBL[layer, 0].nonzero().flatten()
            context = model.context(token_BL)
            context.position_BL = place[None]
            context.rotary = model.rotary(place[None], torch.float32)
            behind = place[:, None] - place[None]
            context.attention_mask = ((behind >= 0) & (behind < (window or 99)))[None, None]
            x_BLD = x_BLD.index_copy(1, place, block(x_BLD[:, place], context))
        expected = model.logits(model.norm(x_BLD))
    torch.testing.assert_close(prefilled.logits_BV, expected[:, -1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(skipper.uncached(prefilled), expected, rtol=1e-5, atol=1e-5)
    assert [int(keep.sum()) for keep in prefilled.keep_IBL] == [12, 6, 12, 9, 12]


def test_kept_keys_are_seen_by_those_that_are_computed():
    model, token_BL = decoder(2), tokens(1, 8)
    prefilled = TokenSkipper(model, (0.0, 0.5), kv="keep").prefill(token_BL)
    context, keep = model.context(token_BL), prefilled.keep_IBL[1, 0]
    with torch.no_grad():
        x_BLD = model.blocks[0](model.embed(token_BL), context)
        y_BLD = model.blocks[1](x_BLD, context)
        expected = model.logits(model.norm(torch.where(keep[None, :, None], y_BLD, x_BLD)))
    torch.testing.assert_close(prefilled.logits_BV, expected[:, -1], rtol=1e-5, atol=1e-5)
    assert prefilled.cache.lengths == [8, 8]
    assert TokenSkipper(model, (0.0, 0.5)).prefill(token_BL).cache.lengths == [8, 4]


@pytest.mark.parametrize(("router", "kv"), EVERY)
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_decoding_is_the_pass_without_a_cache(router, kv, variant):
    skipper = skipper_of(router, kv, model=decoder(**VARIANTS[variant]))
    whole = tokens(2, 17)
    prefilled = skipper.prefill(whole[:, :12])
    first = prefilled.logits_BV
    pieces = [skipper.decode(whole[:, start:end], prefilled) for start, end in ((12, 13), (13, 16), (16, 17))]
    cached = torch.cat((first.unsqueeze(1), *pieces), dim=1)
    uncached = skipper.uncached(prefilled, whole[:, 12:])[:, 11:]
    torch.testing.assert_close(cached, uncached, rtol=1e-4, atol=1e-4)
    assert prefilled.cache.next_B.tolist() == [17, 17]
    assert prefilled.cache.lengths[3] == (12 if kv == "keep" else 3), (
        "tokens that are decoded pass over a block of 0.75"
    )


@settings(max_examples=25, deadline=None)
@given(
    schedule=st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.6, 0.9, 1.0]), min_size=BLOCKS, max_size=BLOCKS),
    router=st.sampled_from(["static", "random", "learned"]),
    kv=st.sampled_from(["drop", "keep"]),
    mode=st.sampled_from(["topk", "threshold"]),
    one_pass=st.booleans(),
    prompt=st.integers(1, 9),
)
def test_caches_agree_on_every_schedule(schedule, router, kv, mode, one_pass, prompt):
    skipper = TokenSkipper(MODEL, schedule, router_of(router), kv=kv, mode=mode, one_pass=one_pass)
    whole = tokens(1, prompt + 3, seed=prompt)
    prefilled = skipper.prefill(whole[:, :prompt])
    cached = torch.cat([prefilled.logits_BV.unsqueeze(1), skipper.decode(whole[:, prompt:], prefilled)], dim=1)
    torch.testing.assert_close(
        cached, skipper.uncached(prefilled, whole[:, prompt:])[:, prompt - 1 :], rtol=1e-4, atol=1e-4
    )


MODEL = decoder()


@pytest.mark.parametrize(("router", "kv"), [pair for pair in EVERY if pair[0] != "random"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_each_prompt_alone(router, kv, side):
    skipper, lengths, longest = skipper_of(router, kv), (12, 1, 7), 12
    rows = [tokens(1, length, seed=length) for length in lengths]
    pads = [(longest - length, 0) if side == "left" else (0, longest - length) for length in lengths]
    token_BL = torch.cat([F.pad(row, pad, value=5) for row, pad in zip(rows, pads, strict=True)])
    mask_BL = torch.cat([F.pad(torch.ones_like(row), pad) for row, pad in zip(rows, pads, strict=True)])
    after = tokens(3, 2, seed=9)
    together = skipper.prefill(token_BL, mask_BL)
    decoded = skipper.decode(after, together)
    whole = skipper.uncached(together, after)[:, -2:]
    torch.testing.assert_close(decoded, whole, rtol=1e-4, atol=1e-4)
    skipped = [0] * BLOCKS
    for number, row in enumerate(rows):
        alone = skipper.prefill(row)
        torch.testing.assert_close(together.logits_BV[number], alone.logits_BV[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            decoded[number], skipper.decode(after[number : number + 1], alone)[0], rtol=1e-4, atol=1e-4
        )
        skipped = [a + b for a, b in zip(skipped, alone.report.skipped, strict=True)]
    assert list(together.report.skipped) == skipped
    assert together.report.tokens == sum(lengths)
    assert not (together.keep_IBL & ~mask_BL.bool()).any()


def test_a_prompt_of_one_token_is_never_pruned():
    model, token_BL = decoder(), tokens(1, 1)
    for schedule, router in itertools.product(([0.9] * BLOCKS, [1.0] * BLOCKS), ("static", "learned")):
        prefilled = TokenSkipper(model, schedule, router_of(router)).prefill(token_BL)
        torch.testing.assert_close(prefilled.logits_BV, model(token_BL).logits_BLV[:, -1])


def test_the_first_block_of_a_router_that_learned_is_dense():
    prefilled = skipper_of(schedule=[0.5] * BLOCKS).prefill(tokens(1, 10))
    assert prefilled.report.target == (0.0, *[0.5] * (BLOCKS - 1))
    assert prefilled.report.achieved == (0.0, *[0.5] * (BLOCKS - 1))


def test_one_pass_decides_by_the_first_block_alone():
    schedule = [0.0, *[0.5] * (BLOCKS - 1)]
    at_once = skipper_of(schedule=schedule, one_pass=True).prefill(tokens(1, 20))
    assert all(torch.equal(keep, at_once.keep_IBL[1]) for keep in at_once.keep_IBL[1:])
    each = skipper_of(schedule=schedule).prefill(tokens(1, 20))
    assert not all(torch.equal(keep, each.keep_IBL[1]) for keep in each.keep_IBL[1:])
    assert at_once.report.overhead < each.report.overhead
    sparse = skipper_of(schedule=schedule, factors=FactorConfig(refresh=2)).prefill(tokens(1, 20))
    assert at_once.report.overhead < sparse.report.overhead < each.report.overhead


@pytest.mark.parametrize("inputs", ["hidden", "both"])
def test_routers_of_hidden_states(inputs):
    router = TokenRouter(RouterConfig(inputs=inputs, dim=32), seed=2)
    prefilled = TokenSkipper(decoder(), SCHEDULE, router).prefill(tokens(1, 20))
    assert prefilled.report.skipped == (0, 6, 10, 15, 4)
    with pytest.raises(ConfigError, match="states of width 16; the model's is 32"):
        TokenSkipper(decoder(), SCHEDULE, TokenRouter(RouterConfig(inputs=inputs, dim=16)))


def test_work_is_what_blocks_did():
    model = decoder(2)
    stack, skipper = stack_of(model), TokenSkipper(model, (0.0, 0.5))
    prefilled = skipper.prefill(tokens(1, 10))
    # 5 of 10 tokens, which see 1, 2, ... 5 of each other.
    pair = stack.count(1, 1, 2) - stack.count(1, 1, 1)
    assert prefilled.report.work == (stack.count(0, 10, 10), stack.count(1, 5, 5))
    assert prefilled.report.dense == (stack.count(0, 10, 10), stack.count(1, 10, 10))
    assert stack.count(1, 10, 10) - 2 * stack.count(1, 5, 5) == pair * (55 - 2 * 15)
    skipper.decode([[1, 2]], prefilled)
    assert prefilled.report.decoded == 2
    assert prefilled.report.work == (stack.count(0, 12, 12), stack.count(1, 7, 7))
    kept = TokenSkipper(model, (0.0, 0.5), kv="keep").prefill(tokens(1, 10)).report
    keys = 5 * 32 * 64  # queries, keys and values of the five, in one matrix
    # Tokens 0 and 6 to 9 see all before them.
    assert kept.work[1] == stack.count(1, 5, 5) + pair * (1 + 7 + 8 + 9 + 10 - 15) + keys
    text = str(prefilled.report)
    assert [line.split()[0] for line in text.splitlines()[:4]] == ["block", "0", "1", "all"]
    assert set(prefilled.report.to_dict()) >= {"target_sparsity", "sparsity", "achieved", "block_flops_saved"}


def test_generation_is_the_likeliest_token_again_and_again():
    skipper, prompt = skipper_of(), tokens(1, 10)
    made = skipper.generate(prompt, 6)
    prefilled, whole = skipper.prefill(prompt), []
    for _ in range(6):
        whole.append(int(skipper.uncached(prefilled, [whole] if whole else ())[0, -1].argmax()))
    assert made == whole
    assert skipper.generate(prompt, 6, stop={made[2]}) == made[: made.index(made[2])]
    dense = TokenSkipper(decoder(), [0.0] * BLOCKS).generate(prompt, 4)
    assert len(dense) == 4


def test_decisions_are_a_trace():
    skipper = skipper_of("static")
    prefilled = skipper.prefill(tokens(2, 10))
    trace = skipper.trace(prefilled)
    assert len(trace.layers) == BLOCKS
    routing = skipper.routing(prefilled, 2)
    assert routing.load_E().tolist() == [10, 10]
    rows = trace.table.filter(trace.table["layer"].to_numpy() == 1)
    computed = [row["position"] for row in rows.to_pylist() if row["item"] == 0 and row["destination"] == 1]
    assert computed == [0, 4, 5, 6, 7, 8, 9]


def test_the_model_is_left_as_it_was():
    model = decoder().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    skipper_of(model=model).prefill(tokens(1, 10))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"schedule": [0.1] * 4}, r"schedule has 4 sparsities and the model 5 blocks"),
        ({"schedule": []}, r"schedule has 0 sparsities and the model 5 blocks"),
        ({"schedule": [0.1, 0.1, 1.1, 0, 0]}, r"schedule has 1\.1 for block 2; a sparsity is from 0 to 1"),
        ({"schedule": [0.1, 0.1, float("nan"), 0, 0]}, r"schedule has nan for block 2"),
        ({"schedule": [0.1, -0.1, 0, 0, 0]}, r"schedule has -0\.1 for block 1"),
        ({"schedule": [True, 0, 0, 0, 0]}, r"schedule has True for block 0"),
        ({"schedule": "00000"}, r"schedule is '00000'"),
        ({"schedule": 0.3}, r"schedule is 0\.3"),
        ({"mode": "best"}, r"mode is 'best'; it must be 'topk' or 'threshold'"),
        ({"kv": "lose"}, r"kv is 'lose'; it must be 'drop' or 'keep'"),
        ({"router": "lru"}, r"router is 'lru'; it must be a TokenRouter, 'static' or 'random'"),
    ],
)
def test_wrong_settings(arguments, told):
    with pytest.raises(ValueError, match=told) as raised:
        TokenSkipper(**{"model": MODEL, "schedule": SCHEDULE, **arguments})
    assert isinstance(raised.value, ConfigError)


@pytest.mark.parametrize(
    "ids", [[], [[]], "text", [[1, 2], [3]], [0.5, 1.5], [True, False], [VOCAB], [-1], [[[1]]], None, [1] * 2049]
)
def test_wrong_prompts(ids):
    with pytest.raises(InputError):
        skipper_of(model=MODEL).prefill(ids)


def test_wrong_masks_and_rows():
    skipper = skipper_of(model=MODEL)
    with pytest.raises(InputError, match="prompt 1 is all padding"):
        skipper.prefill(tokens(2, 4), torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]))
    with pytest.raises(ConfigError, match="attention_mask has shape"):
        skipper.prefill(tokens(2, 4), torch.ones(2, 5))
    prefilled = skipper.prefill(tokens(2, 4))
    with pytest.raises(InputError, match="1 rows of new tokens and 2 prompts"):
        skipper.decode([[1]], prefilled)
    with pytest.raises(InputError, match="generate takes one"):
        skipper.generate(tokens(2, 4))
    with pytest.raises(ConfigError, match="depth routing knows no blocks"):
        TokenSkipper(torch.nn.Linear(2, 2), SCHEDULE)


@pytest.mark.parametrize("wrong", [{"inputs": "hidden"}, {"dim": 8}, {"hidden": 0}, {"inputs": "all"}])
def test_wrong_routers(wrong):
    with pytest.raises(ConfigError):
        RouterConfig(**wrong)
