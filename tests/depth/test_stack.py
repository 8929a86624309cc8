"""Blocks of pretrained models in any order: what transformers and our decoder compute, with caches, padding and paths of each row's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anabranch.depth import BlockStack, check_depth_path, decisions_of, path_of, run_path, stack_of
from anabranch.depth.seen import seen_pairs
from anabranch.errors import CapacityError, ConfigError
from anabranch.lm.on_path import OnPath
from anabranch.nn import MoE
from anabranch.nn.quantize import quantize
from block_stacks import BLOCKS, MAKERS, decoder, model, tokens

ALL = tuple(MAKERS)
THEIRS = tuple(name for name in ALL if not name.startswith("ours"))


def paths_of(most=BLOCKS):
    """Paths with blocks left out, repeated and turned round, none more than twice."""
    return st.lists(st.integers(0, BLOCKS - 1), max_size=2 * BLOCKS).filter(
        lambda path: all(path.count(block) <= 2 for block in path)
    )


def logits_of(name, token_BL, **options):
    """Of the untouched model."""
    made = model(name)
    return made(token_BL).logits_BLV if name.startswith("ours") else made(token_BL, use_cache=False, **options).logits


def in_chunks(stack, token_BL, path, chunks, mask_BL=None):
    cache, made, start = stack.new_cache(sum(chunks)), [], 0
    for size in chunks:
        here = slice(start, start + size)
        mask = None if mask_BL is None else mask_BL[:, here]
        made.append(run_path(stack, token_BL[:, here], path, cache=cache, attention_mask=mask))
        start += size
    return torch.cat(made, dim=1)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_all_blocks_once_are_the_untouched_model_to_the_bit(name):
    token_BL = tokens(2, 7)
    stack = stack_of(model(name))
    wanted = logits_of(name, token_BL)
    assert isinstance(stack, BlockStack)
    assert torch.equal(run_path(stack, token_BL), wanted)
    assert torch.equal(run_path(stack, token_BL, [range(BLOCKS)] * 2), wanted)
    # The last position alone: a product of one row may be summed otherwise.
    last = run_path(stack, token_BL, last_only=True)
    torch.testing.assert_close(last, wanted[:, -1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", THEIRS)
@torch.no_grad()
def test_cached_decoding_is_what_transformers_decodes(name):
    """With their own cache, and a mask of padding on the left."""
    theirs, token_BL = model(name), tokens(2, 8)
    mask_BL = torch.ones_like(token_BL)
    mask_BL[1, :3] = 0
    position_BL = (mask_BL.cumsum(1) - 1).clamp_min(0)
    first = theirs(token_BL[:, :6], attention_mask=mask_BL[:, :6], position_ids=position_BL[:, :6], use_cache=True)
    past = {
        "cache" if "cache" in first else "past_key_values": first["cache" if "cache" in first else "past_key_values"]
    }
    second = theirs(token_BL[:, 6:], attention_mask=mask_BL, position_ids=position_BL[:, 6:], use_cache=True, **past)
    found = in_chunks(stack_of(theirs), token_BL, None, [6, 2], mask_BL)
    wanted = torch.cat((first.logits, second.logits), 1)
    real = mask_BL.bool()
    torch.testing.assert_close(found[real], wanted[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=6)
@given(path=paths_of(), chunks=st.lists(st.integers(1, 4), min_size=1, max_size=3), seed=st.integers(0, 99))
@torch.no_grad()
def test_cached_equals_uncached_on_every_path(name, path, chunks, seed):
    stack, token_BL = stack_of(model(name)), tokens(2, sum(chunks), seed)
    whole = run_path(stack, token_BL, path)
    torch.testing.assert_close(in_chunks(stack, token_BL, path, chunks), whole, atol=1e-4, rtol=1e-4)
    assert torch.isfinite(whole).all()


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=6)
@given(
    paths=st.lists(paths_of(), min_size=3, max_size=3),
    chunks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_rows_of_different_paths_are_each_alone(name, paths, chunks, seed):
    stack, token_BL = stack_of(model(name)), tokens(3, sum(chunks), seed)
    alone = torch.cat([run_path(stack, token_BL[row : row + 1], path) for row, path in enumerate(paths)])
    torch.testing.assert_close(run_path(stack, token_BL, paths), alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(in_chunks(stack, token_BL, paths, chunks), alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(name, side):
    stack, token_BL = stack_of(model(name)), tokens(3, 7)
    mask_BL = torch.ones(3, 7, dtype=torch.bool)
    hidden = slice(0, 3) if side == "left" else slice(4, 7)
    mask_BL[1, hidden] = False
    real = slice(3, 7) if side == "left" else slice(0, 4)
    paths = [(0, 1, 1, 2), (0, 2, 2), (2,)]
    for given_BL in (mask_BL, mask_BL.long()):
        made = run_path(stack, token_BL, paths, attention_mask=given_BL)
        alone = run_path(stack, token_BL[1:2, real], paths[1])
        torch.testing.assert_close(made[1:2, real], alone, atol=1e-5, rtol=1e-4)
        rest = torch.cat([run_path(stack, token_BL[row : row + 1], paths[row]) for row in (0, 2)])
        torch.testing.assert_close(made[[0, 2]], rest, atol=1e-5, rtol=1e-4)
    # And new tokens behind it, which see no padding.
    cache, new_BL = stack.new_cache(9), tokens(3, 2, seed=5)
    if "window" in name and side == "right":
        with pytest.raises(ConfigError, match="padding behind real tokens, and attention of the model has a window"):
            run_path(stack, token_BL, paths, cache=cache, attention_mask=mask_BL)
        return
    run_path(stack, token_BL, paths, cache=cache, attention_mask=mask_BL)
    made = run_path(stack, new_BL, paths, cache=cache)
    whole = run_path(stack, torch.cat((token_BL[1:2, real], new_BL[1:2]), 1), paths[1])
    torch.testing.assert_close(made[1:2], whole[:, 4:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["ours", "llama", "gpt2-eager"])
@torch.no_grad()
def test_a_position_that_passed_a_block_over_is_not_seen_there(name):
    """Positions of one sequence on paths of their own: in a block those that came by are as a sequence of them alone, at their places."""
    stack, token_1L = stack_of(model(name)), tokens(1, 5)
    came = [[0, 1, 2, 4], [0, 2, 4], [0, 1, 2, 3, 4]]
    cache, made = stack.new_cache(5), []
    for at in range(5):
        path = [block for block in range(BLOCKS) if at in came[block]]
        made.append(run_path(stack, token_1L[:, at : at + 1], path, cache=cache))
    x_1LD, state = stack.embed(token_1L)
    for block in range(BLOCKS):
        own = torch.tensor(came[block])
        _, part = stack.embed(token_1L[:, own], position_BL=own[None])
        x_1LD = x_1LD.index_copy(1, own, stack.block(block, x_1LD[:, own], part))
    torch.testing.assert_close(torch.cat(made, 1), stack.head(x_1LD, state), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["ours", "llama"])
@torch.no_grad()
def test_rows_come_to_a_block_one_after_another_and_leave(name):
    """Within a pass, in any order; and sequences that leave the batch keep their visits."""
    stack, token_BL = stack_of(model(name)), tokens(3, 6)
    cache = stack.new_cache(6)
    x_BLD, state = stack.embed(token_BL[:, :4], cache=cache)
    for layer, rows in ((0, [2]), (0, [0, 1]), (1, []), (1, [1]), (1, [1, 2]), (2, None)):
        x_BLD = stack.block(layer, x_BLD, state, rows=rows)
    found = stack.head(x_BLD, state)
    paths = [(0, 2), (0, 1, 1, 2), (0, 1, 2)]
    alone = [run_path(stack, token_BL[row : row + 1], path) for row, path in enumerate(paths)]
    torch.testing.assert_close(found, torch.cat(alone)[:, :4], atol=1e-5, rtol=1e-4)
    cache.keep_rows(torch.tensor([2, 1]))
    rest = run_path(stack, token_BL[[2, 1], 4:], [paths[2], paths[1]], cache=cache)
    torch.testing.assert_close(rest, torch.cat([alone[2], alone[1]])[:, 4:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["ours", "llama"])
@torch.no_grad()
def test_a_pass_that_failed_leaves_nothing_in_the_cache(name):
    stack, token_BL = stack_of(model(name)), tokens(2, 6)
    cache = stack.new_cache(6)
    run_path(stack, token_BL[:, :3], cache=cache)
    x_BLD, state = stack.embed(token_BL[:, 3:4], cache=cache)
    stack.block(0, x_BLD, state, rows=[1])
    found = run_path(stack, token_BL[:, 3:], cache=cache)
    torch.testing.assert_close(found, run_path(stack, token_BL)[:, 3:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["ours", "llama"])
@torch.no_grad()
def test_branches_go_on_from_a_fork(name):
    stack, token_BL = stack_of(model(name)), tokens(2, 5)
    x_BLD, state = stack.embed(token_BL)
    x_BLD = stack.block(0, x_BLD, state)
    for tail in ((1, 2), (2,), (1, 1, 2)):
        branch, y_BLD = stack.fork(state), x_BLD
        for layer in tail:
            y_BLD = stack.block(layer, y_BLD, branch)
        assert torch.equal(stack.head(y_BLD, branch), run_path(stack, token_BL, (0, *tail)))
    _, state = stack.embed(token_BL, cache=stack.new_cache(5))
    with pytest.raises(ConfigError, match="a pass with a key-value cache cannot be forked"):
        stack.fork(state)


@torch.no_grad()
def test_ours_is_the_decoder_on_a_path_also_with_experts():
    made = decoder(feed_forward=MoE.Config(num_experts=4, hidden_dim=12))
    stack, token_BL = stack_of(made), tokens(2, 6)
    for path in ((0, 1, 2), (2, 0), (1, 1, 2), ()):
        assert torch.equal(run_path(stack, token_BL, path), made(token_BL, path=path).logits_BLV)
    assert torch.equal(run_path(stack, token_BL, (0, 0, 2)), OnPath(made, (0, 0, 2))(token_BL).logits_BLV)


def test_work_is_counted():
    # 4 heads of 8, 2 of them for keys; a feed-forward layer of 3 x 32 x hidden.
    theirs = model("llama")
    stack = stack_of(theirs)
    matrices = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * theirs.config.intermediate_size
    assert stack.count(1, 1, 1) == matrices + 2 * 32
    assert stack.count(1, 5, 8) == 5 * matrices + 2 * 32 * (4 + 5 + 6 + 7 + 8)
    window = stack_of(model("mistral-window"))
    assert window.count(0, 5, 5) - 5 * (window.count(0, 1, 1) - 2 * 32) == 2 * 32 * (1 + 2 + 3 + 3 + 3)
    ours = stack_of(model("ours"))
    own = 16 * 16 * 4 + 3 * 16 * 24
    assert [ours.count(layer, 3, 4) for layer in range(BLOCKS)] == [3 * own + 2 * 16 * (2 + 3 + 4)] * BLOCKS
    narrow = stack_of(model("ours-window"))
    assert narrow.count(0, 4, 9) == 4 * own + 2 * 16 * 4 * 3
    learned = stack_of(model("gpt2"))
    assert learned.count(0, 2, 2) == 2 * (32 * 96 + 32 * 32 + 2 * 32 * 128) + 2 * 32 * (1 + 2)


@given(length=st.integers(0, 9), past=st.integers(0, 9), window=st.none() | st.integers(1, 12))
def test_pairs_are_those_of_each_query(length, past, window):
    seen = [past + query + 1 for query in range(length)]
    assert seen_pairs(length, past + length, window) == sum(min(one, window or one) for one in seen)


def test_more_queries_than_positions_are_refused():
    with pytest.raises(ConfigError, match="length is 3 and context 2"):
        seen_pairs(3, 2)


def test_a_fingerprint_is_the_models_in_every_form():
    ours = stack_of(decoder())
    assert ours.fingerprint() == stack_of(decoder()).fingerprint() == stack_of(decoder().bfloat16()).fingerprint()
    few_bits = decoder(dim=32)
    before = stack_of(few_bits).fingerprint()
    quantize(few_bits, "int8")
    assert stack_of(few_bits).fingerprint() == before
    others = [decoder(seed=4), few_bits, model("llama"), model("gpt2")]
    assert len({stack_of(other).fingerprint() for other in others} | {ours.fingerprint()}) == 5
    changed = decoder()
    with torch.no_grad():
        changed.blocks[1].attention_norm.weight[0] += 0.5
    assert stack_of(changed).fingerprint() != ours.fingerprint()
    assert len(ours.fingerprint()) == 64


@pytest.mark.parametrize("name", ["ours", "llama", "gpt2"])
def test_what_a_stack_tells_of_its_model(name):
    made = model(name)
    stack = stack_of(made)
    width = 16 if name == "ours" else 32
    assert (stack.num_blocks, stack.width, stack.vocabulary) == (BLOCKS, width, 61)
    assert stack.module is made
    assert len(stack.layers) == BLOCKS
    assert stack.max_positions == (2048 if name == "ours" else 64)
    assert (stack.device.type, stack.dtype) == ("cpu", torch.float32)
    assert stack_of(stack) is stack


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ((0, 3), "path has block 3; the model has blocks 0 to 2"),
        ((-1,), "path has block -1"),
        ((0, 1, 1, 1), "the path comes to block 1 3 times; a block may run at most 2 times"),
        ([(0,), (2, 2, 2)], "path 1 comes to block 2 3 times"),
        ([(0,)], "there are 1 paths for 2 sequences"),
        ("01", "path is '01'"),
        (1.5, "path is 1.5"),
        ((0, None), "path has block None"),
    ],
)
@pytest.mark.parametrize("name", ["ours", "llama"])
def test_wrong_paths(name, path, message):
    with pytest.raises(ValueError, match=message):
        run_path(stack_of(model(name)), tokens(2, 3), path)


@pytest.mark.parametrize("name", ["ours", "llama", "gpt2"])
def test_wrong_masks_positions_and_lengths(name):
    stack, token_BL = stack_of(model(name)), tokens(2, 3)
    with pytest.raises(ConfigError, match=r"attention_mask has shape \(2, 4\) and the tokens \(2, 3\)"):
        run_path(stack, token_BL, attention_mask=torch.ones(2, 4))
    with pytest.raises(ConfigError, match=r"position_BL has shape \(1, 3\) and the tokens \(2, 3\)"):
        stack.embed(token_BL, position_BL=torch.arange(3)[None])
    with pytest.raises(CapacityError, match="the cache holds 2 positions, but 3 are needed"):
        run_path(stack, token_BL, cache=stack.new_cache(2))


def test_learned_positions_end():
    stack = stack_of(model("gpt2"))
    with pytest.raises(ConfigError, match="a token at position 64, and the model has learned positions 0 to 63"):
        run_path(stack, tokens(1, 65))


@pytest.mark.parametrize("given", [nn.Linear(2, 2), None, "gpt2", 5, object()])
def test_models_of_no_known_make(given):
    with pytest.raises(
        ConfigError, match=f"knows no blocks of a {type(given).__name__}; give an anabranch Decoder.*LlamaForCausalLM"
    ):
        stack_of(given)


def test_models_that_cannot_be_routed():
    from anabranch.experts.parscale import ParScale

    with pytest.raises(ConfigError, match="this decoder runs each in parallel streams"):
        stack_of(decoder(streams=ParScale.Config(num_streams=2, prefix_len=3, embedding_dim=8, mlp_dim=8)))
    theirs = MAKERS["llama"]()
    theirs.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ConfigError, match=r"attention is 'flash_attention_2', which masks no single positions.*'sdpa' or 'eager'"
    ):
        stack_of(theirs)


@given(decisions=st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_decisions_and_paths_say_the_same(decisions):
    path = path_of(decisions)
    assert decisions_of(path, len(decisions)) == decisions
    assert check_depth_path(path, len(decisions)) == path


@pytest.mark.parametrize("decision", [3, -1, 1.5, True, None, "1"])
def test_wrong_decisions(decision):
    with pytest.raises(ConfigError, match=f"the decision on block 1 is {decision!r}; it must be 0"):
        path_of([1, decision])


def test_decisions_say_no_order():
    with pytest.raises(ConfigError, match="the path goes back from block 2 to 1"):
        decisions_of((0, 2, 1), 3)


@pytest.mark.parametrize("name", ["ours", "llama", "llama-eager", "qwen2", "gpt2"])
@torch.no_grad()
def test_padding_and_blocks_that_were_passed_over_go_together(name):
    """Each pass has a path of its own: what a padded row sees of a block is neither padding nor a position that did not come by."""
    stack, token_BL = stack_of(model(name)), tokens(2, 7)
    mask_BL = torch.ones(2, 7, dtype=torch.bool)
    mask_BL[1, :2] = False
    passes = [(slice(0, 4), (0, 1)), (slice(4, 5), (1, 2)), (slice(5, 7), (0, 1, 2, 2))]

    def ran(rows, cut):
        cache, made = stack.new_cache(7), []
        for part, path in passes:
            here = slice(max(part.start, cut), part.stop)
            padding = mask_BL[rows, here] if cut == 0 else None
            made.append(run_path(stack, token_BL[rows, here], path, cache=cache, attention_mask=padding))
        return torch.cat(made, 1)

    both = ran(slice(0, 2), 0)
    torch.testing.assert_close(both[1:, 2:], ran(slice(1, 2), 2), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both[:1], ran(slice(0, 1), 0), atol=1e-5, rtol=1e-4)
