"""A budget for the adapters of mixtures beside matrices: they come from memory or a file, and outputs are the same to the bit."""

import json

import pytest
import torch

from adapter_models import TOKENS as ROWS
from adapter_models import linear_layers, make_adapter, make_base
from anabranch.adapters import load_mixture, load_pool, rows_for
from anabranch.adapters.offloaded import OffloadedLowRank
from anabranch.adapters.pool import LowRankPool
from anabranch.adapters.side_by_side import is_mostly_used
from anabranch.cli.main import main
from anabranch.data import ByteTokenizer
from anabranch.errors import ConfigError, DataError
from anabranch.lm import Decoder, SamplingConfig, generate, load_model, save_model
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.nn.weight_kinds import numbers_of_kinds
from anabranch.routing import Router, Routing, TopK, record_routing
from anabranch.serving import LLM, Sampling
from anabranch.serving.expertflow import find_pools, load_offloaded, offload
from anabranch.serving.expertflow.pools import pools_of

VOCAB = 257
TOKENS = torch.arange(24).view(3, 8) * 7 % VOCAB
GREEDY = SamplingConfig(max_tokens=6, temperature=0.0)


def mixture(seed=0):
    """Twelve adapters of other ranks beside q, k and v, which share a router, and others beside down; two of them for a token."""
    from anabranch.adapters import MixedLowRank
    from anabranch.adapters.put_on import put_on

    config = Decoder.Config(
        vocab_size=VOCAB,
        dim=32,
        num_layers=2,
        max_positions=128,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
        feed_forward=SwiGLU.Config(hidden_dim=48),
        init_std=0.2,
    )
    router = Router.Config(select=TopK.Config(top_k=2, normalize="sum"), balance=())
    ranks = (2, 4, 3, 2, 4, 4, 1, 2, 3, 4, 2, 2)
    model = put_on(
        config.build(seed=seed),
        {
            "*.attention.[qkv]": MixedLowRank.Config(ranks=ranks, router_group="qkv", router=router),
            "*.down": MixedLowRank.Config(ranks=ranks, router=router),
        },
        seed=1,
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for pool in (module for module in model.modules() if isinstance(module, LowRankPool)):
            for adapter, rank in enumerate(pool.ranks):
                pool.b[adapter, :, :rank] = torch.randn(pool.out_dim, rank, generator=generator) * 0.5
    return model.eval().requires_grad_(False)


@pytest.fixture
def model():
    return mixture()


def logits(model):
    with torch.inference_mode():
        return model(TOKENS).logits_BLV


def quarter(model):
    return pools_of(model).layout.total_bytes // 4


@pytest.mark.parametrize("tier", ["memory", "file"])
@pytest.mark.parametrize("policy", ["plec", "lru", "lfu", "random", "lru_ahead", "belady"])
def test_outputs_are_the_same_to_the_bit_and_bytes_within_the_budget(model, policy, tier):
    wanted, tokens, most = logits(model), generate(model, TOKENS[:, :3].tolist(), GREEDY), []
    with offload(
        model, quarter(model), policy=policy, tier=tier, keep=True, audit=lambda *event: most.append(event[3])
    ) as engine:
        assert torch.equal(logits(model), wanted)
        assert generate(model, TOKENS[:, :3].tolist(), GREEDY) == tokens
        assert engine.arena.bytes <= engine.budget_bytes
        assert max(most) <= engine.budget_bytes
        assert engine.predictor is None
        counters = engine.stats().counters
        assert counters["expert_evictions"] > 0
        assert counters["expert_hits"] > 0
        assert not any(name.endswith((".pool.a", ".pool.b")) for name in model.state_dict())
        assert sum(isinstance(module, OffloadedLowRank) for module in model.modules()) == 8
    assert torch.equal(logits(model), wanted)
    assert not any(isinstance(module, OffloadedLowRank) for module in model.modules())


def test_where_all_are_used_and_few_are_in_memory_they_are_taken_in_turns(model):
    """At once they are only where there is a slot for each."""
    pool = model.blocks[0].feed_forward.w2.beside.down.pool
    everybody = torch.arange(12).expand(5, 12)
    routing = Routing(everybody, torch.full((5, 12), 0.25), torch.zeros(5, 12))
    x_NC = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    assert is_mostly_used(routing, is_compiled=True)
    with torch.inference_mode():
        wanted = pool(x_NC, routing)
        with offload(model, quarter(model), keep=True):
            few = model.blocks[0].feed_forward.w2.beside.down.pool
            assert len(few._slots()[0]) < 12
            torch.testing.assert_close(few(x_NC, routing), wanted)


def test_the_smallest_budget_is_one_adapter_of_each_size_and_less_is_refused(model):
    wanted, least = logits(model), pools_of(model).layout.least_bytes()
    # q, k and v, down: A [4, C] and B [O, 4].
    assert least == 4 * 4 * ((32 + 32) + (32 + 16) + (48 + 32))
    with pytest.raises(ConfigError, match=f"give at least {least:,}"):
        offload(model, least - 1)
    with offload(model, least) as engine:
        assert torch.equal(logits(model), wanted)
        assert engine.cache.num_slots == [1, 1, 1]


def test_the_least_recently_used_leaves(model):
    order, kinds, left, made = {}, pools_of(model).layout.kind_of_pool, [], []

    def note(event, expert, *_):
        own = order.setdefault(kinds[expert.pool], {})
        if event == "used":
            own.pop(expert, None)
            own[expert] = None
        elif event == "evicted":
            left.append(expert)
            # What the layer is about to use stays.
            assert expert == next(one for one in own if one not in made[0].cache.wanted)
            del own[expert]

    with offload(model, quarter(model), policy="lru", audit=note) as engine:
        made.append(engine)
        logits(model)
    assert left


def test_what_cannot_be_is_refused(model, tmp_path):
    for tier in ("int8", "int4"):
        with pytest.raises(ConfigError, match="and the experts are adapters of a mixture; use 'memory' or 'file'"):
            offload(model, "1MB", tier=tier)
    for policy in ("cache_moe", "se_moe"):
        with pytest.raises(ConfigError, match=r"divides its room among layers; adapters of a mixture share it"):
            offload(model, "1MB", policy=policy)
    with pytest.raises(ConfigError, match="nobody predicts which adapters of a mixture are wanted; leave it out"):
        offload(model, "1MB", predictor="tlp")
    with pytest.raises(ConfigError, match="has no layers of experts"):
        find_pools(model)
    save_model(tmp_path / "m", model, ByteTokenizer())
    with pytest.raises(ConfigError, match=r"leave out the budget, or the few bits \(--quantize none\)"):
        load_offloaded(tmp_path / "m", "1MB", quantize="int8")


def test_a_model_is_loaded_without_its_adapters(model, tmp_path):
    save_model(tmp_path / "m", model, ByteTokenizer())
    whole, _ = load_model(tmp_path / "m")
    again, tokenizer, engine = load_offloaded(tmp_path / "m", quarter(model), drop_cache=True)
    assert tokenizer is not None
    assert torch.equal(logits(again), logits(whole.eval()))
    held = sum(weight.nbytes for weight in again.parameters()) + engine.arena.bytes
    assert held < sum(weight.nbytes for weight in model.parameters()) - pools_of(model).layout.total_bytes * 0.7
    assert numbers_of_kinds(again) == numbers_of_kinds(whole)
    engine.close()


def test_adapters_are_read_in_the_type_of_the_model(model, tmp_path):
    save_model(tmp_path / "m", model, ByteTokenizer())
    whole, _ = load_model(tmp_path / "m", dtype=torch.bfloat16)
    again, _, engine = load_offloaded(tmp_path / "m", quarter(model) // 2, dtype=torch.bfloat16)
    torch.testing.assert_close(logits(again), logits(whole.eval()))
    engine.close()


def test_what_routers_decide_is_recorded_as_in_memory(model):
    with record_routing(model) as recorder:
        logits(model)
    wanted = recorder.trace()
    with offload(model, quarter(model)), record_routing(model) as recorder:
        logits(model)
    assert recorder.trace().table.equals(wanted.table)


def test_a_pool_that_rows_choose_from_and_an_imported_mixture_have_a_budget_too(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    for name in "abcd":
        make_adapter(tmp_path / name, linear_layers(base, ["q_proj", "v_proj"]), seed=name, rank=ord(name) - 95)
    folders = {name: tmp_path / name for name in "abcd"}
    pool = load_pool(folders, load_model(tmp_path / "base")[0].eval())
    told = rows_for(pool, ["d", {"a": 0.5, "c": 2.0}], ROWS.shape[1])
    for model, state in ((pool, told), (load_mixture(folders, load_model(tmp_path / "base")[0].eval(), top_k=1), None)):
        with torch.inference_mode():
            wanted = model(ROWS, state=state).logits_BLV
            with offload(model, pools_of(model).layout.least_bytes(), tier="file", keep=True) as engine:
                assert torch.equal(model(ROWS, state=state).logits_BLV, wanted)
                assert engine.stats().counters["expert_evictions"] > 0


def test_a_file_that_ends_early_is_an_error(model, tmp_path):
    engine = offload(model, quarter(model), tier="file", folder=tmp_path)
    with (tmp_path / "experts.bin").open("r+b") as file:
        file.truncate(500)
    engine.mover.retry_s = 1e-4
    with pytest.raises(DataError, match="of routed layer 0 could not be loaded"):
        logits(model)
    engine.close()


# Through the front door

# Of all adapters.
QUARTER = "22KiB"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("mixture") / "m"
    save_model(place, mixture(), ByteTokenizer())
    return place


def said(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    found = capsys.readouterr()
    assert code == 0, found.err
    return json.loads(found.out)


def test_generate_with_a_budget_says_the_same_tokens(folder, capsys):
    line = ["generate", folder, "--prompt", "def ", "--max-tokens", 20, "--temperature", 0, "--json"]
    wanted = said(capsys, *line)["token_ids"]
    assert len(set(wanted)) > 1
    assert said(capsys, *line, "--expert-budget", QUARTER)["token_ids"] == wanted


def test_a_served_engine_with_a_budget_gives_the_same_scores(folder):
    """Of requests that are in steps together, which want other adapters than each alone."""
    found = []
    for budget in (None, QUARTER):
        llm = LLM(folder, dtype="float32", num_blocks=50, expert_budget=budget)
        answers = llm.generate(["def ", "one two", "x"], Sampling(max_tokens=12, temperature=0, logprobs=0))
        found.append([(one.tokens, [told.logprob for told in one.output.logprobs]) for one in answers])
        llm.close()
    assert found[0] == found[1]


def test_a_budget_that_is_too_small_is_told_in_one_line(folder, capsys):
    assert main(["generate", str(folder), "--prompt", "x", "--expert-budget", "1KB"]) == 2
    assert "give at least 3,072" in capsys.readouterr().err
