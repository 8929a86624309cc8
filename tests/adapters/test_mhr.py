"""MHR's layers: the invariants of the method, exactly; and each path of a pass against a plain loop over rows."""

import math

import pytest
import torch

from adapter_models import CONFIGS, TOKENS
from anabranch.adapters import LowRank
from anabranch.adapters.mhr import AdapterInventory, MultiHeadRouted, RoutingTable, Weights, bin_of
from anabranch.adapters.own_folder import read_own, write_own
from anabranch.adapters.put_on import put_on
from anabranch.adapters.tasks import TASK, on_tasks, task_names, task_rows
from anabranch.errors import ConfigError, InputError
from anabranch.lm import Decoder, SamplingConfig, generate
from anabranch.nn import MoE, SelfAttention

TASKS = ("a", "b", "c")
FINE = MultiHeadRouted.Config(tasks=TASKS, skills=3, heads=4, rank=2)
ALL = {"blocks.*": FINE}


def model_of(config=FINE, family="llama", pattern="blocks.*", drawn=True):
    model = put_on(CONFIGS[family]().build(seed=3).eval(), {pattern: config}, seed=1)
    if drawn:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def logits(model, names, token_BL=TOKENS, **options):
    with torch.no_grad():
        return model(token_BL, state=task_rows(model, names, token_BL.shape[1]), **options).logits_BLV


def layers(model):
    return [module for module in model.modules() if isinstance(module, MultiHeadRouted)]


def by_hand(layer, x_LC, task):
    """Head by head and skill by skill, as the method is written."""
    z_qK = layer.table.z[layer.tasks.index(task)]
    heads, skills, _, rank = layer.inventory.a.shape
    alpha_qK = torch.sigmoid(z_qK) / (torch.sigmoid(z_qK).sum(-1, keepdim=True) + 1e-12)
    a_CR = torch.cat([sum(alpha_qK[h, k] * layer.inventory.a[h, k] for k in range(skills)) for h in range(heads)])
    b_RO = torch.cat(
        [sum(alpha_qK[h, k] * layer.inventory.b[h, k] for k in range(skills)) for h in range(heads)], dim=1
    )
    return x_LC @ a_CR @ b_RO / rank


class Told:
    """A forward context of a layer alone."""

    def __init__(self, task_BL):
        from anabranch.routing import RoutingContext

        self.made = RoutingContext(state={TASK: task_BL})

    def __call__(self, layer, x):
        return layer(x, self.made)


@pytest.fixture
def layer():
    made = layers(model_of(pattern="blocks.0.feed_forward.down"))[0]
    assert (made.inventory.a.shape, made.inventory.b.shape) == ((4, 3, 12, 2), (4, 3, 2, 8))
    return made.requires_grad_(False)


@pytest.mark.parametrize("heads", [1, 4])
def test_first_numbers_of_a_head_are_those_of_all_inputs(heads):
    bound = 1 / math.sqrt(3 * 64)
    greatest = AdapterInventory(64, 8, skills=4, heads=heads, rank=8).a.abs().max()
    assert 0.95 * bound < greatest <= bound


@pytest.mark.parametrize("rows", [[1, 1, 1], [2, 0, 2], [0, 1, 2]])
@pytest.mark.parametrize("form", ["rows", "items", "one token"])
def test_against_the_method_by_hand(layer, rows, form):
    x_BLC = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(2))
    number_B = torch.tensor(rows)
    if form == "one token":
        x_BLC = x_BLC[:, :1]
    task_BL = number_B[:, None].expand(3, x_BLC.shape[1])
    task_BL = task_BL.contiguous() if form == "items" else task_BL
    expected = torch.stack([by_hand(layer, x_LC, TASKS[row]) for x_LC, row in zip(x_BLC, rows, strict=True)])
    torch.testing.assert_close(Told(task_BL)(layer, x_BLC), expected, rtol=1e-5, atol=1e-6)


def test_tokens_of_a_row_may_be_of_several_tasks(layer):
    x_BLC = torch.randn(1, 4, 48)
    task_BL = torch.tensor([[0, 2, 2, -1]])
    found = Told(task_BL)(layer, x_BLC)[0]
    for place, task in enumerate(["a", "c", "c"]):
        torch.testing.assert_close(found[place], by_hand(layer, x_BLC[0, place], task), rtol=1e-5, atol=1e-6)
    pair = layer.pair(None)
    torch.testing.assert_close(found[3], x_BLC[0, 3] @ pair.a_RC.T @ pair.b_OR.T * pair.scale, rtol=1e-5, atol=1e-6)


# The invariants of the specification


def test_a_without_b_it_is_the_base_to_the_bit():
    base = CONFIGS["llama"]().build(seed=3).eval()
    with torch.no_grad():
        expected = base(TOKENS).logits_BLV
    model = model_of(drawn=False)
    for names in (["a", "a"], ["c", "b"], [None, "a"]):
        assert torch.equal(logits(model, names), expected)


def test_b_one_head_is_poly():
    """Poly by its own formula: weights of skills that are the same for all of A and of B."""
    poly = model_of(FINE.replace(heads=1))
    (layer,) = layers(poly)[:1]
    x_LC = torch.randn(4, layer.inventory.a.shape[2])
    weight_K = torch.sigmoid(layer.table.z[1, 0])
    weight_K = weight_K / weight_K.sum()
    a_CR, b_RO = (torch.einsum("k,kxy->xy", weight_K, stack[0]) for stack in (layer.inventory.a, layer.inventory.b))
    torch.testing.assert_close(by_hand(layer, x_LC, "b"), x_LC @ a_CR @ b_RO / 2, rtol=1e-5, atol=1e-6)
    pair = layer.pair("b")
    torch.testing.assert_close(pair.delta(), (a_CR @ b_RO).T / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_b_one_skill_is_lora(heads):
    model = model_of(FINE.replace(skills=1, heads=heads))
    lora = put_on(CONFIGS["llama"]().build(seed=3).eval(), {"blocks.*": LowRank.Config(rank=2, alpha=1.0)})
    ours, theirs = layers(model), [module for module in lora.modules() if isinstance(module, LowRank)]
    with torch.no_grad():
        for one, other in zip(ours, theirs, strict=True):
            other.a.copy_(one.inventory.a[:, 0].flatten(0, 1).T)
            other.b.copy_(torch.cat(list(one.inventory.b[:, 0]), dim=1).T)
        expected = lora(TOKENS).logits_BLV
    torch.testing.assert_close(logits(model, ["a", "c"]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", ["finegrained", "layerwise", "blockwise", "coderwise", "coarsegrained"])
def test_c_weights_add_up_to_one(granularity):
    model = model_of(FINE.replace(granularity=granularity))
    for layer in layers(model):
        alpha_TqK = layer.table.evaluated()
        assert alpha_TqK.shape == (3, 4, 3)
        assert bool((alpha_TqK > 0).all())
        torch.testing.assert_close(alpha_TqK.sum(-1), torch.ones(3, 4), rtol=0, atol=1e-6)


def test_d_the_order_of_skills_does_not_matter():
    model = model_of()
    expected = logits(model, ["a", "c"])
    order_K = torch.tensor([2, 0, 1])
    with torch.no_grad():
        for layer in layers(model):
            for tensor in (layer.inventory.a, layer.inventory.b):
                tensor.copy_(tensor[:, order_K])
            layer.table.z.copy_(layer.table.z[..., order_K])
    torch.testing.assert_close(logits(model, ["a", "c"]), expected, rtol=1e-5, atol=1e-5)


def test_h_saved_and_loaded_it_is_the_same(tmp_path):
    from anabranch.lm import load_model, save_model

    model = model_of(FINE.replace(granularity="blockwise"))
    expected = logits(model, ["b", "a"])
    write_own(tmp_path / "adapter", model)
    other = read_own(tmp_path / "adapter", CONFIGS["llama"]().build(seed=3).eval())
    save_model(tmp_path / "model", model)
    for found in (other, load_model(tmp_path / "model")[0].eval()):
        assert task_names(found) == TASKS
        assert torch.equal(logits(found, ["b", "a"]), expected)


# Where a pass goes


@pytest.mark.parametrize("family", ["llama", "olmoe", "deepseek_v2"])
def test_each_row_is_as_alone(family):
    model = model_of(FINE.replace(granularity="layerwise"), family)
    expected = torch.stack([logits(model, [name] * 2)[row] for row, name in enumerate(["c", "a"])])
    torch.testing.assert_close(logits(model, ["c", "a"]), expected, rtol=1e-4, atol=1e-5)


def test_padding_paths_and_a_cache():
    model, names = model_of(), ["c", "a"]
    whole = logits(model, names)
    cache = model.new_cache(8)
    pieces = [logits(model, names, TOKENS[:, start : start + 2], cache=cache) for start in range(0, 6, 2)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)
    mask_BL = torch.ones_like(TOKENS, dtype=torch.bool)
    mask_BL[0, :2] = False
    padded = logits(model, names, token_mask_BL=mask_BL)
    torch.testing.assert_close(padded[0, 2:], logits(model, ["c"], TOKENS[:1, 2:])[0], rtol=1e-4, atol=1e-5)
    paths = [(0, 1, 1), (1,)]
    mixed = logits(model, names, path=paths)
    for row, (name, path) in enumerate(zip(names, paths, strict=True)):
        alone = logits(model, [name], TOKENS[row : row + 1], path=path)
        torch.testing.assert_close(mixed[row], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("piece", [1, 2, 4])
def test_latents_in_a_cache_have_a_matrix_for_each_task(piece):
    """Also where a piece has as many tokens as a latent has numbers, 8."""
    model, names = model_of(FINE, "deepseek_v2"), ["c", "a"]
    whole, cache = logits(model, names), model.new_cache(6)
    pieces = [logits(model, names, TOKENS[:, start : start + piece], cache=cache) for start in range(0, 6, piece)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_generated_with_a_cache_each_row_goes_on_as_alone():
    """Rows stop at different times, and those that stay keep their tasks."""
    model = model_of()
    prompts, names = [[3, 17, 60], [5], [8, 8]], ["c", "a", "b"]
    sampling = SamplingConfig(max_tokens=12, temperature=0.0)
    free = []
    for prompt, name in zip(prompts, names, strict=True):
        with on_tasks(model, name):
            free += generate(model, [prompt], sampling)
    # The third token that the first row makes ends rows.
    sampling = sampling.replace(stop=(free[0][2],))
    alone = []
    for prompt, name in zip(prompts, names, strict=True):
        with on_tasks(model, [name]):
            alone += generate(model, [prompt], sampling)
    with on_tasks(model, names):
        assert generate(model, prompts, sampling) == alone
    assert len({len(made) for made in alone}) > 1
    with pytest.raises(InputError, match="no task is told"):
        model(TOKENS)


def test_beams_keep_the_task_of_their_row():
    model = model_of()
    with torch.no_grad(), on_tasks(model, ["c", "a"]):
        cache = model.new_cache(8)
        model(TOKENS[:, :3], cache=cache)
        cache.keep_rows(torch.tensor([0, 0, 1, 1, 1]))
        found = model(TOKENS[[0, 0, 1, 1, 1], 3:5], cache=cache).logits_BLV
        repeated = model(TOKENS.repeat_interleave(3, dim=0)).logits_BLV
    expected = logits(model, ["c", "a"], TOKENS[:, :5])[:, 3:]
    torch.testing.assert_close(found, expected[[0, 0, 1, 1, 1]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(repeated, logits(model, ["c", "a"]).repeat_interleave(3, dim=0), rtol=1e-4, atol=1e-5)
    with on_tasks(model, ["c", "a", "b"]), pytest.raises(InputError, match="2 rows, and 3 tasks"):
        model(TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"heads": 1, "mixes": "outputs"}], ids=["weights", "outputs"])
def test_compiled_it_is_the_same(options):
    model = model_of(FINE.replace(**options), pattern="*.attention.q")
    expected = logits(model, ["c", "a"])
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(logits_of(compiled, model, ["c", "a"]), expected, rtol=1e-4, atol=1e-5)


def logits_of(called, model, names):
    with torch.no_grad():
        return called(TOKENS, state=task_rows(model, names, TOKENS.shape[1])).logits_BLV


def test_gradients_of_a_mixed_batch_are_those_of_its_rows():
    model = model_of(FINE.replace(granularity="blockwise"))
    model.train()

    def gradients(names, rows):
        model.zero_grad()
        state = task_rows(model, names, 5)
        model(TOKENS[rows, :-1], TOKENS[rows, 1:], state=state).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    both, first, second = gradients(["c", "a"], [0, 1]), gradients(["c"], [0]), gradients(["a"], [1])
    assert both.keys() == first.keys()
    for name, value in both.items():
        torch.testing.assert_close(value, (first[name] + second[name]) / 2, rtol=1e-3, atol=1e-6)
    assert bool((both["shared.routing_table_blocks_0.z"][1] == 0).all())  # nobody was of task b


def test_recomputed_gradients_are_the_same():
    model = model_of(FINE.replace(weights=Weights(relaxed=True)))
    model.train()

    def gradients(recompute):
        model.recompute = recompute
        model.zero_grad()
        torch.manual_seed(0)
        model(TOKENS[:, :-1], TOKENS[:, 1:], state=task_rows(model, ["c", "a"], 5)).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(one, other)


def test_a_base_in_sixteen_bits_with_an_adapter_in_thirty_two():
    model = put_on(CONFIGS["llama"]().build(seed=3).to(torch.bfloat16).eval(), ALL)
    assert {layer.inventory.a.dtype for layer in layers(model)} == {torch.float32}
    assert logits(model, ["a", "b"]).dtype == torch.bfloat16


def test_mixing_outputs_is_a_sum_of_skills():
    layer = layers(model_of(FINE.replace(heads=1, mixes="outputs"), pattern="blocks.0.attention.q"))[0]
    x_BLC = torch.randn(2, 3, 32)
    task_BL = torch.tensor([[2], [0]]).expand(2, 3)
    found = Told(task_BL)(layer, x_BLC)
    alpha_TK = layer.table.evaluated()[:, 0]
    for row, task in ((0, 2), (1, 0)):
        skills = zip(alpha_TK[task], layer.inventory.a[0], layer.inventory.b[0], strict=True)
        expected = sum(weight * (x_BLC[row] @ a @ b) for weight, a, b in skills) / 2
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)
        pair = layer.pair(TASKS[task])
        assert pair.rank == 6
        torch.testing.assert_close(x_BLC[row] @ pair.delta().T, expected, rtol=1e-4, atol=1e-5)


# What is shared, counted, and refused


@pytest.mark.parametrize(
    ("granularity", "tables"),
    [("finegrained", 14), ("layerwise", 4), ("blockwise", 2), ("coderwise", 1), ("coarsegrained", 1)],
)
def test_layers_of_a_bin_share_a_table(granularity, tables):
    model = model_of(FINE.replace(granularity=granularity))
    found = [module for module in model.modules() if isinstance(module, RoutingTable)]
    assert len(found) == tables
    assert len({id(layer.table) for layer in layers(model)}) == tables
    assert model.config.count().parameters == sum(parameter.numel() for parameter in model.parameters())


def test_bins_by_hand():
    names = ["blocks.3.attention.q", "blocks.3.feed_forward.experts.5.down", "head", "shared.experts_0.5.down"]
    assert [bin_of(name, "finegrained") for name in names] == [None] * 4
    assert [bin_of(name, "layerwise") for name in names] == [
        "blocks.3.attention",
        "blocks.3.feed_forward",
        "head",
        "shared.experts_0",
    ]
    assert [bin_of(name, "blockwise") for name in names] == ["blocks.3", "blocks.3", "head", "shared.experts_0"]
    assert {bin_of(name, "coarsegrained") for name in names} == {"all"}


def test_heads_that_do_not_divide_name_the_layer():
    with pytest.raises(ConfigError, match=r"heads is 5, .* 32 inputs of blocks\.0\.attention\.q; 4 does"):
        put_on(CONFIGS["llama"]().build(), {"blocks.*": FINE.replace(heads=5)})
    config = CONFIGS["llama"]()
    with pytest.raises(ConfigError, match=r"heads is 3, .* of blocks\.1\.feed_forward\.down"):
        config.replace(linears={"blocks.1.feed_forward.down": FINE.replace(heads=3)})
    with pytest.raises(ConfigError, match="heads is 3, which does not divide the 8 outputs of mine"):
        AdapterInventory(9, 8, heads=3, layer="mine")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"skills": 0}, "skills is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"heads": 0}, "heads is 0"),
        ({"tasks": ()}, "tasks"),
        ({"tasks": ("a", "b", "a")}, "'a' twice"),
        ({"mixes": "outputs"}, "heads is 4; set heads to 1"),
        ({"alpha": float("nan")}, "alpha is nan"),
    ],
)
def test_sizes_that_cannot_be(change, told):
    with pytest.raises(ConfigError, match=told):
        FINE.replace(**change)


def test_layers_of_a_bin_must_agree():
    other = FINE.replace(skills=2, granularity="coarsegrained")
    linears = {"*.attention.q": FINE.replace(granularity="coarsegrained"), "*.attention.k": other}
    with pytest.raises(ConfigError, match=r"blocks\.0\.attention\.k shares the table of 'all'"):
        CONFIGS["llama"]().replace(linears=linears).build()


def on_all(model, name):
    with on_tasks(model, name, unknown="average"):
        pass


def test_tasks_that_there_are_not():
    model = model_of()
    with pytest.raises(InputError, match=r"task 'd' is not one of the 3 .* 'a', 'b', 'c'"):
        task_rows(model, ["a", "d"], 6)
    model.train()
    for told in (lambda: task_rows(model, ["a", "d"], 6, unknown="average"), lambda: on_all(model, "d")):
        with pytest.raises(InputError, match=r"task 'd' is not one of the 3 .*in training, where unknown='average'"):
            told()
    assert task_rows(model, [None], 6, unknown="average")[TASK].unique().tolist() == [-1]
    model.eval()
    averaged = task_rows(model, ["a", "d"], 6, unknown="average")
    with torch.no_grad():
        found = model(TOKENS, state=averaged).logits_BLV
    torch.testing.assert_close(found, logits(model, ["a", None]), rtol=0, atol=0)
    assert not torch.equal(found, logits(model, ["a", "b"]))
    with pytest.raises(ConfigError, match="unknown is 'no'"):
        task_rows(model, ["a"], 6, unknown="no")
    with pytest.raises(ConfigError, match="no layer of the model routes by task"):
        task_names(CONFIGS["llama"]().build())
    table = layers(model)[0].table
    with pytest.raises(InputError, match="task number 3 is told, and the routing table has 3 tasks"):
        table(torch.tensor([0, 3]))
    with pytest.raises(ConfigError, match="named twice"):
        RoutingTable(["a", "a"], 1, 2)


def test_tasks_of_another_pass():
    model = model_of()
    with pytest.raises(InputError, match="tasks are told for 6 tokens of a pass of 12"):
        model(TOKENS, state=task_rows(model, ["a"], 6))


def test_layers_by_other_tasks_in_one_model():
    linears = {"*.attention.q": FINE, "*.attention.k": FINE.replace(tasks=("x", "y"))}
    model = put_on(CONFIGS["llama"]().build(), linears)
    with pytest.raises(ConfigError, match="route by other tasks"):
        task_names(model)


def test_experts_get_the_tasks_of_their_tokens():
    layer = MoE.Config(num_experts=2, hidden_dim=8)
    config = Decoder.Config(
        vocab_size=61,
        dim=32,
        num_layers=1,
        attention=SelfAttention.Config(num_heads=4),
        feed_forward=layer,
        max_positions=64,
    )
    model = put_on(config.build(seed=1).eval(), {"*.experts.*.down": FINE})
    with torch.no_grad():
        for layer in layers(model):
            layer.inventory.b.normal_(generator=torch.Generator().manual_seed(3))
    base = logits(model, ["a", "a"])
    expected = torch.stack([base[0], logits(model, ["b", "b"])[1]])
    torch.testing.assert_close(logits(model, ["a", "b"]), expected, rtol=1e-4, atol=1e-5)
