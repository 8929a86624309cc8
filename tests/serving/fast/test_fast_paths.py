"""Parts of the compiled step: any blocks in any order on some sequences, and the schedule that lets them share blocks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.experts.rmoe import RecurrentScore
from anabranch.lm import Decoder
from anabranch.nn import MoE, SelfAttention, SwiGLU, kernels
from anabranch.routing import Router
from anabranch.serving.engine.paged import VisitSlots
from anabranch.serving.fast import FastDecoder
from anabranch.serving.fast.paths import CompiledPaths, schedule_of

LAYERS, DEPTH, BLOCK, VOCAB = 3, 6, 4, 40

paths = st.lists(st.integers(0, LAYERS - 1), max_size=DEPTH).map(tuple)


def visits_of(path):
    slots = VisitSlots(DEPTH, range(LAYERS), path)
    return tuple((layer, slots.of(layer, path[:place].count(layer))) for place, layer in enumerate(path))


@given(st.lists(paths, min_size=1, max_size=5))
def test_each_sequence_runs_its_blocks_in_order(given_paths):
    visits_N = tuple(map(visits_of, given_paths))
    ran = [[] for _ in visits_N]
    for visits, numbers in schedule_of(visits_N):
        for number in range(len(visits_N)) if numbers is None else numbers:
            ran[number] += visits
    assert tuple(map(tuple, ran)) == visits_N


def test_paths_that_ascend_share_their_blocks():
    both = tuple(map(visits_of, [(0, 1, 2), (0, 2), (0, 1, 1, 2)]))
    assert schedule_of(both) == (
        (((0, 0),), None),
        (((1, 1),), (0, 2)),
        (((1, 3),), (2,)),
        (((2, 2),), None),
    )
    assert schedule_of((visits_of((0, 1, 2)),) * 2) == ((((0, 0), (1, 1), (2, 2)), None),)
    assert schedule_of(((), ())) == ()


def model_of(feed_forward=None, **fields):
    config = Decoder.Config(
        vocab_size=VOCAB,
        dim=32,
        num_layers=LAYERS,
        attention=SelfAttention.Config(num_heads=2),
        init_std=0.3,
        feed_forward=feed_forward or SwiGLU.Config(hidden_dim=64),
        **fields,
    )
    return config.build(seed=0).eval()


@pytest.fixture(scope="module")
def made():
    if kernels.load() is None:
        pytest.skip("no compiler")
    model = model_of()
    stores = [torch.zeros(DEPTH, 80, 2, 16) for _ in range(2)]
    fast = FastDecoder(model, *(store[:LAYERS] for store in stores), block_tokens=BLOCK)
    return model, CompiledPaths(fast, *stores)


def begin(paths, prompts, starts):
    """A step of some tokens of each sequence, each in five blocks of its own."""
    rows = [(start, prompt[start:end]) for prompt, (start, end) in zip(prompts, starts, strict=True)]
    counts = [len(tokens) for _, tokens in rows]
    first = np.cumsum([0, *counts[:-1]])
    sequence_N4 = np.array([(first[n], counts[n], rows[n][0], 5 * n) for n in range(len(rows))], np.int64)
    table_U = np.arange(5 * len(rows), dtype=np.int32)
    position_T = torch.cat([torch.arange(start, start + len(tokens)) for start, tokens in rows])
    token_T = torch.tensor([token for _, tokens in rows for token in tokens])
    return paths.begin(token_T, position_T, sequence_N4, table_U)


def run(paths, prompts, starts, given_paths):
    step = begin(paths, prompts, starts)
    for visits, numbers in schedule_of(tuple(map(visits_of, given_paths))):
        step.run(visits, numbers)
    return step.normed().clone()


@settings(max_examples=10)
@given(given_paths=st.lists(paths, min_size=3, max_size=3), seed=st.integers(0, 99))
@torch.no_grad()
def test_sequences_of_any_paths_are_what_the_decoder_gives_and_do_not_feel_each_other(made, given_paths, seed):
    model, compiled = made
    draw = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(VOCAB, (length,), generator=draw).tolist() for length in (6, 9, 3)]
    cuts = [(4, 6), (7, 9), (2, 3)]
    found = [
        run(compiled, prompts, [(0, start) for start, _ in cuts], given_paths),
        run(compiled, prompts, cuts, given_paths),
    ]
    at = [0, 0]
    for prompt, path, (start, end) in zip(prompts, given_paths, cuts, strict=True):
        context = model.context(torch.tensor([prompt]), path=path)
        wanted = model.hidden(torch.tensor([prompt]), context)[0]
        own = torch.cat([found[0][at[0] : at[0] + start], found[1][at[1] : at[1] + end - start]])
        at = [at[0] + start, at[1] + end - start]
        torch.testing.assert_close(own, wanted, atol=1e-4, rtol=1e-4)
    # To the bit, whoever is beside it.
    alone = run(compiled, prompts[:1], [(0, 4)], given_paths[:1])
    assert torch.equal(alone, found[0][:4])


@torch.no_grad()
def test_all_blocks_are_the_whole_step_to_the_bit(made):
    _, compiled = made
    step = begin(compiled, [[3, 1, 4, 1, 5]], [(0, 5)])
    x_TD, _ = compiled.fast.hidden(
        torch.tensor([3, 1, 4, 1, 5]), torch.arange(5), step._all.sequence_M4, np.arange(5, dtype=np.int32)
    )
    assert torch.equal(run(compiled, [[3, 1, 4, 1, 5]], [(0, 5)], [(0, 1, 2)]), x_TD)


@torch.no_grad()
def test_experts_are_run_by_block(made):
    model = model_of(MoE.Config(num_experts=4, hidden_dim=32))
    stores = [torch.zeros(DEPTH, 40, 2, 16) for _ in range(2)]
    compiled = CompiledPaths(FastDecoder(model, *(store[:LAYERS] for store in stores), block_tokens=BLOCK), *stores)
    prompts, given_paths = [[1, 2, 3], [9, 8]], [(0, 2, 2), (0, 1)]
    found = run(compiled, prompts, [(0, 3), (0, 2)], given_paths)
    wanted = [
        model.hidden(token_1L, model.context(token_1L, path=path))[0]
        for token_1L, path in zip((torch.tensor([one]) for one in prompts), given_paths, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-4, rtol=1e-4)


def test_routers_that_hand_on_cannot_be_taken_apart(made):
    model = model_of(
        MoE.Config(num_experts=4, hidden_dim=32, router=Router.Config(score=RecurrentScore.Config(state_dim=32)))
    )
    stores = [torch.zeros(LAYERS, 40, 2, 16) for _ in range(2)]
    fast = FastDecoder(model, *stores, block_tokens=BLOCK)
    assert not CompiledPaths.supports(fast)
    with pytest.raises(ConfigError, match="blocks of this model run together"):
        CompiledPaths(fast, *stores)


@torch.no_grad()
def test_forms_are_kept_and_let_go_of(made, monkeypatch):
    from anabranch.serving.fast import paths as module

    _, compiled = made
    monkeypatch.setattr(module, "MOST_FORMS", 3)
    compiled._forms.clear()
    for slot in range(6):
        compiled.form(((0, slot),))
        assert len(compiled._forms) <= 3
    assert compiled.form(((0, 5),)) is compiled.form(((0, 5),))
