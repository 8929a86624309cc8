"""Replay of what generation recorded: the same tokens again, to the bit; and training on rollouts, with the experts of the rollout."""

import pytest
import torch

from anabranch.errors import DataError
from anabranch.experts.chain import Chain
from anabranch.experts.parscale import ParScale
from anabranch.experts.rexmoe import ReXMoE
from anabranch.lm import Decoder, SamplingConfig, generate
from anabranch.nn import MoE, SelfAttention
from anabranch.registry import resolve
from anabranch.routing import LinearScore, Router, RoutingTrace, TopK, record_routing, replay_routing

PROMPTS = [[7], [1, 2, 3, 4, 5, 6], [8, 9, 10], [11, 12]]
ROUTER = Router.Config(score=LinearScore.Config(init_std=0.5), select=TopK.Config(top_k=2))
RECURRENT = Router.Config(score=resolve("score", "recurrent").Config(state_dim=8, init_std=0.5))


def make(layer=MoE, streams=None, seed=0, router=ROUTER, **options):
    return Decoder.Config(
        vocab_size=31,
        dim=16,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=4),
        feed_forward=layer.Config(num_experts=4, hidden_dim=8, router=router, **options),
        streams=streams,
        init_std=0.3,
    ).build(seed=seed)


DESIGNS = {
    "moe": {},
    "recurrent": {"router": RECURRENT},
    "rexmoe": {"layer": ReXMoE, "reuse": 2},
    "chain": {"layer": Chain},
    "chain of one gate over a pool": {"layer": Chain, "independent_gates": False, "reuse": 2, "iterations": 3},
    "streams": {"streams": ParScale.Config(num_streams=2, prefix_len=2)},
}


def other_routers(model, seed=1):
    """The same model with routers that would choose otherwise."""
    model = model.config.build(seed=0)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, Router):
            with torch.no_grad():
                module.score.weight.copy_(torch.randn(module.score.weight.shape, generator=generator))
    return model


@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
def test_batched_generation_is_replayed_while_rows_finish_and_leave(design, tmp_path):
    model = make(**design)
    free = generate(model, PROMPTS, SamplingConfig(temperature=0.0, max_tokens=9))
    stop = next(token for token in free[1] if token not in free[1][:2])
    sampling = SamplingConfig(temperature=0.0, max_tokens=9, stop=(stop,))
    with record_routing(model) as recorder:
        expected = [generate(model, PROMPTS, sampling), generate(model, PROMPTS[::-1], sampling)]
    assert len({len(row) for row in expected[0]}) > 1
    recorder.trace().write(tmp_path / "t.parquet")
    trace = RoutingTrace.read(tmp_path / "t.parquet")
    blind = other_routers(model)
    with replay_routing(blind, trace), record_routing(blind) as again:
        assert [generate(blind, PROMPTS, sampling), generate(blind, PROMPTS[::-1], sampling)] == expected
    assert again.trace().table.equals(trace.table)
    assert generate(blind, PROMPTS, sampling) != expected[0]


def decided_at(trace):
    """{(layer, item, position): destinations} of a trace."""
    found = {}
    for layer, decided in trace:
        columns = decided.item_N, decided.position_N, decided.index_NK
        for item, position, index_K in zip(*(column.tolist() for column in columns), strict=True):
            assert found.setdefault((layer.layer, item, position), index_K) is index_K
    return found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
def test_training_on_rollouts_takes_the_experts_of_the_rollout(design, recompute):
    """Prompts of any lengths, padded on the left in the rollout, each a training pass; where a sequence has several streams, a batch."""
    model = make(**design)
    prompts = PROMPTS if model.streams is None else [[1, 2, 3], [4, 5, 6]]
    with record_routing(model) as recorder:
        made = generate(model, prompts, SamplingConfig(temperature=0.0, max_tokens=5))
    texts = [prompt + tokens for prompt, tokens in zip(prompts, made, strict=True)]
    batches = [[text] for text in texts] if model.streams is None else [texts]
    learner = other_routers(model).train()
    learner.recompute = recompute
    with replay_routing(learner, recorder.trace(), weights="own"), record_routing(learner) as again:
        for batch in batches:
            token_BL = torch.tensor(batch)
            learner(token_BL[:, :-1], token_BL[:, 1:]).loss.backward()
    assert decided_at(again.trace()) == decided_at(recorder.trace())
    assert all(module.score.weight.grad.abs().sum() > 0 for module in learner.modules() if isinstance(module, Router))


def test_shuffled_rollouts_are_found_by_the_items_they_say_they_are():
    model = make()
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    with record_routing(model) as recorder:
        made = generate(model, prompts, SamplingConfig(temperature=0.0, max_tokens=4))
    token_BL = torch.tensor([prompt + tokens for prompt, tokens in zip(prompts, made, strict=True)])[:, :-1]
    with replay_routing(model, recorder.trace()):
        expected_BLV = model(token_BL).logits_BLV
        for order in ([2, 0], [1], [0, 1, 2]):  # epochs of any batches
            state = {"item_N": torch.tensor(order).repeat_interleave(token_BL.shape[1])}
            torch.testing.assert_close(model(token_BL[order], state=state).logits_BLV, expected_BLV[order])
        with pytest.raises(DataError, match="no decision of item 3 at position 0"):
            model(token_BL)


@pytest.mark.parametrize("batch", [1, 3])
def test_longer_passes_than_were_recorded_are_told(batch):
    model = make()
    with record_routing(model) as recorder:
        model(torch.tensor([[1, 2, 3]] * batch))
    missing = rf"item 0 at position 3 .* {4 * batch} items it lacks {batch}\."
    with replay_routing(model, recorder.trace()), pytest.raises(DataError, match=missing):
        model(torch.tensor([[1, 2, 3, 4]] * batch))
