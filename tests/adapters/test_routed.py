"""Pools of adapters beside matrices: chosen by the caller for each row, or by a router for each token."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from adapter_models import ATTENTION, CONFIGS, MLP, TOKENS, linear_layers, logits, make_adapter, make_base
from anabranch.adapters import (
    LowRankPool,
    RoutedLowRank,
    chosen_rows,
    load_peft,
    load_pool,
    merge,
    rows_for,
    save_peft,
    unload,
)
from anabranch.errors import ConfigError, InputError
from anabranch.lm import load_model
from anabranch.nn import BuildContext
from anabranch.nn.linear import Projection
from anabranch.routing import Router, SwitchLoss, TopK, record_routing

ROUTED = Router.Config(select=TopK.Config(top_k=2), balance=(SwitchLoss.Config(),))


@pytest.fixture(scope="module", params=["llama", "olmoe"])
def place(request, tmp_path_factory):
    """(base folder, adapter folders by name): of other ranks, scales and layers."""
    root = tmp_path_factory.mktemp(request.param)
    base = make_base(root / "base", request.param)
    every = linear_layers(base, [*ATTENTION, *MLP])
    some = {name: size for name, size in every.items() if name.endswith("q_proj") or ".1." in name}
    make_adapter(root / "a", every, seed="a")
    make_adapter(root / "b", linear_layers(base, ["q_proj", "down_proj"]), rank=7, seed="b", use_rslora=True)
    make_adapter(root / "c", some, rank=2, lora_alpha=-3, seed="c", target_modules=list(some))
    return root / "base", {name: root / name for name in "abc"}


def alone(place, name):
    model = load_model(place[0])[0]
    return logits(model if name is None else load_peft(place[1][name], model))


def pooled(place):
    return load_pool(place[1], load_model(place[0])[0]).eval()


def run(model, rows, token_BL=TOKENS, **options):
    with torch.no_grad():
        return model(token_BL, state=rows_for(model, rows, token_BL.shape[1]), **options).logits_BLV


@pytest.mark.parametrize("rows", [["a", "b"], ["c", None], [None, "a"], ["b", "b"]])
def test_each_row_is_as_alone(place, rows):
    model = pooled(place)
    expected = torch.stack([alone(place, name)[number] for number, name in enumerate(rows)])
    torch.testing.assert_close(run(model, rows), expected, rtol=1e-5, atol=3e-5)


def test_rows_that_are_told_nothing_are_the_base(place):
    model, base = pooled(place), alone(place, None)
    torch.testing.assert_close(logits(model), base)
    torch.testing.assert_close(run(model, [None, "a"])[0], base[0])


def test_a_mixture_is_the_sum(place, tmp_path):
    """Weights of adapters in a row, against the adapters' sum from `combine`."""
    from anabranch.adapters import combine, read_peft, write_peft

    made = combine([read_peft(place[1][name]) for name in "ac"], [0.5, -0.25])
    write_peft(tmp_path / "sum", made.adapter)
    expected = logits(load_peft(tmp_path / "sum", load_model(place[0])[0]))
    found = run(pooled(place), [{"a": 0.5, "c": -0.25}, "b"])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], alone(place, "b")[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("one", [1, 1.0, np.float32(1), np.int64(1)])
def test_a_weight_is_what_it_says_whatever_kind_of_number_it_is(place, one):
    """Scales are 2, 16 / sqrt 7 and -1.5: as whole numbers they would be others."""
    model = pooled(place)
    for name in "abc":
        torch.testing.assert_close(run(model, [{name: one}] * 2), run(model, [name] * 2), rtol=1e-5, atol=1e-5)
    for rows in ([{"a": one, "b": one}] * 2, [{"a": 2 * one, "b": -one}, {"b": one, "c": one}], [{"c": one}, {}]):
        as_floats = [{name: float(weight) for name, weight in row.items()} for row in rows]
        torch.testing.assert_close(run(model, rows), run(model, as_floats), rtol=1e-5, atol=1e-5)


def test_whole_numbers_that_the_caller_chose_with_are_floats(place):
    model, index = pooled(place), torch.tensor([[0, 1], [2, -1]])
    for weight in (torch.tensor([[2, 1], [1, 0]]), torch.tensor([[True, True], [True, False]])):
        with torch.no_grad():
            found, wanted = (model(TOKENS, state=chosen_rows(index, 6, each)) for each in (weight, weight.float()))
        torch.testing.assert_close(found.logits_BLV, wanted.logits_BLV, rtol=1e-5, atol=1e-5)


def test_with_a_cache_and_over_other_paths(place):
    model, rows = pooled(place), ["b", "a"]
    whole = run(model, rows)
    cache = model.new_cache(6)
    parts = [run(model, rows, TOKENS[:, i : i + 2], cache=cache) for i in range(0, 6, 2)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    # Blocks that some rows pass over, so that the others are gathered.
    paths = [(0, 1), (1,)]
    together = run(model, rows, path=paths)
    for number, path in enumerate(paths):
        one = run(model, [rows[number]], TOKENS[number : number + 1], path=path)
        torch.testing.assert_close(together[number], one[0], rtol=1e-5, atol=1e-5)


def test_in_bfloat16_numbers_are_rounded_once_and_sums_are_not(place):
    """Of a base in float32 nothing else changes; a base in bfloat16 keeps the type of its outputs."""
    model = load_pool(place[1], load_model(place[0])[0], dtype=torch.bfloat16).eval()
    layers = [module for module in model.modules() if isinstance(module, LowRankPool)]
    assert {stack.dtype for layer in layers for stack in layer.stacks} == {torch.bfloat16}
    half = load_pool(place[1], load_model(place[0])[0].bfloat16(), dtype=torch.bfloat16).eval()
    wide = load_pool(place[1], load_model(place[0])[0].bfloat16()).eval()
    assert {stack.dtype for layer in wide.modules() if isinstance(layer, LowRankPool) for stack in layer.stacks} == {
        torch.float32
    }
    rows = ["a", {"a": 0.5, "c": -0.25}]
    found, wanted = run(half, rows), run(wide, rows)
    assert found.dtype == torch.bfloat16
    # A router that is undecided may choose another expert for the rounding.
    assert (found - wanted).float().norm() < 0.05 * wanted.float().norm()
    assert not torch.equal(found, run(half, [None, None]))


def test_all_layers_of_a_pass_share_what_they_are_told(place, monkeypatch):
    """One routing and one plan for all of them, and for each pass its own."""
    from anabranch.adapters import routed

    made = []
    plan = routed.plan_dispatch
    monkeypatch.setattr(routed, "plan_dispatch", lambda routing: made.append(routing) or plan(routing))
    model = pooled(place)
    for rows in (["a", "b"], ["b", "a"]):
        made.clear()
        found = run(model, rows)
        # Experts see items that were gathered.
        assert len(made) == 1 or len(made) < sum(isinstance(module, RoutedLowRank) for module in model.modules()) / 2
        expected = torch.stack([alone(place, name)[number] for number, name in enumerate(rows)])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=3e-5)


def test_taken_off_nothing_is_left(place):
    model = pooled(place)
    assert torch.equal(logits(unload(model)), alone(place, None))
    load_peft(place[1]["a"], model)


def test_several_are_neither_merged_nor_saved_as_one(place, tmp_path):
    model = pooled(place)
    for what in (merge, lambda model: save_peft(tmp_path / "x", model)):
        with pytest.raises(
            ConfigError, match=r"the model has 3 adapters \(a, b, c\), for rows to choose from; combine makes one"
        ):
            what(model)
    with pytest.raises(ConfigError, match="adapter 'd' is not on the model; there are 'a', 'b', 'c'"):
        run(model, ["d", None])


def test_what_cannot_be_pooled(place, tmp_path):
    model = load_model(place[0])[0]
    with pytest.raises(ConfigError, match="no adapter to put on"):
        load_pool({}, model)
    layers = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.self_attn.q_proj": (32, 32)}
    make_adapter(tmp_path / "whole", layers, extra={"model.norm.weight": torch.ones(32)}, modules_to_save=["norm"])
    with pytest.raises(ConfigError, match=r"adapter 'w' brings model\.norm\.weight whole, which all rows would get"):
        load_pool({"w": tmp_path / "whole"}, model)
    assert torch.equal(logits(model), alone(place, None))


def test_a_head_of_its_own_in_a_pool(tmp_path):
    make_base(tmp_path / "base", "qwen2")
    make_adapter(tmp_path / "head", {"lm_head": (32, 61)})
    make_adapter(tmp_path / "q", {f"model.layers.{n}.self_attn.q_proj": (32, 32) for n in (0, 1)})
    folders = {name: tmp_path / name for name in ("head", "q")}
    given = tmp_path / "base", folders
    expected = torch.stack([alone(given, "head")[0], alone(given, "q")[1]])
    model = pooled(given)
    torch.testing.assert_close(run(model, ["head", "q"]), expected, rtol=1e-5, atol=1e-5)
    assert unload(model).head is None


@pytest.mark.parametrize("piece", range(1, 7))
def test_the_matrix_of_latents_is_each_row_s_own(tmp_path, piece):
    """With a cache kv_b_proj is multiplied into queries: it is called with its 8 latents, as many as 2 rows have tokens in pieces of 4."""
    base = make_base(tmp_path / "base", "deepseek_v2")
    for name in "ab":
        make_adapter(tmp_path / name, linear_layers(base, ["kv_b_proj"]), seed=name)
    given = tmp_path / "base", {name: tmp_path / name for name in "ab"}
    model = pooled(given)
    for rows in (["b", "a"], ["a", "a"], [None, {"a": 0.5, "b": -1.0}]):
        whole, cache = run(model, rows), model.new_cache(6)
        for start in range(0, 6, piece):
            part = TOKENS[:, start : start + piece]
            with torch.no_grad():
                found = model(part, cache=cache, state=rows_for(model, rows, part.shape[1])).logits_BLV
            torch.testing.assert_close(found, whole[:, start : start + piece], rtol=1e-4, atol=1e-5)
    for rows, length in ((3, 4), (2, 3)):
        cache = model.new_cache(6)
        with pytest.raises(InputError, match=rf"told of \[{rows}, {length}\] rows and tokens in a pass of 2 rows of 4"):
            model(TOKENS[:, :4], cache=cache, state=rows_for(model, ["a"] * rows, length))


def test_rows_that_change_within_have_no_matrix_of_latents(tmp_path):
    base = make_base(tmp_path / "base", "deepseek_v2")
    make_adapter(tmp_path / "a", linear_layers(base, ["kv_b_proj"]))
    model = pooled((tmp_path / "base", {"a": tmp_path / "a"}))
    state = {name: value.clone() for name, value in chosen_rows(torch.tensor([0, 0]), 6).items()}
    state["adapters.index"][1, 2:] = -1
    with torch.no_grad():
        model(TOKENS, state=state)  # each token its own, without a cache
        with pytest.raises(InputError, match="told otherwise of tokens of one row"):
            model(TOKENS, cache=model.new_cache(6), state=state)


def test_a_router_of_latents_needs_all_of_them():
    config = CONFIGS["deepseek_v2"]().replace(linears={"*.kv_up": RoutedLowRank.Config(ranks=(2, 2), router=ROUTED)})
    model = config.build().eval()
    logits(model)
    with pytest.raises(ConfigError, match="kv_up of latent attention routes each token"), torch.no_grad():
        model(TOKENS, cache=model.new_cache(6))


def drawn_model(**options):
    model = (
        CONFIGS["llama"]()
        .replace(linears={"*.q": RoutedLowRank.Config(**{"ranks": (2, 3, 1), "router": None, **options})})
        .build()
    )
    for name, parameter in model.named_parameters():
        if name.endswith("pool.b"):
            for number, rank in enumerate((2, 3, 1)):
                parameter.data[number, :, :rank].normal_(generator=torch.Generator().manual_seed(number))
    return model


def test_a_router_chooses_for_each_token():
    model = drawn_model(router=ROUTED, alphas=(4.0, 3.0, 2.0))
    layer = model.blocks[0].attention.qkv.beside["q"]
    assert layer.pool.scales == (2.0, 1.0, 2.0)
    counted = model.config.count()
    assert counted.parameters == sum(parameter.numel() for parameter in model.parameters())
    with record_routing(model) as recorder:
        logits(model)
    trace = recorder.trace()
    assert [each.num_destinations for each in trace.layers] == [3, 3]
    assert trace.load_LE().sum() == 2 * 2 * TOKENS.numel()
    model.train()(TOKENS, TOKENS.roll(-1, 1)).loss.backward()
    for part in (layer.router.score.weight, layer.pool.a, layer.pool.b):
        assert part.grad.any()


def test_rows_can_be_told_by_number():
    model = drawn_model()
    index = torch.tensor([2, -1])
    with torch.no_grad():
        found = model(TOKENS, state=chosen_rows(index, 6)).logits_BLV
        both = model(
            TOKENS, state=chosen_rows(torch.tensor([[2, -1], [-1, -1]]), 6, torch.tensor([[1.0, 9.0], [9.0, 9.0]]))
        ).logits_BLV
    torch.testing.assert_close(both, found)
    torch.testing.assert_close(found[1], logits(model)[1])
    assert not torch.allclose(found[0], logits(model)[0])
    assert isinstance(model.blocks[0].attention.qkv.beside["q"].pool, LowRankPool)


def test_a_choice_of_nobody_weighs_nothing():
    layer = drawn_model().blocks[0].attention.qkv.beside["q"]
    state = chosen_rows(torch.tensor([[1, -1], [-5, 0]]), 1, torch.tensor([[2.0, 9.0], [9.0, 3.0]]))
    routing = layer._told(torch.zeros(2, 32), SimpleNamespace(state=state))
    assert routing.index_NK.tolist() == [[1, -1], [-1, 0]]
    assert routing.weight_NK.tolist() == [[2, 0], [0, 3]]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: chosen_rows(torch.tensor([0, 3]), 6), "adapter 3 is chosen; there are 0 to 2"),
        (lambda: chosen_rows(torch.tensor([0, 1]), 5), "adapters are chosen for 10 tokens of a pass of 12"),
        (
            lambda: chosen_rows(torch.tensor([0, 1]), 6, torch.ones(3)),
            r"index has shape \[2, 1\] and weight \[3, 1\]; both must be",
        ),
    ],
)
def test_rows_that_cannot_be(state, message):
    with pytest.raises(InputError, match=message), torch.no_grad():
        drawn_model()(TOKENS, state=state())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ranks": ()}, "ranks"),
        ({"ranks": (2, 0)}, r"ranks is \[2, 0\]; each must be at least 1"),
        ({"ranks": (2, 2), "alphas": (1.0,)}, "alphas has 1 values for 2 adapters; give one for each"),
        ({"ranks": (2,), "router": ROUTED}, "top_k"),
    ],
)
def test_configs_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        RoutedLowRank.Config(**fields)


def test_adapters_of_more_digits_keep_them():
    """The widest of their types, in float32 at least."""
    from anabranch.adapters import Pair
    from anabranch.nn import BuildContext

    context = BuildContext(4)
    for dtypes, wanted in (
        ((torch.float64, torch.float32), torch.float64),
        ((torch.bfloat16, torch.float16), torch.float32),
    ):
        pairs = [Pair(torch.ones(1, 4, dtype=dtype) / 3, torch.ones(4, 1, dtype=dtype) / 3, 1.0) for dtype in dtypes]
        layer = RoutedLowRank.config_of(pairs).build(context.projection("a", 4, 4), context)
        layer.put(pairs)
        assert layer.pool.a.dtype == layer.pool.b.dtype == wanted
        assert torch.equal(layer.pool.a[0], pairs[0].a_RC.to(wanted))


@pytest.mark.parametrize("router", [None, ROUTED])
def test_count_says_what_a_token_uses(router):
    """One adapter where the caller chooses, as many as the router takes otherwise."""
    config = RoutedLowRank.Config(ranks=(2, 3, 3), router=router)
    count = config.count(Projection("q", 10, 20), BuildContext(10))
    pair, score = 3 * (10 + 20), 0 if router is None else 3 * 10
    used = pair if router is None else 2 * pair
    assert (count.parameters, count.active, count.flops) == (
        3 * pair + score,
        used + score,
        2 * (used + score),
    )
