"""Blocks that run twice, not at all, or for some sequences: cached decoding gives what one pass over the sequence gives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from anabranch.config import configclass
from anabranch.errors import ConfigError
from anabranch.experts.parscale import ParScale
from anabranch.experts.rmoe import RecurrentScore
from anabranch.lm import Decoder
from anabranch.nn import MoE, SelfAttention, SwiGLU
from anabranch.nn.feed_forward import FeedForward
from anabranch.nn.visits import check_path, next_visits, on_rows, steps_of, take_back, visits_of_rows
from anabranch.routing import Router, record_routing, replay_routing

BLOCKS, VOCAB = 4, 40


def decoder(feed_forward=None, **options):
    feed_forward = feed_forward or SwiGLU.Config(hidden_dim=24)
    attention = SelfAttention.Config(num_heads=2)
    config = Decoder.Config(
        vocab_size=VOCAB,
        dim=16,
        num_layers=BLOCKS,
        attention=attention,
        feed_forward=feed_forward,
        init_std=0.3,
        **options,
    )
    return config.build(seed=3).eval()


DESIGNS = {
    "dense": lambda: decoder(),
    "moe": lambda: decoder(MoE.Config(num_experts=4, hidden_dim=12)),
    "recurrent": lambda: decoder(
        MoE.Config(num_experts=4, hidden_dim=12, router=Router.Config(score=RecurrentScore.Config(state_dim=8)))
    ),
    "streams": lambda: decoder(streams=ParScale.Config(num_streams=2, prefix_len=3, embedding_dim=8, mlp_dim=8)),
}
MODELS = {name: make() for name, make in DESIGNS.items()}
# Where a path goes through blocks seven times, roundings of float32 grow to some 1e-5; those of float64 tell a fault from a rounding.
PRECISIONS = [(MODELS, 1e-4), ({name: make().double() for name, make in DESIGNS.items()}, 1e-10)]


def by_hand(model, token_BL, path):
    """The blocks one after the other, on the whole sequence, without any path given."""
    context = model.context(token_BL)
    x_BLD = model.embedding(token_BL)
    for layer in path:
        x_BLD = model.blocks[layer](x_BLD, context)
    return model.logits(model.norm(x_BLD))


def decoded(model, token_BL, path, chunks, mask_BL=None):
    """The same in chunks with a cache."""
    cache, made, start = model.new_cache(token_BL.shape[1]), [], 0
    for size in chunks:
        mask = None if mask_BL is None else mask_BL[:, start : start + size]
        part = model(token_BL[:, start : start + size], cache=cache, token_mask_BL=mask, path=path)
        made.append(part.logits_BLV)
        start += size
    return torch.cat(made, dim=1)


@torch.no_grad()
def test_a_path_runs_its_blocks_in_order():
    model, token_BL = MODELS["dense"], torch.randint(VOCAB, (2, 6))
    for path in ((0, 1, 2, 3), (3, 1), (2, 2, 2), (), (0, 0, 3, 1, 3)):
        assert torch.equal(model(token_BL, path=path).logits_BLV, by_hand(model, token_BL, path))
    assert torch.equal(model(token_BL, path=range(4)).logits_BLV, model(token_BL).logits_BLV)


@pytest.mark.parametrize("name", MODELS)
@given(
    path=st.lists(st.integers(0, BLOCKS - 1), max_size=7),
    chunks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_repeated_and_skipped_blocks_are_decoded_as_they_are_computed_at_once(name, path, chunks, seed):
    token_BL = torch.randint(VOCAB, (2, sum(chunks)), generator=torch.Generator().manual_seed(seed))
    for models, most in PRECISIONS:
        whole = models[name](token_BL, path=path).logits_BLV
        torch.testing.assert_close(decoded(models[name], token_BL, path, chunks), whole, atol=most, rtol=most)


@pytest.mark.parametrize("name", MODELS)
@given(
    paths=st.lists(st.lists(st.integers(0, BLOCKS - 1), max_size=6), min_size=3, max_size=3),
    chunks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_sequences_of_different_depth_do_not_feel_each_other(name, paths, chunks, seed):
    token_BL = torch.randint(VOCAB, (3, sum(chunks)), generator=torch.Generator().manual_seed(seed))
    for models, most in PRECISIONS:
        model = models[name]
        alone = torch.cat([model(token_BL[row : row + 1], path=path).logits_BLV for row, path in enumerate(paths)])
        torch.testing.assert_close(model(token_BL, path=paths).logits_BLV, alone, atol=most, rtol=most)
        torch.testing.assert_close(decoded(model, token_BL, paths, chunks), alone, atol=most, rtol=most)


@torch.no_grad()
def test_sequences_that_leave_or_are_copied_keep_their_visits():
    model, token_BL = MODELS["dense"], torch.randint(VOCAB, (3, 6))
    paths = [[0, 1, 1, 2], [0, 2, 2], [3, 1]]
    cache = model.new_cache(6)
    model(token_BL[:, :4], cache=cache, path=paths)
    cache.keep_rows(torch.tensor([2, 0]))
    rest = model(token_BL[[2, 0], 4:], cache=cache, path=[paths[2], paths[0]]).logits_BLV
    alone = [model(token_BL[row : row + 1], path=paths[row]).logits_BLV[:, 4:] for row in (2, 0)]
    torch.testing.assert_close(rest, torch.cat(alone), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_position_that_passed_a_block_over_is_not_seen_there():
    """Each position has a path of its own: a block sees the positions that came by, as in a pass over those alone."""
    model = MODELS["dense"]
    token_1L = torch.randint(VOCAB, (1, 5))
    paths = [(0, 1), (0,), (0, 1), (1,), (0, 1)]
    cache, made = model.new_cache(5), []
    for at, path in enumerate(paths):
        made.append(model(token_1L[:, at : at + 1], cache=cache, path=path).logits_BLV)
    context = model.context(token_1L)
    x_1LD = model.embedding(token_1L)
    for layer in (0, 1):
        here = torch.tensor([layer in path for path in paths])
        mask = torch.ones(5, 5, dtype=torch.bool).tril() & here & here[:, None] | torch.eye(5, dtype=torch.bool)
        context.attention_mask, context.is_causal = mask[None, None], False
        y_1LD = model.blocks[layer](x_1LD, context)
        x_1LD = torch.where(here[None, :, None], y_1LD, x_1LD)
    torch.testing.assert_close(torch.cat(made, dim=1), model.logits(model.norm(x_1LD)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_and_paths_together():
    model, token_BL = MODELS["moe"], torch.randint(VOCAB, (2, 6))
    mask_BL = torch.ones(2, 6, dtype=torch.bool)
    mask_BL[1, :2] = False
    paths = [[0, 1, 1], [2, 0]]
    found = decoded(model, token_BL, paths, [3, 1, 2], mask_BL)
    torch.testing.assert_close(found[:1], model(token_BL[:1], path=paths[0]).logits_BLV, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1:, 2:], model(token_BL[1:, 2:], path=paths[1]).logits_BLV, atol=1e-5, rtol=1e-5)


def test_a_pass_that_failed_leaves_nothing_in_the_cache():
    model, token_BL = decoder(), torch.randint(VOCAB, (2, 6))
    cache = model.new_cache(6)
    with torch.no_grad():
        model(token_BL[:, :3], cache=cache)
        broken = model.blocks[2].feed_forward.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(token_BL[:, 3:5], cache=cache)
        broken.remove()
        rest = model(token_BL[:, 3:], cache=cache, path=[[0, 1, 2, 3], [0, 1, 3]]).logits_BLV
        whole = model(token_BL).logits_BLV
    torch.testing.assert_close(rest[0], whole[0, 3:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("where", ["a block", "the head"])
@torch.no_grad()
def test_a_pass_that_failed_may_be_tried_again_with_padding_or_fewer_sequences(where):
    model, token_BL = decoder(), torch.randint(VOCAB, (2, 6))
    mask_BL = torch.ones(2, 6, dtype=torch.bool)
    mask_BL[0, :2] = False
    part = model.blocks[2] if where == "a block" else model.head

    def failing(**options):
        hook = part.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**options)
        hook.remove()

    cache = model.new_cache(6)
    failing(token_BL=token_BL, token_mask_BL=mask_BL, cache=cache)
    assert cache.length == 0
    again = model(token_BL, token_mask_BL=mask_BL, cache=cache).logits_BLV
    torch.testing.assert_close(again[0, 2:], model(token_BL[:1, 2:]).logits_BLV[0], atol=1e-5, rtol=1e-5)
    cache = model.new_cache(6)
    failing(token_BL=token_BL, cache=cache)
    one = [model(token_BL[:1, :4], cache=cache).logits_BLV]
    failing(token_BL=token_BL[:1, 4:], cache=cache)
    one.append(model(token_BL[:1, 4:], cache=cache).logits_BLV)
    torch.testing.assert_close(torch.cat(one, dim=1), model(token_BL[:1]).logits_BLV, atol=1e-5, rtol=1e-5)


def test_gradients_of_paths_are_those_of_each_alone_also_recomputed():
    model = decoder().train()
    token_BL, paths = torch.randint(VOCAB, (2, 6)), [[0, 1, 1], [2, 0]]

    def gradients(run):
        model.zero_grad()
        run().backward()
        return [None if one.grad is None else one.grad.clone() for one in model.parameters()]

    together = gradients(lambda: model(token_BL, path=paths).logits_BLV.square().sum())
    alone = gradients(
        lambda: sum(
            model(token_BL[row : row + 1], path=path).logits_BLV.square().sum() for row, path in enumerate(paths)
        )
    )
    model.recompute = True
    again = gradients(lambda: model(token_BL, path=paths).logits_BLV.square().sum())
    for one, other, third in zip(together, alone, again, strict=True):
        assert (one is None) == (other is None) == (third is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(one, third, atol=1e-4, rtol=1e-4)


def test_what_some_sequences_carry_on_does_not_touch_the_others():
    model = MODELS["dense"]
    context = model.context(torch.zeros(3, 2, dtype=torch.int64))
    context.carry["state"] = torch.arange(6.0)

    def run(x_BLD, part):
        assert part.carry["state"].tolist() == [4, 5, 0, 1]
        assert part.token_BL.shape == part.position_BL.shape == (2, 2)
        part.carry["state"] = part.carry["state"] + 10
        part.carry["new"] = torch.ones(4, 2)
        part.emit_metric("seen", torch.tensor(1.0))
        return x_BLD + 1

    x_BLD = on_rows(run, torch.zeros(3, 2, 16), context, [2, 0])
    assert x_BLD[:, 0, 0].tolist() == [1, 0, 1]
    assert context.carry["state"].tolist() == [10, 11, 2, 3, 14, 15]
    assert context.carry["new"][:, 0].tolist() == [1, 1, 0, 0, 1, 1]
    assert len(context.metrics["seen"]) == 1
    assert on_rows(run, x_BLD, context, []) is x_BLD


@torch.no_grad()
def test_routers_of_repeated_blocks_are_recorded_for_each_sequence():
    model, token_BL = DESIGNS["moe"](), torch.randint(VOCAB, (2, 3))
    with record_routing(model) as recorder:
        model(token_BL, path=(1, 1, 2))
    trace = recorder.trace()
    rows = {layer.name: len(trace.decisions(layer.layer).index_NK) for layer in trace.layers}
    assert sum(rows.values()) == 3 * token_BL.numel()


@pytest.mark.parametrize("recorded", ["at once", "cached"])
@pytest.mark.parametrize("replayed", ["at once", "cached"])
@torch.no_grad()
def test_decisions_of_paths_are_replayed_to_the_bit(recorded, replayed):
    token_BL, paths = torch.randint(VOCAB, (3, 6)), [[0, 1, 1, 2], [2, 3], [0, 1, 3, 3]]

    def run(model, how=replayed):
        return decoded(model, token_BL, paths, [3, 1, 2]) if how == "cached" else model(token_BL, path=paths).logits_BLV

    model = DESIGNS["moe"]()
    with record_routing(model) as recorder:
        run(model, recorded)
    wanted = run(model)
    if recorded != replayed:
        with replay_routing(model, recorder.trace()):
            torch.testing.assert_close(run(model), wanted, atol=1e-5, rtol=1e-5)
        return
    for block in model.blocks:
        nn.init.zeros_(block.feed_forward.router.score.weight)
    assert not torch.equal(run(model), wanted)
    with replay_routing(model, recorder.trace()):
        assert torch.equal(run(model), wanted)


def test_visits_by_hand():
    visits = {}
    assert next_visits(visits, 0, 3) == [(0, None)]
    part = visits_of_rows(visits, [0, 2])
    assert next_visits(part, 0, 2) == [(1, None)]
    take_back(visits, part, [0, 2], 3)
    assert next_visits(visits, 0, 3) == [(1, [1]), (2, [0, 2])]
    assert next_visits(visits, 0, 3) == [(2, [1]), (3, [0, 2])]
    assert next_visits(visits, 1, 3) == [(0, None)]


def test_steps_group_the_rows_of_equal_blocks():
    assert list(steps_of((0, 2), 2, 3)) == [(0, None), (2, None)]
    assert list(steps_of(((0, 1), (0,), (1, 1)), 2, 3)) == [(0, [0, 1, 3, 4]), (1, [0, 2, 3, 5]), (1, [2, 5])]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ((0, 4), "path has block 4; the model has blocks 0 to 3"),
        ((-1,), "block -1"),
        ((0, 1.0), "block 1.0"),
        (((0,), (1,)), "2 paths for 3 sequences"),
        ("01", "path is '01'; give block numbers"),
        ("", "path is ''"),
        (5, "path is 5; give block"),
        ((True,), "block True"),
        ((0, "1"), "block '1'"),
        (((0,), 1), r"block \(\(0,\), 1\)"),
    ],
)
def test_wrong_paths(path, message):
    with pytest.raises(ConfigError, match=message):
        check_path(path, 4, 3)
    assert check_path([[1, 2], [1, 2]], 4, 2) == (1, 2)


def test_a_store_that_attends_itself_says_what_it_cannot():
    class Store:
        def attend(self, layer, query, key, value):
            return query

    model = decoder()
    context = model.context(torch.zeros(1, 2, dtype=torch.int64))
    context.cache = Store()
    x_BLD = torch.zeros(1, 2, 16)
    model.blocks[0](x_BLD, context)
    with pytest.raises(ConfigError, match="layer 0 is visited again"):
        model.blocks[0](x_BLD, context)


def test_blocks_may_be_called_without_a_decoder():
    model = MODELS["dense"]
    assert isinstance(model.blocks[0], nn.Module)
    context = model.context(torch.zeros(1, 2, dtype=torch.int64))
    twice = model.blocks[0](model.blocks[0](torch.ones(1, 2, 16), context), context)
    assert twice.shape == (1, 2, 16)


class Running(FeedForward):
    """A SwiGLU of the sum of all that it and the layers below saw, which it hands on as [B, L, D]."""

    @configclass
    class Config(FeedForward.Config):
        def count(self, context):
            return SwiGLU.Config(hidden_dim=8).count(context)

    def __init__(self, config, context):
        super().__init__()
        self.inner = SwiGLU.Config(hidden_dim=8).build(context)

    def forward(self, x_BLD, context):
        context.carry["sum"] = x_BLD + context.carry.get("sum", 0)
        return self.inner(context.carry["sum"], context)


@pytest.mark.parametrize(
    "paths", [((0, 1, 2), (0, 2), (0, 1, 2)), ((0, 1, 2), (0, 2), (0, 2)), ((1,), (2, 2), (0, 0, 1))]
)
@torch.no_grad()
def test_what_a_layer_hands_on_by_position_follows_each_sequence_on_its_path(paths):
    model = Decoder.Config(vocab_size=16, dim=16, num_layers=3, init_std=0.3, feed_forward=Running.Config()).build()
    token_BL = torch.randint(16, (3, 5))
    together = model(token_BL, path=paths).logits_BLV
    alone = torch.cat([model(token_BL[row : row + 1], path=path).logits_BLV for row, path in enumerate(paths)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@given(st.lists(st.lists(st.integers(0, 4), max_size=7), min_size=2, max_size=5))
def test_each_sequence_takes_its_steps_in_order(paths):
    ran = [[] for _ in paths]
    for block, rows in steps_of(paths, 1, len(paths)):
        assert rows == sorted(set(rows))
        for row in rows:
            ran[row].append(block)
    assert ran == paths


@given(st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1, max_size=5))
def test_sequences_whose_paths_ascend_meet_in_every_block_that_they_share(times):
    paths = [[block for block in range(4) for _ in range(own[block])] for own in times]
    steps = list(steps_of(paths, 1, len(paths)))
    wanted = [
        (block, [row for row, own in enumerate(times) if own[block] > visit])
        for block in range(4)
        for visit in range(2)
    ]
    assert steps == [(block, rows) for block, rows in wanted if rows]
