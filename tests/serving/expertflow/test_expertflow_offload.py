"""Offloaded models compute what they computed before."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from anabranch.errors import BackendError, CheckpointError, ConfigError, DataError
from anabranch.experts.chain import Chain
from anabranch.experts.rexmoe import ReXMoE
from anabranch.experts.rmoe import RecurrentScore
from anabranch.lm import Decoder, SamplingConfig, export_huggingface, generate, save_model
from anabranch.nn import SwiGLU
from anabranch.nn.context import BuildContext
from anabranch.routing import Router, TopK, record_routing
from anabranch.serving.core.batch import Batch, Chunk
from anabranch.serving.core.request import Request
from anabranch.serving.expertflow import Expert, Routes, find_pools, load_offloaded, offload
from anabranch.serving.expertflow.policy import POLICIES
from anabranch.serving.expertflow.predictors import Oracle
from anabranch.serving.expertflow.tiers import CudaTier, DequantTier, MemoryTier, ThrottledTier, dequantize, quantize
from expertflow_models import VOCAB, make_model, moe_config, prompts

GREEDY = SamplingConfig(max_tokens=6, temperature=0.0)
TOKENS = torch.arange(24).view(3, 8) * 7 % VOCAB


@pytest.fixture
def model() -> Decoder:
    return make_model()


@pytest.fixture
def expected(model: Decoder) -> tuple[torch.Tensor, list[list[int]]]:
    with torch.inference_mode():
        return model(TOKENS).logits_BLV, generate(model, prompts(), GREEDY)


def quarter(model: Decoder) -> int:
    return find_pools(model).layout.total_bytes // 4


@pytest.mark.parametrize("tier", ["memory", "file"])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_outputs_do_not_depend_on_the_policy(model, expected, policy: str, tier: str) -> None:
    most: list[int] = []
    with offload(
        model, quarter(model), policy=policy, tier=tier, keep=True, audit=lambda *event: most.append(event[3])
    ) as engine:
        with torch.inference_mode():
            logits_BLV = model(TOKENS).logits_BLV
        tokens = generate(model, prompts(), GREEDY)
        assert engine.arena.bytes <= engine.budget_bytes
        assert max(most) <= engine.budget_bytes
        counters = engine.stats().counters
        assert counters["expert_bytes_moved"] > 0  # whether asked for in time or not
        engine.restore()
    torch.testing.assert_close(logits_BLV, expected[0], rtol=0, atol=1e-5)
    assert tokens == expected[1]
    with torch.inference_mode():
        assert torch.equal(model(TOKENS).logits_BLV, expected[0])  # its own pools are back


@pytest.mark.parametrize("predictor", ["tlp", "slp", "router_lookahead", None])
def test_outputs_do_not_depend_on_predictions_at_the_smallest_budget(model, expected, predictor: str | None) -> None:
    engine = offload(model, find_pools(model).layout.least_bytes(), predictor=predictor)
    assert generate(model, prompts(), GREEDY) == expected[1]
    engine.restore()


def test_an_oracle_predicts_all_and_misses_little(model, expected) -> None:
    with record_routing(model) as recorder:
        generate(model, prompts(), GREEDY)
    routes = Routes.from_trace(recorder.trace())
    found = find_pools(model)
    oracle = Oracle(found.fingerprint(f"vocab:{VOCAB}"), routes)
    engine = offload(model, found.layout.total_bytes // 2, predictor=oracle)
    assert generate(model, prompts(), GREEDY) == expected[1]
    total = engine.cache.total()
    assert total.predicted_right == total.accesses
    engine.restore()


DESIGNS = {
    "shared experts": moe_config(shared_experts=1, shared_gate=True),
    "weights on inputs": moe_config(weight_on="input"),
    "pools that layers share": ReXMoE.Config(
        num_experts=6, hidden_dim=32, reuse=3, router=Router.Config(select=TopK.Config(top_k=2))
    ),
    "recurrent routers": moe_config(
        router=Router.Config(score=RecurrentScore.Config(state_dim=16), select=TopK.Config(top_k=2))
    ),
    "several passes": Chain.Config(num_experts=6, hidden_dim=32, router=Router.Config(select=TopK.Config(top_k=2))),
}


@pytest.mark.parametrize("name", DESIGNS)
def test_designs(name: str) -> None:
    model = make_model(DESIGNS[name])
    with torch.inference_mode():
        expected = model(TOKENS).logits_BLV
        names = set(model.state_dict())
        for policy in ("plec", "lru", "cache_moe"):
            engine = offload(model, find_pools(model).layout.total_bytes // 2, policy=policy)
            torch.testing.assert_close(model(TOKENS).logits_BLV, expected, rtol=0, atol=1e-5)
            assert not [one for one in model.state_dict() if "experts" in one and "w13" in one]
            engine.restore()
    assert set(model.state_dict()) == names


def test_dense_layers_and_layers_of_other_sizes() -> None:
    model = make_model(dense_layers=(0,), dense_feed_forward=SwiGLU.Config(hidden_dim=48))
    other = moe_config(num_experts=5, hidden_dim=64, router=Router.Config(select=TopK.Config(top_k=3)))
    model.blocks[2].feed_forward = other.build(BuildContext(32, 4, layer=2, generator=torch.Generator().manual_seed(1)))
    layout = find_pools(model).layout
    assert layout.num_experts == (16, 5, 16)
    assert layout.top_k == (2, 3, 2)
    assert layout.num_kinds == 2
    with torch.inference_mode():
        expected = model(TOKENS).logits_BLV
        for budget in (layout.least_bytes(), layout.total_bytes // 2, None):
            with offload(model, budget) as engine:
                torch.testing.assert_close(model(TOKENS).logits_BLV, expected, rtol=0, atol=1e-5)
                assert engine.arena.bytes <= engine.budget_bytes
                engine.restore()


def test_bfloat16_experts(model) -> None:
    half = make_model().to(torch.bfloat16)
    with torch.inference_mode():
        expected = half(TOKENS).logits_BLV
        with offload(half, quarter(half)) as engine:
            torch.testing.assert_close(half(TOKENS).logits_BLV, expected, rtol=0, atol=0)
            engine.restore()


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_experts_are_those_of_the_rounded_model(bits: int) -> None:
    model, rounded = make_model(), make_model()
    for module in rounded.modules():
        if hasattr(module, "w13") and module.w13.dim() == 3:
            for weight in (module.w13, module.w2):
                weight.data = dequantize(*quantize(weight.data, bits), bits)
    with torch.inference_mode(), offload(model, quarter(model), tier=f"int{bits}") as engine:
        torch.testing.assert_close(model(TOKENS).logits_BLV, rounded(TOKENS).logits_BLV, rtol=0, atol=1e-5)
        assert not engine.can_restore  # the originals are gone, or nothing would be saved


def test_quantisation_rounds_to_the_nearest_level() -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for bits, levels in ((8, 127), (4, 7)):
        code, scale = quantize(weight, bits)
        assert code.numel() == weight.numel() * bits // 8
        error = (dequantize(code, scale, bits) - weight).abs().unflatten(-1, (-1, 32)).amax(-1)
        largest = weight.abs().unflatten(-1, (-1, 32)).amax(-1)
        assert (error <= largest / levels * 0.51 + 1e-3 * largest).all()
    with pytest.raises(ConfigError, match="multiple of 32"):
        quantize(torch.ones(2, 40), 8)
    with pytest.raises(ConfigError, match="8 or 4"):
        DequantTier([], 3)


class Flaky(MemoryTier):
    """Fails the first ``times`` loads of each expert."""

    def __init__(self, pools, times: int) -> None:
        super().__init__(pools)
        self.times, self.seen = times, {}

    def load(self, expert, slot) -> Iterator[None]:
        self.seen[expert] = self.seen.get(expert, 0) + 1
        if self.seen[expert] <= self.times:
            slot[0].fill_(float("nan"))  # what was written of it must not be used
            raise OSError("the disk has coughed")
        yield from super().load(expert, slot)


def weights_of(model: Decoder) -> list:
    return [(pool.w13, pool.w2) for pool in find_pools(model).pools]


def test_a_failed_load_is_tried_again(model, expected) -> None:
    engine = offload(model, quarter(model), tier=Flaky(weights_of(model), 1))
    engine.mover.retry_s = 1e-4
    assert generate(model, prompts(), GREEDY) == expected[1]
    assert engine.stats().counters["expert_retries"] > 0
    engine.restore()


def test_a_load_that_keeps_failing_is_an_error_and_what_comes_after_is_right(model, expected) -> None:
    tier = Flaky(weights_of(model), 10**9)
    engine = offload(model, quarter(model), tier=tier)
    engine.mover.retry_s = 1e-4
    with pytest.raises(DataError, match=r"could not be loaded: the disk has coughed"):
        generate(model, prompts(), GREEDY)
    tier.times = 0
    assert generate(model, prompts(), GREEDY) == expected[1]
    engine.restore()


def test_a_pass_that_is_broken_off_leaves_the_engine_usable(model, expected) -> None:
    engine = offload(model, quarter(model))
    hook = model.blocks[2].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with torch.inference_mode(), pytest.raises(KeyboardInterrupt):
        model(TOKENS)
    hook.remove()
    pool = model.blocks[1].feed_forward.experts
    run, pool._run = pool._run, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt())  # within a layer
    with torch.inference_mode(), pytest.raises(KeyboardInterrupt):
        model(TOKENS)
    pool._run = run
    assert generate(model, prompts(), GREEDY) == expected[1]
    engine.restore()


def test_a_broken_thread_is_told_at_once(model) -> None:
    class Broken(MemoryTier):
        def load(self, expert, slot):
            raise KeyError("a mistake of ours")

    engine = offload(model, quarter(model), tier=Broken(weights_of(model)))
    with torch.inference_mode(), pytest.raises(DataError, match="no longer loaded"):
        model(TOKENS)
    engine.restore()


def test_closed_engines_refuse(model) -> None:
    before = threading.active_count()
    engine = offload(model, quarter(model))
    engine.close()
    engine.close()
    assert threading.active_count() == before
    with torch.inference_mode(), pytest.raises(DataError, match="closed"):
        model(TOKENS)
    engine.restore()


def test_what_cannot_be_offloaded_is_refused(model) -> None:
    least = find_pools(model).layout.least_bytes()
    assert least == 2 * 3 * 32 * 32 * 4
    with pytest.raises(ConfigError, match=f"give at least {least:,}"):
        offload(model, least - 1)
    with pytest.raises(ConfigError, match="no layers of experts"):
        offload(make_model(SwiGLU.Config(hidden_dim=48)), "1MB")
    with pytest.raises(ConfigError, match="no tier 'tape'"):
        offload(model, "1MB", tier="tape")
    with pytest.raises(ConfigError, match="such as 2GiB"):
        offload(model, "many")


@pytest.mark.parametrize("save", [save_model, export_huggingface])
def test_a_model_is_loaded_without_its_experts(model, expected, save, tmp_path: Path) -> None:
    save(tmp_path / "m", model)
    again, tokenizer, engine = load_offloaded(tmp_path / "m", quarter(model), drop_cache=True)
    assert tokenizer is None
    assert generate(again, prompts(), GREEDY) == expected[1]
    held = sum(weight.nbytes for weight in again.parameters()) + engine.arena.bytes
    assert held < sum(weight.nbytes for weight in model.parameters()) - find_pools(model).layout.total_bytes * 0.7
    with pytest.raises(ConfigError, match="nothing to restore"):
        engine.restore()
    engine.close()


def test_stored_experts_are_converted_on_the_way(model, tmp_path: Path) -> None:
    save_model(tmp_path / "m", model)
    again, _, engine = load_offloaded(tmp_path / "m", quarter(model), dtype=torch.bfloat16)
    whole = make_model().to(torch.bfloat16)
    whole.load_state_dict(model.to(torch.bfloat16).state_dict())
    model.to(torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(again(TOKENS).logits_BLV, whole(TOKENS).logits_BLV)
    engine.close()


def test_a_truncated_file_is_an_error(model, tmp_path: Path) -> None:
    engine = offload(make_model(), quarter(model), tier="file", folder=tmp_path)
    file = tmp_path / "experts.bin"
    with file.open("r+b") as opened:
        opened.truncate(1000)
    engine.mover.retry_s = 1e-4
    with torch.inference_mode(), pytest.raises(DataError, match="truncated"):
        engine.model(TOKENS)
    engine.close()
    with pytest.raises(CheckpointError, match="no model"):
        load_offloaded(tmp_path / "none", "1MB")


def test_a_throttled_tier_takes_its_time() -> None:
    slept: list[float] = []
    tier = ThrottledTier(
        MemoryTier([(torch.ones(1, 4, 2), torch.ones(1, 2, 2))]), 0.5, sleep=slept.append, clock=lambda: 0.0
    )
    slot = (torch.zeros(4, 2), torch.zeros(2, 2))
    list(tier.load(Expert(0, 0), slot))
    assert slept == [0.5 * 4 * (8 + 4)]
    assert slot[0].sum() == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_cuda_tier_needs_a_device(model) -> None:
    with pytest.raises(BackendError, match="no CUDA device"):
        CudaTier(MemoryTier(weights_of(model)))


def test_the_hook_of_an_engine_tells_what_each_request_reads(model) -> None:
    seen = []
    engine = offload(model, quarter(model), predictor="tlp")
    assert engine.predictor is not None
    inner = engine.predictor.predict
    engine.predictor.predict = lambda token_T, rows: (
        seen.append([(row.key, row.ids.tolist(), row.num_new, row.prompt_length) for row in rows])
        or inner(token_T, rows)
    )
    request = Request(id="a", prompt=(1, 2, 3, 4))

    def run(step: int, tokens: tuple[int, ...], start: int, **more) -> None:
        batch = Batch(step=step, chunks=(Chunk(id="a", tokens=tokens, start=start, blocks=(0,), samples=True),), **more)
        engine.before_step(batch, tokens)
        with torch.inference_mode():
            model(torch.tensor([tokens]))
        engine.after_step(batch, [])

    run(0, (1, 2), 0, new=(request,))
    run(1, (3, 4), 2)
    run(2, (9,), 4)
    assert seen == [[("a", [1, 2], 2, 4)], [("a", [1, 2, 3, 4], 2, 4)], [("a", [1, 2, 3, 4, 9], 1, 4)]]
    assert engine.predictor._last["a"].keys() == {0, 1, 2, 3}
    engine.before_step(Batch(step=3, chunks=(), gone=("a",)), ())
    assert not engine.predictor._last
    engine.restore()


def test_prometheus_text_has_every_layer(model) -> None:
    engine = offload(model, quarter(model))
    generate(model, prompts(), GREEDY)
    text = engine.prometheus()
    by_layer = engine.by_layer()
    for layer in range(4):
        assert f'anabranch_expert_misses_total{{layer="{layer}"}} {by_layer[layer]["misses"]}' in text
    assert f"anabranch_expert_budget_bytes {engine.budget_bytes}" in text
    counters = engine.stats().counters
    assert counters["expert_misses"] == sum(values["misses"] for values in by_layer)
    for name in ("hits", "late", "prefetched_unused", "bytes_moved", "stall_s"):
        assert f"expert_{name}" in counters
    engine.restore()
