"""Keys and values that are cut over processes by blocks: what an engine over them answers is what one process answers."""
# Shapes: T rows of a step, H query heads, G key heads, D head width, S positions

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cut_ranks
from anabranch.cluster.ring.kernel import merge
from anabranch.errors import ConfigError
from anabranch.lm import save_model
from anabranch.nn.scored import PLAIN, Scoring
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.batch import Chunk
from anabranch.serving.core.kinds import GONE
from anabranch.serving.engine import PagedPool, PagedShape, PagedStore
from anabranch.serving.engine.cut import Cut
from anabranch.serving.engine.cut_store import CutStore
from anabranch.serving.engine.layout import StepLayout
from anabranch.serving.engine.paged import VisitSlots
from anabranch.testing import Ranks, run_ranks

HEADS, GROUPS, WIDTH, SIZE = 4, 2, 8, 3


class OneOf:
    """A rank whose partial result is kept, for all to be merged when all have theirs."""

    def __init__(self, rank, world):
        self.rank, self.world, self.kept = rank, world, None

    def merged(self, out, lse):
        self.kept = out.clone(), lse.clone()
        return out, lse


def steps_of(lengths, cuts):
    """Each sequence in pieces: (number, first, last) of each step."""
    done = [0] * len(lengths)
    while any(count < length for count, length in zip(done, lengths, strict=True)):
        step = []
        for number, length in enumerate(lengths):
            last = min(length, done[number] + cuts[(number + len(step)) % len(cuts)])
            if last > done[number]:
                step.append((number, done[number], last))
                done[number] = last
        yield step


@settings(max_examples=60, deadline=None)
@given(
    world=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 9),
    has_sink=st.booleans(),
    scale=st.none() | st.floats(0.1, 2.0),
    seed=st.integers(0, 999),
)
def test_partial_results_of_all_ranks_are_the_whole(world, lengths, cuts, window, has_sink, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        [torch.randn(1, heads, length, WIDTH, generator=generator, dtype=torch.float64) for length in lengths]
        for heads in (HEADS, GROUPS, GROUPS)
    )
    sink = torch.randn(HEADS, generator=generator, dtype=torch.float64) if has_sink else None
    scoring = (
        PLAIN if (window, has_sink, scale) == (None, False, None) else Scoring(scale=scale, window=window, sink_H=sink)
    )
    counts = [-(-length // SIZE) for length in lengths]
    order = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    blocks = [[order.pop() for _ in range(count)] for count in counts]
    shape = PagedShape(layers=1, heads=GROUPS, width=WIDTH, dtype=torch.float64)
    plain = PagedPool(shape, sum(counts) + 3, block_tokens=SIZE)
    ranks = [OneOf(rank, world) for rank in range(world)]
    pools = [PagedPool(shape, -(-(sum(counts) + 3) // world), block_tokens=SIZE) for _ in ranks]
    for pool in (plain, *pools):
        pool.key.fill_(torch.nan), pool.value.fill_(torch.nan)
    for step in steps_of(lengths, cuts):
        if window is not None:
            # What no row sees any more was given back.
            for number, first, _ in step:
                for place in range(max(0, first - window + 1) // SIZE):
                    blocks[number][place] = GONE
        chunks = [
            Chunk(id=str(n), tokens=(0,) * (last - first), start=first, blocks=tuple(blocks[n]), samples=False)
            for n, first, last in step
        ]
        rows = [
            torch.cat([part[n][:, :, first:last] for n, first, last in step], dim=2) for part in (query, key, value)
        ]
        layout = StepLayout(chunks, SIZE)
        expected = PagedStore(plain, layout, use_kernel=False).attend(0, *rows, scoring=scoring)
        for rank, pool in zip(ranks, pools, strict=True):
            CutStore(pool, layout, rank, VisitSlots(1, [0])).attend(0, *rows, scoring=scoring)
        out, lse = torch.zeros_like(expected), torch.full(expected.shape[:3], -torch.inf, dtype=torch.float64)
        for rank in ranks:
            merge(out, lse, *rank.kept)
        if sink is not None:
            out *= torch.sigmoid(lse - sink[:, None])[..., None]
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("world", "name", "changes"),
    [
        (2, "whole", {}),
        pytest.param(3, "with windows", {}, marks=pytest.mark.slow),
        # So few blocks that requests are sent back and computed again.
        pytest.param(2, "whole", {"num_blocks": 28}, marks=pytest.mark.slow),
        pytest.param(2, "whole", {"prompt_lookup": 3}, marks=pytest.mark.slow),
        pytest.param(2, "whole", {"scheduling": "async"}, marks=pytest.mark.slow),
    ],
)
def test_answers_are_those_of_one_process(world, name, changes):
    (found, expected, blocks, size_bytes), *others = run_ranks(cut_ranks.serving, world, name, changes, timeout_s=120)
    assert found == expected
    assert others == [None] * (world - 1)
    # A share of them, and one for a token of nobody's.
    assert blocks == -(-changes.get("num_blocks", 60) // world) + 1
    assert size_bytes > 0


def test_the_others_wait_where_nothing_runs():
    assert run_ranks(cut_ranks.idle, 2) == ["closed", "ran [1, 2]"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "stopped", "first"])
def test_whoever_is_lost_the_others_say_so(how):
    victim = 0 if how == "first" else 2
    with Ranks(3, cut_ranks.lost, how, timeout_s=60) as ranks:
        ranks.expect_end(victim)
        found = ranks.wait()
    assert len(found) == 2
    for said in found:
        assert said.startswith("RankLost: ")
        assert "start all processes again" in said


@pytest.mark.slow
def test_what_is_of_one_process_is_refused_of_a_request_alone():
    said = run_ranks(cut_ranks.refused, 2)[0]
    assert "cut over processes, which all run the usual one" in said[0]
    assert len(said) == 3


def test_a_pass_that_fails_in_its_midst_is_the_end():
    cut = Cut(1)
    with (
        pytest.raises(ConnectionError, match="rank 0 failed in the midst of a pass: ValueError: odd"),
        cut.passing(None),
    ):
        raise ValueError("odd")
    with pytest.raises(ConnectionError, match="odd"), cut.passing(None):
        pass


@pytest.mark.parametrize("case", ["copies", "another model", "another type"])
def test_all_processes_have_the_same_model(case, tmp_path):
    """Copied to several machines, where times differ and processors know other types."""
    for name, seed in (("a", 0), ("b", int(case == "another model"))):
        save_model(tmp_path / name, cut_ranks.model("whole").config.build(seed=seed))
    folders, types = [str(tmp_path / "a"), str(tmp_path / "b")], ["float32", "float32"]
    if case == "another type":
        types = ["float32", "bfloat16"]
    said = run_ranks(cut_ranks.loading, 2, folders, [{"dtype": dtype, "quantize": "none"} for dtype in types])
    if case == "copies":
        assert said == ["loaded", "loaded"]
        return
    for rank, text in enumerate(said):
        assert text.startswith("ConfigError: the processes that work together have not loaded the same model"), said
        assert folders[rank] in text


def test_as_many_processes_as_were_named():
    with pytest.raises(ConfigError, match=r"engine\.context is 2, and the processes that work together are 1"):
        Cut(2)


@pytest.mark.parametrize(
    "other",
    [
        {"memory": "1GiB"},
        {"expert_budget": "1GiB"},
        {"nano_batches": True},
        {"host_kv": "1GiB"},
        {"deterministic": True},
        {"max_depth": 3},
        {"num_streams": 2},
    ],
)
def test_what_is_of_one_process_does_not_go_with_several(other):
    with pytest.raises(ConfigError, match=f"context is 2, but {next(iter(other))} is for one process"):
        ServingConfig(context=2, **other)
