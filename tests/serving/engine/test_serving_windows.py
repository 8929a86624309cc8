"""Layers with a window keep the window and no more: what the engine gives is what the whole model gives, from memory of that size."""
# Shapes: V vocabulary, L positions

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.nn import Rotary, SelfAttention
from anabranch.serving import LLM, Sampling
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.hooks import StepHook
from anabranch.serving.core.kinds import most_blocks
from anabranch.serving.core.offload import LruTier
from anabranch.serving.engine import PagedShape
from anabranch.serving.engine.kinds import Kinds
from anabranch.serving.sampling import Sampler

HEADS = {"num_heads": 4, "num_kv_heads": 2}
PLAIN = SelfAttention.Config(**HEADS)
NARROW = SelfAttention.Config(**HEADS, window=6, sinks=True, rotary=Rotary.Config(theta=100.0))
WIDE = SelfAttention.Config(**HEADS, window=13)
MODELS = {
    "in all": {"attention": NARROW},
    "in some": {"attention": PLAIN, "local_attention": NARROW, "local_layers": (0, 2)},
    "in the others": {"attention": NARROW, "local_attention": PLAIN, "local_layers": (1,)},
    "of two widths": {"attention": WIDE, "local_attention": NARROW, "local_layers": (0,)},
}
SIZES = {"block_tokens": 4, "max_batched_tokens": 11, "max_seqs": 3}
GREEDY = Sampling(temperature=0.0, max_tokens=30, ignore_eos=True)
BEGIN = [7, 3, 9, 20, 1, 5, 30, 8, 8, 2, 19, 4, 11, 6, 0, 13, 12, 29, 3, 3, 28, 16, 10, 1, 2]


@pytest.fixture
def model_of(tiny_model):
    def make(name):
        model = tiny_model(vocab_size=64, init_std=0.4, num_layers=3, **MODELS[name])
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "sink" in parameter_name:
                    parameter.copy_(torch.linspace(-1, 2, parameter.numel()))
        return model

    return make


class Kept(Sampler):
    """Keeps the scores of each request."""

    def __init__(self, vocab_size):
        super().__init__(vocab_size)
        self.kept = {}

    def __call__(self, logits_RV, ids):
        for id, logits_V in zip(ids, logits_RV, strict=True):
            self.kept.setdefault(id, []).append(logits_V.clone())
        return super().__call__(logits_RV, ids)


class Watching(StepHook):
    """After each step: nobody has more than a window and what a step computes; what nobody holds or finds is made unreadable."""

    def __init__(self):
        self.llm, self.most, self.is_alone = None, 0, True

    def after_step(self, batch, sampled):
        scheduler, stores = self.llm.engine.scheduler, self.llm.engine.runner.stores
        for place, (kind, pool) in enumerate(zip(scheduler._tables.kinds, stores.pools, strict=True)):
            if self.is_alone:
                kind.pool.check()
            for block in range(kind.pool.num_blocks):
                if not kind.pool.holders(block) and kind.pool._key[block] is None:
                    for part in (pool.key, pool.value):
                        part.unflatten(2, (-1, pool.block_tokens))[:, :, block] = torch.nan
            if kind.window is None:
                continue
            for state in scheduler.states():
                table = state.tables[place]
                live = len(table) - kind.num_gone(table)
                assert live <= most_blocks(kind.window, scheduler.config.num_new, kind.pool.block_tokens)
                self.most = max(self.most, live)


def engine_of(model, **options):
    sampler, watching = Kept(model.config.vocab_size), Watching()
    llm = LLM(model, sampler=sampler, hooks=[watching], **{**SIZES, **options})
    # Beside a step that is computed the next one is formed, which takes blocks and gives them back.
    watching.llm, watching.is_alone = llm, options.get("scheduling") != "async"
    return llm, sampler, watching


def check(model, llm, sampler, prompts, sampling=GREEDY):
    """Every token was sampled from the scores that the whole model gives, without a cache."""
    sampler.kept.clear()
    answers = llm.generate(prompts, sampling)
    for kind in llm.engine.scheduler._tables.kinds:
        kind.pool.check()
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            scores_LV = model(torch.tensor([[*prompt, *answer.tokens]])).logits_BLV[0, len(prompt) - 1 : -1]
        kept_LV = torch.stack(sampler.kept[answer.output.id])
        torch.testing.assert_close(kept_LV, scores_LV, atol=1e-4, rtol=1e-4)
        assert list(answer.tokens) == scores_LV.argmax(-1).tolist()
    return answers


@pytest.mark.parametrize(
    ("name", "scheduling"),
    [("in all", "sync"), ("in some", "async"), ("in the others", "sync"), ("of two widths", "async")],
)
def test_scores_are_those_of_the_whole_model(name, scheduling, model_of):
    model = model_of(name)
    llm, sampler, watching = engine_of(model, num_blocks=60, scheduling=scheduling)
    mates = [[5, 6, 7], [*BEGIN, 40, 41], [9] * 18]
    check(model, llm, sampler, mates)
    # The same beginning again: two answers' worth of windows later.
    answers = check(model, llm, sampler, [[*BEGIN, 50], [*BEGIN, *range(40, 47)]])
    assert any(answer.output.cached_tokens for answer in answers)
    assert watching.most
    counters = llm.engine.scheduler.stats().counters
    assert counters["preemptions"] == 0
    llm.close()
    for kind in llm.engine.scheduler._tables.kinds:
        assert kind.pool.num_free == kind.pool.num_blocks


# Where windows are all that is kept, little is enough.
@pytest.mark.parametrize(("name", "scheduling", "num_blocks"), [("in some", "async", 22), ("of two widths", "sync", 8)])
def test_requests_that_are_sent_back_go_on_as_they_were(name, scheduling, num_blocks, model_of):
    model = model_of(name)
    llm, sampler, _ = engine_of(model, num_blocks=num_blocks, scheduling=scheduling)
    check(model, llm, sampler, [[1, 2, 3], [9, 5], [4, 4, 4], BEGIN, list(range(30))])
    assert llm.engine.scheduler.stats().counters["preemptions"]
    llm.close()


def test_a_long_neighbour_takes_nothing_that_another_finds_again(model_of):
    model = model_of("in some")
    llm, sampler, _ = engine_of(model, num_blocks=80, max_seqs=2)
    (first,) = check(model, llm, sampler, [BEGIN], Sampling(temperature=0.0, max_tokens=1, ignore_eos=True))
    assert first.output.cached_tokens == 0
    before = llm.engine.scheduler._tables.kinds[1].pool.evictions
    # Of an answer many windows long, beside what it reads, its own spent blocks serve it.
    check(model, llm, sampler, [[1]], Sampling(temperature=0.0, max_tokens=110, ignore_eos=True))
    (again,) = check(model, llm, sampler, [[*BEGIN, 60]], Sampling(temperature=0.0, max_tokens=3, ignore_eos=True))
    assert again.output.cached_tokens == len(BEGIN) // 4 * 4
    assert llm.engine.scheduler._tables.kinds[1].pool.evictions > before
    llm.close()


def test_memory_of_a_model_with_windows_is_that_of_its_windows(model_of):
    model = model_of("in some")
    longest = 120 // 4
    llm, sampler, _ = engine_of(model, num_blocks=3 * longest, prefix_cache=False)
    full, local = llm.engine.runner.stores.pools
    assert (full.shape.layers, local.shape.layers) == (1, 2)
    assert full.num_blocks == 3 * longest
    assert local.num_blocks == 3 * most_blocks(6, 11, 4) == 15
    check(model, llm, sampler, [BEGIN, [9] * 18, list(range(30))], GREEDY)
    assert llm.engine.scheduler.stats().counters["preemptions"] == 0
    llm.close()
    whole = PagedShape.of(model).bytes_per_token * 4 * 3 * longest
    assert full.size_bytes + local.size_bytes == Kinds.of(model, llm_config(num_blocks=90)).bytes_of(90) < whole / 2


def llm_config(**fields):
    return ServingConfig(**{**SIZES, "prefix_cache": False, **fields})


def test_a_model_without_windows_has_one_kind(tiny_model):
    model = tiny_model()
    config = ServingConfig(num_blocks=12)
    assert Kinds.of(model, config) == Kinds.whole(model, config)
    attention = model.config.attention
    # Keys and values of each layer, in four bytes, for the 16 tokens of a block.
    block = 2 * model.config.num_layers * attention.kv_heads * attention.width(model.config.dim) * 4 * 16
    assert Kinds.of(model, ServingConfig(kv_memory="1MiB")).blocks() == (1 << 20) // block


def test_whole_sequences_are_kept_where_they_go_elsewhere_or_layers_come_again(model_of):
    model = model_of("in some")
    for config in (ServingConfig(host_kv="1MiB"), ServingConfig(max_depth=5)):
        assert Kinds.of(model, config) == Kinds.whole(model, config)
    for options in ({"host_kv": "1MiB"}, {"max_depth": 5}, {"tier": LruTier(8), "host_blocks": 8}):
        llm, sampler, _ = engine_of(model, num_blocks=24, **options)
        assert len(llm.engine.runner.stores.pools) == 1
        check(model, llm, sampler, [BEGIN, [9] * 18, [1, 2, 3]])
        llm.close()


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(list(MODELS)),
    st.integers(0, 400_000),
    st.integers(1, 8),
    st.integers(1, 40),
    st.booleans(),
    st.integers(1, 64),
)
def test_memory_is_shared_out_so_that_no_request_has_less_than_before(name, extra, size, budget, prefix_cache, seqs):
    model = MADE[name]
    config = ServingConfig(
        block_tokens=size, max_batched_tokens=budget, max_seqs=seqs, prefix_cache=prefix_cache, scheduling="sync"
    )
    kinds = Kinds.of(model, config)
    block = PagedShape.of(model).bytes_per_token * size
    given_bytes = block + extra
    count = kinds.blocks_in(given_bytes)
    assert kinds.bytes_of(count) <= given_bytes < kinds.bytes_of(count + 1)
    whole = given_bytes // block
    assert count >= whole
    second = kinds.second_blocks(count)
    if second is not None:
        assert second >= min(count, seqs * most_blocks(6, min(budget, config.num_new), size))
        assert second >= min(whole, seqs * most_blocks(6, min(budget, config.num_new), size))


@pytest.fixture(autouse=True, scope="module")
def _made(tiny_model):
    MADE.update({name: tiny_model(num_layers=3, **fields) for name, fields in MODELS.items()})
    yield
    MADE.clear()


MADE = {}


def test_guesses_run_and_go_behind_windows(model_of):
    model = model_of("in some")
    llm, sampler, watching = engine_of(model, num_blocks=60, prompt_lookup=3)
    check(model, llm, sampler, [[5, 6, 7] * 6, [9] * 18], Sampling(temperature=0.0, max_tokens=60, ignore_eos=True))
    assert llm.engine.scheduler.stats().counters["drafted_tokens"]
    assert watching.most
    llm.close()
    for kind in llm.engine.scheduler._tables.kinds:
        assert kind.pool.num_free == kind.pool.num_blocks


@pytest.mark.parametrize(
    ("attention", "sizes"),
    [
        (
            {"attention": PLAIN, "local_attention": SelfAttention.Config(**HEADS, window=1), "local_layers": (0,)},
            {"num_blocks": 60},
        ),
        ({"attention": PLAIN}, {"num_blocks": 1}),
    ],
)
def test_a_warm_up_stays_within_room_for_one_position(attention, sizes, tiny_model):
    model = tiny_model(vocab_size=64, num_layers=2, **attention)
    llm = LLM(model, **sizes, block_tokens=1, max_batched_tokens=1, max_seqs=1, prefix_cache=False)
    assert llm.engine.runner.stores.num_tokens == 1
    llm.engine.warm_up()
    llm.close()
