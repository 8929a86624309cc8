"""GliderPool: routing against the formula, what must not change, rows of a batch, experts that come and go, what is refused."""
# Shapes: N tokens, E experts, C inputs

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from adapter_models import ATTENTION, TOKENS, linear_layers, make_adapter, make_base
from anabranch.adapters import load_peft, read_peft, rows_for, unload
from anabranch.adapters.glider import (
    GliderConfig,
    GliderPool,
    HiddenStates,
    arrow_prototype,
    bias_rows,
    describe_expert,
    explain,
    giving,
    merged_experts,
    standardised,
)
from anabranch.errors import CheckpointError, ConfigError, InputError
from anabranch.lm import SamplingConfig, generate, load_model, save_model
from anabranch.lm.shards import write_file

ASKED = {
    "sql": "Write a SQL query that answers a question about a table.",
    "law": "Name the law that a legal case falls under.",
    "sum": "Summarise a news article in one sentence.",
}
QUERY = "which SQL query counts the rows of a table"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """base and pool/sql, law, sum: of other ranks; sum adapts queries alone. Gates lie in gates.pt."""
    place = tmp_path_factory.mktemp("glider")
    base = make_base(place / "base", "llama")
    layers = linear_layers(base, ATTENTION)
    make_adapter(place / "pool" / "sql", layers, seed="a")
    make_adapter(place / "pool" / "law", layers, rank=7, seed="b", use_rslora=True)
    make_adapter(place / "pool" / "sum", linear_layers(base, ["q_proj"]), rank=2, lora_alpha=3, seed="c")
    for name, text in ASKED.items():
        describe_expert(place / "pool" / name, instruction=text)
    return place


def gates(root, name, seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = read_peft(root / "pool" / name).pairs
    return {module: torch.randn(pair.a_RC.shape[1], generator=generator) for module, pair in pairs.items()}


def filled(root, config=None, names=("sql", "law", "sum"), gated=True, **options):
    made = GliderPool(config, **options)
    for number, name in enumerate(names):
        made.add(root / "pool" / name, gates(root, name, len(name) * 10 + ord(name[0])) if gated else None)
        assert made.names[number] == name
    return made


def opened(root):
    return load_model(root / "base")[0].eval()


def run(model, state=None, token_BL=TOKENS):
    with torch.no_grad():
        return model(token_BL, state=state).logits_BLV


def only(model, name, token_BL=TOKENS):
    return run(model, rows_for(model, [name] * len(token_BL), token_BL.shape[1]), token_BL)


# The formula


@pytest.mark.parametrize("local", ["phatgoose", "arrow", "none"])
def test_a_layer_is_the_formula(root, local):
    """Naively: scores, softmax, the best two, each adapter's product."""
    pool = filled(root, GliderConfig(local=local, weight=5.0, temperature=2.0))
    model = pool.onto(opened(root))
    part = "blocks.1.attention.q"
    layer = pool.layers()[part]
    module = "model.layers.1.self_attn.q_proj"
    x_NC = torch.randn(7, 32, generator=torch.Generator().manual_seed(3))
    bias_E = torch.tensor([0.3, -0.2, 0.4])
    y_NO = torch.zeros(7, 32)
    pairs = [read_peft(root / "pool" / name).pairs[module] for name in pool.names]
    own = [gates(root, name, len(name) * 10 + ord(name[0]))[module] for name in pool.names]
    for n, x_C in enumerate(x_NC):
        logits = []
        for e, (pair, gate_C) in enumerate(zip(pairs, own, strict=True)):
            score = torch.tensor(0.0)
            if local == "phatgoose":
                score = (F.layer_norm(x_C, (32,)) @ standardised(gate_C)) / math.sqrt(32)
            elif local == "arrow":
                score = (x_C @ arrow_prototype(pair)).abs() / 2
            logits.append(score + bias_E[e])
        p_E = torch.stack(logits).softmax(0)
        best = p_E.argsort(descending=True)[:2]
        for e in best.tolist():
            y_NO[n] += p_E[e] / p_E[best].sum() * pairs[e].scale * (pairs[e].b_OR @ (pairs[e].a_RC @ x_C))
    context = model.context(torch.zeros(1, 7, dtype=torch.int64), state=bias_rows(bias_E.unsqueeze(0), 7))
    with torch.no_grad():
        found_NO = layer(x_NC.unsqueeze(0), context)[0]
        routing = layer.route(x_NC.unsqueeze(0), context)
    assert torch.allclose(found_NO, y_NO, atol=1e-5)
    assert torch.allclose(routing.weight_NK.sum(1), torch.ones(7), atol=1e-5)
    assert routing.index_NK.shape == (7, 2)


def test_an_expert_without_a_gate_has_its_prototype(root):
    """Standardised as gates are, and by magnitude: a singular vector has no sign."""
    pool = GliderPool()
    pool.add(root / "pool" / "sql", gates(root, "sql", 1))
    pool.add(root / "pool" / "law")
    pool.onto(opened(root))
    layer = pool.layers()["blocks.0.attention.o"]
    score = layer.router.score
    assert score.unsigned_E.tolist() == [False, True]
    pair = read_peft(root / "pool" / "law").pairs["model.layers.0.self_attn.o_proj"]
    assert torch.allclose(score.vectors[1], standardised(arrow_prototype(pair)), atol=1e-5)
    x_NC = torch.randn(5, 32)
    before = score.local(x_NC)
    score.vectors.data[1] *= -1
    assert torch.equal(score.local(x_NC), before)
    assert (before[:, 1] >= 0).all()
    assert (before[:, 0] < 0).any()


def test_a_matrix_that_an_expert_lacks_never_chooses_it(root):
    pool = filled(root, GliderConfig(weight=1e4))
    model = pool.onto(opened(root))
    state = pool.rows(["Summarise a news article"] * 2, 6)
    with torch.no_grad():
        context = model.context(TOKENS, state=state)
        routing = pool.layers()["blocks.0.attention.k"].route(torch.randn(2, 6, 32), context)
    assert set(routing.index_NK.unique().tolist()) == {0, 1}


# What must not change


def test_without_weight_it_is_phatgoose(root):
    pool = filled(root, GliderConfig(weight=0.0))
    model = pool.onto(opened(root))
    assert torch.equal(run(model, pool.rows([QUERY, "law"], 6)), run(model))
    off = filled(root, GliderConfig(instruction=False))
    other = off.onto(opened(root))
    assert torch.equal(run(other, off.rows([QUERY, "law"], 6)), run(model))
    assert not torch.allclose(run(model), only(model, "sql"))


def test_a_great_weight_and_one_expert_is_retrieval(root):
    pool = filled(root, GliderConfig(weight=1e6, top_k=1), names=("sql", "law"))
    model = pool.onto(opened(root))
    for query in (QUERY, "a legal case"):
        name = pool.retrieve(query)[0].name
        assert torch.allclose(run(model, pool.rows([query] * 2, 6)), only(model, name), atol=1e-5)
    assert pool.retrieve(QUERY)[0].name == "sql" != pool.retrieve("a legal case")[0].name


def test_a_pool_of_one_is_a_plain_lora(root):
    pool = filled(root, names=("sql",))
    model = pool.onto(opened(root))
    plain = load_peft(root / "pool" / "sql", opened(root))
    assert torch.allclose(run(model), run(plain), atol=1e-5)
    assert torch.allclose(run(model, pool.rows([QUERY, None], 6)), run(plain), atol=1e-5)


def test_experts_in_another_order_compute_the_same(root):
    first, second = filled(root), filled(root, names=("sum", "sql", "law"))
    queries = [QUERY, "news"]
    one = run(first.onto(opened(root)), first.rows(queries, 6))
    assert torch.allclose(one, run(second.onto(opened(root)), second.rows(queries, 6)), atol=1e-5)
    assert first.calibrate().threshold == pytest.approx(second.calibrate().threshold)


def test_rows_of_a_batch_are_as_alone(root):
    pool = filled(root, GliderConfig(weight=20.0))
    model = pool.onto(opened(root))
    queries = [QUERY, None]
    both = run(model, pool.rows(queries, 6))
    for row, query in enumerate(queries):
        token_BL = TOKENS[row : row + 1]
        alone = run(model, pool.rows([query], 6), token_BL)
        assert torch.allclose(both[row], alone[0], atol=1e-5)
    assert torch.allclose(both[1], run(model)[1], atol=1e-5)
    assert not torch.allclose(both[0], run(model)[0], atol=1e-3)


def test_coming_and_going_changes_no_other_vector(root):
    pool = filled(root, names=("sql", "law"))
    model = pool.onto(opened(root))

    def vectors():
        layers = pool.layers()
        return {
            (part, name): layer.router.score.vectors[number].clone()
            for part, layer in layers.items()
            for number, name in enumerate(pool.names)
        }

    before, state = vectors(), run(model, pool.rows([QUERY, None], 6))
    pool.add(root / "pool" / "sum", instruction="Summarise.")
    assert pool.names == ("sql", "law", "sum")
    after = vectors()
    assert all(torch.equal(after[key], vector) for key, vector in before.items())
    pool.remove("sum")
    assert all(torch.equal(vectors()[key], vector) for key, vector in before.items())
    assert torch.equal(run(model, pool.rows([QUERY, None], 6)), state)
    base = run(opened(root))
    pool.remove("sql")
    pool.remove("law")
    assert torch.equal(run(model), base)
    assert len(pool) == 0


def test_a_failed_expert_leaves_the_pool_as_it_was(root, tmp_path):
    pool = filled(root, names=("sql", "law"))
    model = pool.onto(opened(root))
    before = run(model)
    make_adapter(tmp_path / "wide", {"model.layers.0.self_attn.q_proj": (48, 32)})
    with pytest.raises(CheckpointError):
        pool.add(tmp_path / "wide", instruction="x")
    assert pool.names == ("sql", "law")
    assert "wide" not in pool.matcher.vectors
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("gone", [False, True])
def test_a_removal_that_cannot_be_changes_nothing(root, tmp_path, gone):
    """Fewer experts than top_k, or the folder of one that stays is gone."""
    shutil.copytree(root / "pool", tmp_path / "pool")
    pool = GliderPool(GliderConfig(top_k=1 if gone else 2))
    for name in ("law", "sql"):
        pool.add(tmp_path / "pool" / name)
    model = pool.onto(opened(root))
    state = pool.rows([QUERY, None], 6)
    before = run(model, state)
    if gone:
        shutil.rmtree(tmp_path / "pool" / "law")
    with pytest.raises(CheckpointError if gone else ConfigError, match="law" if gone else "top_k is 2, and without"):
        pool.remove("sql")
    assert pool.names == ("law", "sql") == tuple(pool.matcher.texts)
    assert torch.equal(run(model, pool.rows([QUERY, None], 6)), before)
    if not gone:
        # Off the model nothing is in the way.
        unload(model)
        pool.remove("sql")
        assert pool.names == ("law",)


def test_a_pool_that_cannot_be_put_on_leaves_the_model(root, monkeypatch):
    pool = filled(root, names=("sql", "law"))
    model = pool.onto(opened(root))
    before = run(model)
    with pytest.raises(ConfigError):
        pool.onto(model, family="mixtral-of-mars")
    assert torch.equal(run(model), before)
    # Vectors that fail late, on a bare model and on one that has the pool.
    bare = opened(root)
    kept = giving.vector_of
    calls = []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("no memory")
        return kept(*args)

    monkeypatch.setattr(giving, "vector_of", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        pool.onto(bare)
    assert torch.equal(run(bare), run(opened(root)))
    assert pool.model is model
    calls.clear()
    with pytest.raises(RuntimeError, match="no memory"):
        pool.add(root / "pool" / "sum")
    assert pool.names == ("sql", "law") == tuple(pool.matcher.texts)
    assert torch.equal(run(model), before)


def test_what_somebody_else_put_on_stays(root):
    pool = filled(root, names=("sql", "law"))
    model = unload(pool.onto(opened(root)))
    load_peft(root / "pool" / "sum", model)
    before = run(model)
    with pytest.raises(ConfigError, match="on no model"):
        pool.rows([None], 3)
    with pytest.raises(ConfigError, match="has an adapter already"):
        pool.onto(model)
    pool.add(root / "pool" / "sum")
    pool.remove("sql")
    assert torch.equal(run(model), before)


@pytest.mark.filterwarnings("ignore:the instruction of")
def test_a_large_pool_takes_an_instruction_of_length_0(root):
    """With a graph; pool and matcher stay in step."""
    pool = GliderPool(
        GliderConfig(weight=2.0), embedder=lambda texts: [[float("q" in t), float("w" in t)] for t in texts]
    )
    pool.matcher.many = 1
    pool.add(root / "pool" / "sql", instruction="q")
    assert [one.name for one in pool.retrieve("q")] == ["sql"]
    pool.add(root / "pool" / "law", instruction="-")
    assert pool.names == ("sql", "law") == tuple(pool.matcher.texts)
    assert pool.bias(["q", "-"]).tolist() == [[2.0, 0.0], [0.0, 0.0]]
    assert [one.name for one in pool.retrieve("-")] == ["sql"]


# Weights and choices


def test_the_weight_follows_from_the_best_cosine():
    vectors = {"x": [1, 0], "y": [0, 1], "zero": [0, 0]}
    pool = GliderPool(GliderConfig(threshold=0.5), embedder=lambda texts: [vectors[text] for text in texts])
    for name, texts in {"a": ("x",), "b": (), "c": ("y",)}.items():
        pool.matcher.add(name, texts)
    assert pool.weight({"a": 0.5, "b": 0.9, "c": 0.1}) == 103
    assert pool.weight({"a": 0.4, "b": 0.9, "c": 0.1}) == 3
    pool.config = GliderConfig(weight=7.0)
    assert pool.weight({"a": 0.4, "b": 0.9, "c": 0.1}) == 7
    # What is there without a vector's length does not count, though its 0 be the best.
    pool.config = GliderConfig(threshold=-0.5)
    with pytest.warns(UserWarning, match="length 0"):
        pool.matcher.add("d", ("zero",))
    assert pool.weight({"a": -0.8, "b": 0.0, "c": -0.6, "d": 0.0}) == 3
    pool.matcher.remove("a")
    pool.matcher.remove("c")
    pool.config = GliderConfig()
    assert pool.weight({"b": 0.9, "d": 0.0}) == 0


def test_the_threshold_comes_from_the_pool(root):
    pool = GliderPool.load(root / "pool")
    threshold = pool.calibrate().threshold
    sure, unsure = pool.bias([ASKED["sql"], "cook an egg"])
    assert pool.matcher.cosines(ASKED["sql"])["sql"] == pytest.approx(1)
    cosine = pool.matcher.cosines("cook an egg")
    assert max(cosine.values()) < threshold < 1
    assert float(sure[pool.names.index("sql")]) == pytest.approx(103, rel=1e-5)
    assert unsure.tolist() == pytest.approx([3 * value for value in cosine.values()])
    assert pool.bias([None]).tolist() == [[0, 0, 0]]
    # An instruction that comes with the query is taken in its place.
    assert torch.equal(pool.bias([None], [ASKED["law"]]), pool.bias([ASKED["law"]]))


def test_top_p_keeps_as_few_as_hold_the_mass(root):
    pool = filled(root, GliderConfig(local="none", top_p=0.6))
    model = pool.onto(opened(root))
    layer = pool.layers()["blocks.0.attention.q"]
    x_BLC = torch.randn(1, 4, 32)

    def used(*p):
        state = bias_rows(torch.tensor([p]).log(), 4)
        routing = layer.route(x_BLC, model.context(torch.zeros(1, 4, dtype=torch.int64), state=state))
        return routing.used_NK.sum(1).unique().tolist(), routing.weight_NK.sum(1)

    for p, count in (((0.7, 0.2, 0.1), 1), ((0.5, 0.3, 0.2), 2), ((0.34, 0.33, 0.33), 2), ((0.1, 0.3, 0.6), 1)):
        found, total_N = used(*p)
        assert found == [count]
        assert torch.allclose(total_N, torch.ones(4), atol=1e-5)


def test_generation_is_that_of_the_rows_alone(root):
    pool = filled(root, GliderConfig(weight=30.0))
    model = pool.onto(opened(root))
    prompts, queries = [[1, 2, 3], [4, 5], [6]], [QUERY, None, "the law of a legal case"]
    config = SamplingConfig(max_tokens=6, temperature=0)
    with pool.answering(queries):
        together = generate(model, prompts, config)
    for prompt, query, expected in zip(prompts, queries, together, strict=True):
        with pool.answering([query]):
            assert generate(model, [prompt], config) == [expected]
    assert generate(model, prompts, config) != together
    # A row that stops leaves, and the others keep their own.
    stopped = SamplingConfig(max_tokens=6, temperature=0, stop=(together[0][1],))
    with pool.answering(queries):
        assert generate(model, prompts, stopped)[2] == together[2][: len(generate_until(together[2], together[0][1]))]


def cached_step(model, cache, token_BL):
    with torch.no_grad():
        return model(token_BL, cache=cache).logits_BLV


def test_a_cache_follows_the_block_that_it_is_used_in(root):
    """As rows without a cache do: one after the other, one in the other, and rows that left."""
    pool = filled(root, GliderConfig(weight=30.0))
    model = pool.onto(opened(root))
    first, second = [QUERY, "the law of a legal case"], ["the law of a legal case", None]

    def in_turn(*told):
        cache = model.new_cache(8)
        for start, queries in enumerate(told):
            with pool.answering(queries):
                found = cached_step(model, cache, TOKENS[:, start : start + 1])
        return found, cache

    expected, cache = in_turn(second, second)
    assert not torch.allclose(in_turn(second, first)[0], expected, atol=1e-3)
    # What came before is told apart from what is told now.
    cache = model.new_cache(8)
    with pool.answering(second):
        cached_step(model, cache, TOKENS[:, :1])
    with pool.answering(second[::-1]), pool.answering(second):
        assert torch.equal(cached_step(model, cache, TOKENS[:, 1:2]), expected)
    # Nothing of a block is left in the cache when it is over.
    assert [len(rows.of) for rows in cache.state.values()] == [0]
    with pool.answering(first):
        cached_step(model, cache, TOKENS[:, 2:3])
        cache.keep_rows(torch.tensor([1]))
        cached_step(model, cache, TOKENS[1:, 3:4])
    with pool.answering(first[:1]):
        cached_step(model, cache, TOKENS[1:, 4:5])
        # Emptied, it takes another batch, in the same block too.
        cache.begin(0)
        cached_step(model, cache, TOKENS[:, :1])


def generate_until(tokens, stop):
    return tokens[: tokens.index(stop)] if stop in tokens else tokens


def test_what_is_explained_is_what_happened(root):
    pool = filled(root, GliderConfig(weight=8.0))
    model = pool.onto(opened(root))
    ids = TOKENS[0].tolist()
    found = explain(pool, QUERY, ids)
    from anabranch.routing import record_routing

    with record_routing(model, scores=True) as recorder:
        run(model, pool.rows([QUERY], 6), TOKENS[:1])
    assert recorder.trace() is not None
    assert sum(one.weight for one in found.experts) == pytest.approx(1, abs=1e-5)
    assert set(found.weights) == set(pool.layers())
    assert all(sum(by.values()) == pytest.approx(1, abs=1e-5) for by in found.weights.values())
    assert found.weights["blocks.1.attention.v"]["sum"] == 0
    best = found.experts[0]
    assert (best.name, found.a) == ("sql", 8.0)
    assert best.global_logit == pytest.approx(8 * best.cosine)
    assert 0 < best.global_share < 1
    local = explain(filled_on(root, GliderConfig(instruction=False)), QUERY, ids)
    assert all(one.global_share == 0 for one in local.experts)
    alone = explain(pool, QUERY)
    assert [one.weight for one in alone.experts] == [None] * 3
    assert alone.experts[0].name == "sql"
    with pytest.raises(InputError, match="no tokens"):
        explain(pool, QUERY, [])


def filled_on(root, config):
    pool = filled(root, config)
    root_model = pool.onto(opened(root))
    pool.kept = root_model
    return pool


def test_a_models_own_states_embed(root):
    class Letters:
        def encode(self, text, *, parse_special):
            return [ord(letter) % 61 for letter in text]

    model = opened(root)
    small = HiddenStates(model, Letters(), max_tokens=8)
    pool = filled(root, embedder=small)
    before = pool.bias([QUERY])
    pool.onto(model)
    pool.matcher._seen.clear()
    # Of the base, whatever is on it.
    assert torch.allclose(pool.bias([QUERY]), before, atol=1e-5)
    assert not small.embed([""]).any()


def test_looking_at_a_model_leaves_each_module_its_mode(root):
    model, tokenizer = load_model(root / "base")[0].train(), SimpleNamespace(encode=lambda text, **_: [1, 2])
    model.blocks[0].eval()
    pool = filled(root, GliderConfig(weight=1.0), embedder=HiddenStates(model, tokenizer))
    pool.onto(model)
    before = {name: module.training for name, module in model.named_modules()}
    explain(pool, QUERY, [1, 2, 3])
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.training
    assert not model.blocks[0].training


def test_experts_merged_are_the_mean(root):
    folders = [root / "pool" / name for name in ("sql", "law")]
    made = merged_experts(folders, rank=11)
    module = "model.layers.0.self_attn.v_proj"
    mean = sum(read_peft(folder).pairs[module].delta() for folder in folders) / 2
    assert torch.allclose(made.adapter.pairs[module].delta(), mean, atol=1e-5)
    with pytest.raises(ConfigError, match="no experts to merge"):
        merged_experts([])


# What is refused


def test_what_cannot_be_is_told(root, tmp_path):
    pool = filled(root, names=("sql", "law"))
    shutil.copytree(root / "pool" / "sum", tmp_path / "sum")
    cases = [
        ((root / "pool" / "sql",), {}, "expert 'sql' is in the pool already"),
        ((tmp_path / "sum", {"x": torch.zeros(3)}), {}, "a gate is for x, which the adapter"),
        (
            (tmp_path / "sum", {"model.layers.0.self_attn.q_proj": torch.zeros(3)}),
            {},
            r"has shape \[3\]; the layer has 32",
        ),
        ((tmp_path / "sum", {"model.layers.0.self_attn.q_proj": torch.full((32,), math.nan)}), {}, "not finite"),
        ((tmp_path / "sum",), {"instruction": " "}, "it must be a text, or several wordings"),
        ((tmp_path / "sum",), {"examples": [("a", "b")]}, "the pool has no writer"),
        ((tmp_path / "sum",), {"instruction": "x", "examples": [("a", "b")]}, "give one of them"),
    ]
    for args, options, message in cases:
        with pytest.raises(ConfigError, match=message):
            pool.add(*args, **options)
    assert pool.names == ("sql", "law")
    with pytest.raises(CheckpointError, match="no adapter at"):
        pool.add(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="expert 'x' is not in the pool; there are 'sql', 'law'"):
        pool.remove("x")
    with pytest.raises(ConfigError, match="on no model"):
        pool.rows([None], 3)
    with pytest.raises(ConfigError, match="no experts"):
        GliderPool().onto(opened(root))
    with pytest.raises(ConfigError, match="give one of them"):
        GliderConfig(top_k=2, top_p=0.5)
    with pytest.raises(ConfigError, match="there are 2 destinations; use 1 to 2"):
        filled(root, GliderConfig(top_k=3), names=("sql", "law")).onto(opened(root))
    with pytest.raises(ConfigError, match="2 instructions for 1 queries"):
        pool.bias(["x"], [None, None])


def test_a_model_that_is_none_of_ours_is_refused_and_stays_as_it_was(root):
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, outputs in (("q", 32), ("k", 16), ("v", 16), ("o", 32)):
                setattr(self, f"{name}_proj", torch.nn.Linear(32, outputs, bias=False))

    blocks = [torch.nn.ModuleDict({"self_attn": Attention()}) for _ in range(2)]
    foreign = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList(blocks)})})
    before = [name for name, _ in foreign.named_modules()]
    with pytest.raises(
        ConfigError, match=r"a pool goes onto a Decoder, and model is a torch\.nn\.modules\..*ModuleDict"
    ):
        filled(root).onto(foreign)
    assert [name for name, _ in foreign.named_modules()] == before
    assert all(one.requires_grad for one in foreign.parameters())


def test_terms_of_another_pass_are_told(root):
    pool = filled(root, names=("sql", "law"))
    model = pool.onto(opened(root))
    with pytest.raises(InputError, match="terms of 3 adapters"):
        run(model, bias_rows(torch.zeros(2, 3), 6))
    with pytest.raises(InputError, match="for 10 tokens, in a pass of 12"):
        run(model, bias_rows(torch.zeros(2, 2), 5))
    with pytest.raises(InputError, match="not finite"):
        bias_rows(torch.tensor([[math.inf]]), 2)
    with pytest.raises(InputError, match=r"must be float \[rows, adapters\]"):
        bias_rows(torch.zeros(3), 2)
    with pool.answering(["x", "y"]), pytest.raises(InputError, match="a pass has 3 rows, and 2 queries are told"):
        model(torch.zeros(3, 2, dtype=torch.int64))


def test_an_instruction_is_made_of_examples(root):
    asked = []
    pool = GliderPool(writer=lambda text: asked.append(text) or "Write SQL.")
    pool.add(root / "pool" / "sql", examples=[("how many?", "SELECT 1"), ("b", "c"), ("d", "e"), ("f", "g")])
    assert pool.matcher.texts["sql"] == ("Write SQL.",)
    assert "Input: how many?\nOutput: SELECT 1" in asked[0]
    assert "Input: f" not in asked[0]
    for examples, message in (([], "no examples"), ([("a",)], r"must be \(input, output\)")):
        with pytest.raises(ConfigError, match=message):
            pool.add(root / "pool" / "law", examples=examples)


def test_a_folder_keeps_instructions_and_gates(root, tmp_path):
    shutil.copytree(root / "pool", tmp_path / "pool")
    own = gates(root, "sql", 5)
    describe_expert(tmp_path / "pool" / "sql", gate=own, instruction=["One.", "Two."])
    pool, other = GliderPool.load(tmp_path / "pool"), GliderPool.load(root / "pool")
    assert pool.names == ("law", "sql", "sum")
    assert pool.matcher.texts["sql"] == ("One.", "Two.")
    pool.onto(opened(root))
    module = "model.layers.1.self_attn.q_proj"
    score = pool.layers()["blocks.1.attention.q"].router.score
    assert torch.equal(score.vectors[1], standardised(own[module]))
    assert other.matcher.texts["sql"] == (ASKED["sql"],)
    for wrong, message in (
        ({module: torch.ones(1)}, r"glider.safetensors: .* has shape \[1\]; the layer has 32 inputs"),
        ({module: torch.full((32,), math.inf)}, "finite numbers"),
        ({"x": torch.ones(32)}, "a gate is for x, which the adapter"),
    ):
        write_file(tmp_path / "pool" / "law" / "glider.safetensors", wrong)
        with pytest.raises(CheckpointError, match=message):
            GliderPool.load(tmp_path / "pool")
    (tmp_path / "pool" / "law" / "glider.safetensors").unlink()
    describe_expert(tmp_path / "pool" / "sql", instruction="Three.")
    assert len(GliderPool.load(tmp_path / "pool")._experts["sql"].gates) == len(own)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("glider.json", b"{", "cannot read"),
        ("glider.json", b'{"instructions": 3}', "it must be a list of texts"),
        ("glider.json", b'{"instructions": [3]}', "it must be a text"),
        ("glider.safetensors", b"xx", "glider.safetensors"),
    ],
)
def test_damaged_descriptions_are_told(root, tmp_path, name, content, message):
    shutil.copytree(root / "pool", tmp_path / "pool")
    (tmp_path / "pool" / "law" / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        GliderPool.load(tmp_path / "pool")
    with pytest.raises(CheckpointError, match="no pool at"):
        GliderPool.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="has no folder with"):
        GliderPool.load(tmp_path)


def test_the_pool_comes_off(root):
    pool = filled(root)
    model = pool.onto(opened(root))
    unload(model)
    assert torch.equal(run(model), run(opened(root)))
    pool.onto(model)
    assert not torch.equal(run(model), run(opened(root)))


def test_a_model_with_a_pool_is_a_model_like_others(root, tmp_path):
    """Saved and read back it routes as it did, rows told and not; in bfloat16 it is near."""
    pool = filled(root, GliderConfig(weight=20.0))
    model = pool.onto(opened(root))
    state = pool.rows([QUERY, None], 6)
    save_model(tmp_path / "saved", model)
    again = load_model(tmp_path / "saved")[0].eval()
    assert torch.equal(run(again, state), run(model, state))
    with torch.autocast("cpu", torch.bfloat16):
        near = run(model, state)
    assert torch.isfinite(near).all()
    # Left padding changes nothing of what follows it.
    token_BL = torch.cat([torch.zeros(2, 2, dtype=torch.int64), TOKENS], 1)
    mask_BL = torch.ones_like(token_BL, dtype=torch.bool)
    mask_BL[:, :2] = False
    with torch.no_grad():
        padded = model(token_BL, token_mask_BL=mask_BL, state=pool.rows([QUERY, None], 8)).logits_BLV[:, 2:]
    assert torch.allclose(padded, run(model, state), atol=1e-4)


def test_no_second_model_is_built_on_the_way(root, monkeypatch):
    from anabranch.adapters.lora_mixer import load

    made, build = [], load.built_alone
    monkeypatch.setattr(load, "built_alone", lambda *a, **k: made.append(build(*a, **k)) or made[-1])
    model = filled(root).onto(opened(root))
    assert len(made) == 1
    assert made[0].blocks[0].feed_forward.w13.weight.is_meta
    assert made[0].config == model.config
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_pool_that_left_its_model_goes_on_comparing(root):
    pool = filled(root)
    model = pool.onto(opened(root))
    before, bias_BE = run(model), pool.bias([QUERY])
    pool.leave()
    with pytest.raises(ConfigError, match="are on no model"):
        _ = pool.model
    assert torch.equal(pool.bias([QUERY]), bias_BE)
    assert torch.equal(run(model), before)
    pool.remove("sum")
    assert torch.equal(run(model), before)


@pytest.mark.slow
def test_compiled_it_routes_the_same(root):
    pool = filled(root, GliderConfig(weight=20.0))
    model = pool.onto(opened(root))
    state = pool.rows([QUERY, None], 6)
    wanted = run(model, state)
    torch.compiler.reset()
    torch.testing.assert_close(run(torch.compile(model, fullgraph=True, backend="eager"), state), wanted)
