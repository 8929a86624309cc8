"""`step_bytes` and `load_bytes`: by hand, beside what the compiled step asks for, and with threads that load experts."""

import pytest
import torch

from anabranch.lm import Decoder
from anabranch.nn import MoE, SelfAttention, SwiGLU, kernels
from anabranch.serving.config import ServingConfig
from anabranch.serving.depth import DepthConfig
from anabranch.serving.engine.paged import PagedPool, PagedShape
from anabranch.serving.experts import ExpertsConfig
from anabranch.serving.fast import FastDecoder
from anabranch.serving.fast.layout import BYTES
from anabranch.serving.load import dtype_of
from anabranch.serving.memory.forms import Form
from anabranch.serving.memory.plan import Ladder
from anabranch.serving.memory.work import load_bytes, step_bytes

MIB = 1 << 20
TINY = Decoder.Config(
    vocab_size=10,
    dim=8,
    num_layers=2,
    attention=SelfAttention.Config(num_heads=2, num_kv_heads=1),
    feed_forward=SwiGLU.Config(hidden_dim=16),
    max_positions=64,
)
TINY_MIXTURE = TINY.replace(feed_forward=MoE.Config(num_experts=4, hidden_dim=16))
WIDE = TINY.replace(vocab_size=257, dim=256, num_layers=1, attention=SelfAttention.Config(num_heads=4, num_kv_heads=2))
SHAPES = {
    "dense": WIDE.replace(feed_forward=SwiGLU.Config(hidden_dim=2048)),
    "narrow": WIDE.replace(feed_forward=SwiGLU.Config(hidden_dim=32)),
    "mixture": WIDE.replace(feed_forward=MoE.Config(num_experts=64, hidden_dim=512)),
    "shared": WIDE.replace(feed_forward=MoE.Config(num_experts=8, hidden_dim=512, shared_experts=2)),
}


def form_of(shape, dtype=torch.float32, quantize="none"):
    return Form.of(shape, quantize, dtype)


def test_a_step_of_a_dense_model_by_hand():
    # A row: its states, 2 heads' queries of 4, a head's keys and values of 4, and three times the widest layer, w1 and w3 of 16.
    row = 12 * 8 + 4 * 2 * 4 + 4 * (4 + 4) + 3 * 32
    # 32 more rows of the deepest product; two rows of logits that are sampled from, which is more than three that are scored.
    padding, logits = 32 * 16, 2 * 48 * 10
    # Five norms; four matrices of each layer and the last one, two pages for each.
    beside = 4 * 5 * 8 + 2 * 4096 * (2 * 4 + 1)
    assert step_bytes(form_of(TINY), 3, 2, 64) == 4 * (3 * row + padding) + logits + beside


def test_a_step_of_a_mixture_by_hand():
    # Two of four experts, and the widest layer is that of queries, keys and values.
    row = 12 * 8 + 4 * 2 * 4 + 4 * (4 + 4) + 2 * (3 * 16 + 3 * 8 + 16) + 4 * 4 + 3 * 16
    beside = 4 * (5 * 8 + 2 * 4 * 8) + 2 * 4096 * (2 * 3 + 1)
    assert step_bytes(form_of(TINY_MIXTURE), 3, 2, 64) == 4 * (3 * row + 32 * 16) + 2 * 48 * 10 + beside


def test_scores_of_attention_that_no_kernel_computes_take_memory():
    odd = TINY.replace(attention=SelfAttention.Config(num_heads=2, num_kv_heads=1, scale=0.25, sinks=True))
    short, long = (step_bytes(form_of(odd), 3, 2, positions) for positions in (64, 65))
    # Of two heads, and their softmax.
    assert long - short == 2 * 4 * 2 * 3
    assert step_bytes(form_of(TINY), 3, 2, 64) == step_bytes(form_of(TINY), 3, 2, 65)


def test_prompts_that_are_scored_take_tiles_of_logits():
    few, many, more = (step_bytes(form_of(TINY), tokens, 1, 64) for tokens in (100, 128, 129))
    row = 4 * (12 * 8 + 4 * 2 * 4 + 4 * (4 + 4) + 3 * 32)
    assert many - few == 28 * (row + 12 * 10)
    assert more - many == row


def test_logits_of_guesses_take_memory():
    form = form_of(SHAPES["mixture"], torch.bfloat16)
    without, few, many = (step_bytes(form, 64, 16, 1024, prompt_lookup=number) for number in (0, 1, 1000))
    # A row of 257 numbers for each guess, of which a step of 64 tokens has at most as many, and for each request.
    assert few - without == (16 + 16) * 257 * 4
    assert many - without == (64 + 16) * 257 * 4


def test_each_thread_that_loads_experts_and_who_waits_for_one_has_a_buffer():
    form = form_of(TINY_MIXTURE)
    resident, one, most = (step_bytes(form, 3, 2, 64, workers=number) for number in (0, 1, 256))
    assert (one - resident, most - resident) == (2 * 4 * MIB, 257 * 4 * MIB)


def test_a_plan_counts_the_threads_that_are_asked_for_where_experts_are_on_disk():
    def work(workers, **fields):
        # Steps are so large that they take more than loading does.
        config = ServingConfig(
            model="m", memory="1TiB", max_batched_tokens=1 << 15, experts=ExpertsConfig(workers=workers), **fields
        )
        plan = Ladder(config, SHAPES["mixture"], measure=lambda model, processes: 0).plan(1 << 40)
        # Where all are in memory what was said of those on disk is left out, which a config refuses without a budget.
        assert plan.config.experts == (config.experts if fields else ExpertsConfig())
        return plan.work

    assert work(256, expert_budget="16MiB") - work(3, expert_budget="16MiB") == 253 * 4 * MIB
    assert work(256) == work(3) == work(3, expert_budget="16MiB") - 4 * 4 * MIB


def test_a_plan_counts_prompts_that_run_whole_before_their_pieces():
    """One legal prompt went past the plan: the look-ahead of a skipper computes all of it in one step, with keys of its own."""

    shape = SHAPES["dense"].replace(max_positions=1 << 18)

    def work(positions, tokens=64, **depth):
        config = ServingConfig(
            model="m", memory="1TiB", max_batched_tokens=tokens, max_positions=positions, depth=DepthConfig(**depth)
        )
        return Ladder(config, shape, measure=lambda model, processes: 0).plan(1 << 40).work

    long = 1 << 17
    routed, pruned = work(long, routers="r"), work(long, skipper="s")
    # As if a step had as many tokens as the longest prompt.
    assert routed == work(long, tokens=long)
    # Keys and values of two heads of 64 in one layer, and states, of two prompts.
    kept = dtype_of(ServingConfig(model="m")).itemsize
    kept_bytes = 2 * long * (2 * 2 * 64 * kept + 256 * 4)
    # And what a skipper looks at of attention: a million scores and weights of each head, or all of a short prompt.
    heads = shape.attention.num_heads
    assert pruned - routed == kept_bytes + 2 * 4 * heads * (1 << 20)

    def step(**depth):
        config = ServingConfig(model="m", memory="1TiB", max_positions=64, depth=DepthConfig(**depth))
        ladder = Ladder(config, shape, measure=lambda model, processes: 0)
        return ladder._step(ladder.resident[0], on_disk=False)

    short = 2 * 64 * (2 * 2 * 64 * kept + 256 * 4) + 2 * 4 * heads * 64 * 64
    assert step(skipper="s") - step(routers="r") == short
    assert work(long) < routed
    assert work(64, tokens=long, routers="r") == work(64, tokens=long)


def test_loading_by_hand():
    remap, rounding = 64_000_000, 24 << 22
    # The largest matrix is that of w1 and w3, and is there as it lies in its file while it is packed.
    dense, largest = form_of(TINY), 4 * 32 * 8
    assert load_bytes(dense, is_rounded=False, on_disk=False) == remap + largest
    assert load_bytes(dense, is_rounded=True, on_disk=False) == remap + rounding + largest
    # Of a mixture it is a layer's experts, unless they stay on disk as they are; to be rounded they are read.
    mixture, experts, largest = form_of(TINY_MIXTURE), 4 * 4 * (32 * 8 + 8 * 16), 4 * 16 * 8
    assert load_bytes(mixture, is_rounded=False, on_disk=False) == remap + experts
    assert load_bytes(mixture, is_rounded=False, on_disk=True) == remap + largest
    assert load_bytes(mixture, is_rounded=True, on_disk=False) == remap + rounding + experts
    assert load_bytes(mixture, is_rounded=True, on_disk=True) == remap + rounding + experts
    # An embedding may be the largest.
    wide = form_of(TINY.replace(vocab_size=1000))
    assert load_bytes(wide, is_rounded=False, on_disk=False) == remap + 4 * 1000 * 8


@pytest.fixture(scope="module")
def compiled():
    """The compiled step of each shape."""
    made = {}
    for name, shape in SHAPES.items():
        model = shape.build(seed=0).eval()
        pool = PagedPool(PagedShape.of(model), 1)
        made[name] = FastDecoder(model, pool.key[:, 0], pool.value[:, 0], block_tokens=16)
    return made


@pytest.mark.skipif(kernels.load() is None, reason="no compiler")
@pytest.mark.parametrize("tokens", [1, 2, 16, 100, 512, 4096])
@pytest.mark.parametrize("name", list(SHAPES))
def test_a_step_is_bounded_by_what_the_compiled_one_takes_and_five_times_that(name, tokens, compiled):
    """Module by module a step takes more, and it is the bound of both."""
    taken = BYTES(compiled[name]._model, tokens, 0)
    assert taken <= step_bytes(form_of(SHAPES[name]), tokens, 1, 64) <= 5 * taken
