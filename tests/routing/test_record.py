"""Recording from outside: what is noted equals what the routers returned, and nothing stays behind."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from anabranch.errors import ConfigError, DataError
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import Routing
from anabranch.routing.destinations import Destinations
from anabranch.routing.record import record_routing
from anabranch.routing.router import Router
from anabranch.routing.select import TopK
from anabranch.routing.trace import RoutingTrace

D, E, K = 6, 5, 2


class Tower(nn.Module):
    """Routers one after another, over the same items."""

    def __init__(self, num_layers=2, recompute=False, **router):
        super().__init__()
        config = Router.Config(select=TopK.Config(top_k=K))
        generator = torch.Generator().manual_seed(0)
        self.routers = nn.ModuleList(
            Router(config, D, E, layer=2 * n, generator=generator, **router) for n in range(num_layers)
        )
        self.recompute = recompute

    def forward(self, x_ND, context):
        for router in self.routers:
            x_ND = (
                checkpoint(self.block, router, x_ND, context, use_reentrant=False)
                if self.recompute
                else self.block(router, x_ND, context)
            )
        return x_ND

    def block(self, router, x_ND, context):
        routing = router(x_ND, context)
        return x_ND * routing.weight_NK.sum(-1, keepdim=True)  # a product, so recompute must pass the router


def items(num=6, seed=0):
    return torch.randn(num, D, generator=torch.Generator().manual_seed(seed))


def test_trace_equals_what_the_routers_return():
    model, x_ND = Tower(num_layers=1), items()
    with record_routing(model) as recorder:
        recorder.domain = "code"
        recorder.tokens = torch.arange(6).view(2, 3)
        model(x_ND, RoutingContext(sequence_length=3))
        recorder.domain, recorder.tokens = None, None
        model(x_ND.flip(0), RoutingContext())
    trace = recorder.trace()
    assert [(layer.layer, layer.name, layer.num_destinations, layer.top_k) for layer in trace.layers] == [
        (0, "routers.0", E, K)
    ]
    expected = [model.routers[0](x, RoutingContext()) for x in (x_ND, x_ND.flip(0))]
    assert torch.equal(trace.routing(0).index_NK, torch.cat([routing.index_NK for routing in expected]))
    assert torch.equal(trace.routing(0).weight_NK, torch.cat([routing.weight_NK for routing in expected]))
    decided = trace.decisions(0)
    assert decided.item_N.tolist() == [
        0,
        0,
        0,
        1,
        1,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
    ]  # two sequences of 3, then items on their own
    assert decided.position_N.tolist() == [0, 1, 2] * 2 + [0] * 6
    assert decided.token_N.tolist() == [0, 1, 2, 3, 4, 5] + [-1] * 6
    assert decided.domain_N.tolist() == [0] * 6 + [-1] * 6


def test_ids_of_the_context_and_padding():
    model, x_ND = Tower(), items(4)
    mask_N = torch.tensor([True, False, True, True])
    state = {
        "item_N": torch.tensor([9, 0, 8, 8]),
        "position_N": torch.tensor([5, 0, 1, 2]),
        "token_N": torch.tensor([4, 3, 2, 1]),
    }
    with record_routing(model) as recorder:
        model(x_ND, context=RoutingContext(item_mask_N=mask_N, state=state))
    for _, decided in recorder.trace():
        assert decided.item_N.tolist() == [9, 8, 8]
        assert decided.position_N.tolist() == [5, 1, 2]
        assert decided.token_N.tolist() == [4, 2, 1]
    assert recorder.trace().layers[1].layer == 2


@dataclass(kw_only=True)
class SequenceContext(RoutingContext):
    """As a language model's: positions and tokens in batch form."""

    position_BL: torch.Tensor
    token_BL: torch.Tensor


def test_cached_decoding_goes_on_with_the_same_sequences():
    model = Tower(num_layers=1)
    with record_routing(model) as recorder:
        for _ in range(2):  # two batches of two sequences: two positions at once, then one by one
            for positions in ([0, 1], [2], [3]):
                position_BL = torch.tensor([positions] * 2)
                context = SequenceContext(
                    position_BL=position_BL, token_BL=position_BL + 7, sequence_length=len(positions)
                )
                model(items(position_BL.numel()), context)
    decided = recorder.trace().decisions(0)
    assert decided.item_N.tolist() == [0, 0, 1, 1, 0, 1, 0, 1, 2, 2, 3, 3, 2, 3, 2, 3]
    assert decided.position_N.tolist() == [0, 1, 0, 1, 2, 2, 3, 3] * 2
    assert (decided.token_N == decided.position_N + 7).all()


def test_what_the_caller_calls_a_repetition_is_not_recorded_again():
    model, mask_N = Tower(num_layers=1), torch.tensor([True, True, True, False])
    with record_routing(model) as recorder:
        recorder.domain = ["code"] * 4
        model(items(4), RoutingContext(state={"repeated_N": torch.tensor([True, False, False, False])}))
        model(
            items(4),
            RoutingContext(state={"repeated_N": torch.tensor([False, True, False, False])}, item_mask_N=mask_N),
        )
        model(items(4), RoutingContext(state={"repeated_N": torch.ones(4, dtype=torch.bool)}))
    assert recorder.trace().decisions(0).item_N.tolist() == [1, 2, 3, 4, 6]


def test_threads_that_share_a_model_are_recorded_one_after_the_other():
    model, inside = Tower(num_layers=1), threading.Lock()

    def read(router, routing):
        assert inside.acquire(blocking=False), "two decisions are noted at once"
        time.sleep(0.002)
        inside.release()
        return routing

    with record_routing(model, read=read) as recorder, ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: model(items(), RoutingContext()), range(8)))
    assert recorder.trace().decisions(0).item_N.tolist() == [*range(8 * 6)]


def test_a_domain_for_each_sequence():
    model, mask_N = Tower(num_layers=1), torch.tensor([True] * 5 + [False])
    with record_routing(model) as recorder:
        recorder.domain = ["code", None, "books"]
        model(items(), RoutingContext(sequence_length=2, item_mask_N=mask_N))
        recorder.domain = ["code"] * 4
        with pytest.raises(DataError, match="has 4 names for 6 items"):
            model(items(), RoutingContext(sequence_length=2))
    trace = recorder.trace()
    assert [trace.domains[code] if code >= 0 else None for code in trace.decisions(0).domain_N] == ["code"] * 2 + [
        None
    ] * 2 + ["books"]


def test_scores_are_kept_where_asked(tmp_path):
    model, x_ND = Tower(num_layers=1), items()
    mask_N = torch.tensor([True, False, True, True, True, True])
    with record_routing(model, scores=True) as kept, record_routing(model, path=tmp_path / "t", scores=True):
        for _ in range(2):
            model(x_ND, RoutingContext(item_mask_N=mask_N))
    expected = model.routers[0](x_ND, RoutingContext(item_mask_N=mask_N))
    for trace in (kept.trace(), RoutingTrace.read(tmp_path / "t")):
        assert torch.equal(trace.routing(0).score_NE, expected.score_NE[mask_N].repeat(2, 1))
        assert trace.table["propensity"].null_count == len(trace)  # nothing was drawn


def test_weights_of_double_precision_are_known_to_be_rounded():
    model = Tower(num_layers=1).double()
    with record_routing(model) as recorder:
        model(items().double(), RoutingContext())
    assert recorder.trace().layers[0].weight_dtype == "float64"


def test_a_router_that_is_visited_twice_in_a_pass_sees_the_same_items_again():
    model = Tower(num_layers=2)
    first, last = model.routers
    with record_routing(model) as recorder:
        for seed in range(2):
            context = RoutingContext(sequence_length=3)
            for router in (first, last, first):
                router(items(seed=seed), context)
    numbers = [[0, 0, 0, 1, 1, 1], [2, 2, 2, 3, 3, 3]]
    trace = recorder.trace()
    assert trace.decisions(0).item_N.tolist() == [*numbers[0] * 2, *numbers[1] * 2]
    assert trace.decisions(2).item_N.tolist() == [*numbers[0], *numbers[1]]


def test_a_router_that_was_skipped_numbers_its_items_as_the_others_do():
    model = Tower(num_layers=2)
    first, last = model.routers
    with record_routing(model) as recorder:
        for path in ((first,), (last, first), (last,)):
            context = RoutingContext(sequence_length=3)
            for router in path:
                router(items(), context)
    trace = recorder.trace()
    assert trace.decisions(0).item_N.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert trace.decisions(2).item_N.tolist() == [2] * 3 + [3] * 3 + [4] * 3 + [5] * 3


@dataclass(kw_only=True)
class RowsContext(RoutingContext):
    """Of some sequences of a batch."""

    rows: list[int]


def test_sequences_of_a_batch_that_go_on_alone_keep_their_numbers():
    model = Tower(num_layers=2)
    first, last = model.routers
    with record_routing(model) as recorder:
        for _ in range(2):
            whole = RoutingContext(sequence_length=2)
            first(items(6), whole)
            for rows in ([2, 0], [1]):
                last(items(2 * len(rows)), RowsContext(rows=rows, sequence_length=2, memo=whole.memo))
    trace = recorder.trace()
    assert trace.decisions(0).item_N.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert trace.decisions(2).item_N.tolist() == [2, 2, 0, 0, 1, 1, 5, 5, 3, 3, 4, 4]


def test_nothing_stays_behind():
    model = Tower()
    with (
        pytest.warns(UserWarning, match="heard none of the 2 routers of this Tower"),
        record_routing(model) as recorder,
    ):
        assert all(router._forward_hooks for router in model.routers)
    with pytest.raises(ZeroDivisionError), record_routing(model):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in model.modules())
    model(items(), RoutingContext())
    assert len(recorder.trace()) == 0


def test_recording_changes_no_output_and_no_gradient():
    model, x_ND = Tower(), items().requires_grad_()
    (plain,) = torch.autograd.grad(model(x_ND, RoutingContext()).square().sum(), x_ND)
    with record_routing(model):
        (recorded,) = torch.autograd.grad(model(x_ND, RoutingContext()).square().sum(), x_ND)
    assert torch.equal(plain, recorded)


def test_activation_recompute_is_recorded_once():
    model = Tower(recompute=True)
    with record_routing(model) as recorder:
        model(items().requires_grad_(), RoutingContext()).sum().backward()
    assert recorder.trace().load_LE().sum(1).tolist() == [6 * K, 6 * K]


@pytest.mark.parametrize("when", ["before", "inside", "called before"])
def test_compiled_models_are_recorded(when):
    torch.compiler.reset()
    model, x_ND = Tower(), items()
    expected = model(x_ND, RoutingContext())
    compiled = torch.compile(model, backend="aot_eager") if when != "inside" else None
    if when == "called before":  # its graph exists, without hooks
        compiled(x_ND, RoutingContext())
    with record_routing(model) as recorder:
        compiled = torch.compile(model, backend="aot_eager") if compiled is None else compiled
        assert torch.equal(compiled(x_ND, RoutingContext()), expected)
    assert recorder.trace().load_LE().sum(1).tolist() == [6 * K, 6 * K]
    compiled(x_ND, RoutingContext())
    assert recorder.trace().load_LE().sum(1).tolist() == [6 * K, 6 * K]
    torch.compiler.reset()


def test_bf16_weights_are_kept_exactly():
    model = Tower(num_layers=1).bfloat16()
    with record_routing(model) as recorder:
        model(items().bfloat16(), RoutingContext())
    weight_NK = model.routers[0](items().bfloat16(), RoutingContext()).weight_NK
    assert torch.equal(recorder.trace().routing(0).weight_NK, weight_NK.float())


def test_streamed_recording_equals_the_one_in_memory(tmp_path):
    model = Tower(destinations=Destinations("group0", own_start=2))
    with record_routing(model) as kept, record_routing(model, path=tmp_path / "t.parquet") as streamed:
        for seed in range(3):
            kept.domain = streamed.domain = f"domain {seed % 2}"
            model(items(seed=seed), RoutingContext())
    assert RoutingTrace.read(tmp_path / "t.parquet").table.to_pydict() == kept.trace().table.to_pydict()
    assert streamed.trace().layers == kept.trace().layers
    assert (kept.trace().layers[0].pool, kept.trace().layers[0].own_start) == ("group0", 2)


def test_routers_that_claim_one_layer_are_numbered():
    model = Tower()
    for router in model.routers:
        router.layer = 7
    with record_routing(model) as recorder:
        model(items(), RoutingContext())
    assert [(layer.layer, layer.name) for layer in recorder.trace().layers] == [(0, "routers.0"), (1, "routers.1")]


class ForeignGate(nn.Module):
    """A router as other libraries write them: logits, weights and indices in a tuple, no context."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, E, bias=False)

    def forward(self, x_ND):
        logit_NE = self.linear(x_ND)
        weight_NK, index_NK = logit_NE.softmax(-1).topk(K)
        return logit_NE, weight_NK, index_NK


def test_a_foreign_model_is_recorded_from_outside():
    model = nn.Sequential(ForeignGate())
    with record_routing(
        model,
        routers={"gate": model[0]},
        read=lambda gate, output: Routing(output[2], output[1], output[0].softmax(-1)),
    ) as recorder:
        _, weight_NK, index_NK = model(items())
    assert torch.equal(recorder.trace().routing(0).index_NK, index_NK)
    assert torch.equal(recorder.trace().routing(0).weight_NK, weight_NK)
    assert recorder.trace().layers[0].name == "gate"


def test_messages():
    with pytest.raises(ConfigError, match="Linear has no Router to record"), record_routing(nn.Linear(2, 2)):
        pass
    model = nn.Sequential(ForeignGate())
    with (
        pytest.raises(ConfigError, match="Linear returned Tensor, not a Routing, nor logits, weights and indices"),
        record_routing(model, routers={"gate": model[0].linear}),
    ):
        model(items())
    tower = Tower()
    with record_routing(tower) as recorder:
        recorder.tokens = torch.tensor([1, 2])
        with pytest.raises(DataError, match="has 2 tokens, but the forward pass routes 6 items"):
            tower(items(), RoutingContext())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Olmoe", "Mixtral", "Qwen3Moe"])
def test_a_transformers_model_is_recorded_from_outside(family):
    """Choices equal the top k of the logits that the model returns; sequences and padding are as the recorder is told."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2, "head_dim": 8}
    sizes |= {"eos_token_id": 0, "bos_token_id": 1, "pad_token_id": 2}
    sizes |= {"num_local_experts" if family == "Mixtral" else "num_experts": 6, "moe_intermediate_size": 8}
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes)).eval()
    token_BL = torch.randint(32, (3, 10), generator=torch.Generator().manual_seed(0))
    mask_BL = torch.ones_like(token_BL, dtype=torch.bool)
    mask_BL[1, 7:] = False
    with record_routing(model) as recorder, torch.no_grad():
        recorder.tokens, recorder.mask, recorder.domain = token_BL, mask_BL, ["a", "b", "a"]
        output = model(token_BL, attention_mask=mask_BL, output_router_logits=True)
    trace = recorder.trace()
    assert [layer.num_destinations for layer in trace.layers] == [6, 6]
    for layer, logit_NE in enumerate(output.router_logits):
        decisions = trace.decisions(layer)
        expected_NK = logit_NE.topk(2).indices[mask_BL.flatten()]
        assert np.array_equal(np.sort(decisions.index_NK, 1), expected_NK.sort(1).values.numpy())
        assert decisions.item_N.tolist() == [0] * 10 + [1] * 7 + [2] * 10
        assert decisions.position_N.tolist() == [*range(10), *range(7), *range(10)]
        assert decisions.token_N.tolist() == token_BL[mask_BL].tolist()
    assert trace.domains == ["a", "b"]


def test_a_mask_of_another_size_is_refused():
    model = nn.Sequential(ForeignGate())
    with record_routing(model, routers={"gate": model[0]}) as recorder:
        model(items())
        recorder.mask = torch.ones(2, 4, dtype=torch.bool)
        with pytest.raises(DataError, match=r"recorder.mask has 8 places, but the forward pass routes 6 items"):
            model(items())
    assert len(recorder.trace().decisions(0).item_N) == 6
