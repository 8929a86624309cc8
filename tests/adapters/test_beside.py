"""Mixtures in models that are not ours: transformers' Mamba and Llama, and modules of torch."""

import pytest
import torch
from torch import nn

from adapter_models import make_adapter
from anabranch.adapters import (
    Labelled,
    fit_router,
    labelled_rows,
    load_fitted,
    load_mixture,
    mixture_report,
    read_peft,
    static_mixture,
    write_peft,
)
from anabranch.adapters.beside import Beside, passing
from anabranch.adapters.lora_mixer import mixed_layers
from anabranch.errors import CheckpointError, ConfigError
from anabranch.train import Constant, TrainConfig

transformers = pytest.importorskip("transformers")
TOKENS = torch.tensor([[3, 17, 60, 8, 8, 41], [0, 5, 22, 1, 59, 30]])
MAMBA = ["in_proj", "x_proj", "dt_proj", "out_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def mamba():
    config = transformers.MambaConfig(
        vocab_size=61,
        hidden_size=16,
        state_size=4,
        num_hidden_layers=2,
        intermediate_size=32,
        time_step_rank=3,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.MambaForCausalLM(config).eval()


def llama(**changes):
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 61,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "initializer_range": 0.3,
            **changes,
        }
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def linears(model, words):
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[-1] in words
    }


MODELS = {"mamba": (mamba, MAMBA), "llama": (llama, ATTENTION)}


@pytest.fixture(scope="module", params=MODELS)
def place(request, tmp_path_factory):
    """(how to make the model, adapter folders by name, their scales): of other ranks and layers."""
    make, words = MODELS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    layers = linears(make(), words)
    make_adapter(root / "a", layers, seed="a", rank=4)
    make_adapter(root / "b", layers, seed="b", rank=2, use_rslora=True)
    make_adapter(root / "c", linears(make(), words[-1:]), seed="c", rank=3)
    return make, {name: root / name for name in "abc"}


def logits(model, **options):
    with torch.no_grad():
        return model(TOKENS, use_cache=False, **options).logits


def changed(make, folder, weight=1.0):
    """The model with an adapter in its matrices, by the formula."""
    model = make()
    with torch.no_grad():
        for name, pair in read_peft(folder).pairs.items():
            model.get_submodule(name).weight += weight * pair.delta()
    return model


def hard(expert):
    return labelled_rows(torch.full((2,), expert), 6)


def test_each_expert_alone_is_its_adapter(place):
    """All projections of a state space are adapted, also the one that the model multiplies by and never calls."""
    make, folders = place
    model = load_mixture(folders, make())
    for number, name in enumerate(folders):
        with passing(model, labels=hard(number), length=6) as seen:
            found = logits(model)
        torch.testing.assert_close(found, logits(changed(make, folders[name])), rtol=1e-4, atol=1e-5)
        assert len(seen.called) == len([module for module in model.modules() if isinstance(module, Beside)])
    assert not torch.allclose(logits(model), logits(make()))


def test_with_all_b_zero_it_is_the_base_to_the_bit(place):
    make, folders = place
    model = load_mixture(folders, make())
    for layer in mixed_layers(model).values():
        layer.pool.b.data.zero_()
    assert torch.equal(logits(model), logits(make()))


def test_a_static_mixture_is_one_adapter(place, tmp_path):
    make, folders = place
    model = load_mixture(folders, make())
    write_peft(tmp_path / "made", static_mixture(model, (0.5, 1.0, -1.0)))
    found = changed(make, tmp_path / "made")
    expected = make()
    with torch.no_grad():
        for name, weight in zip(folders, (0.5, 1.0, -1.0), strict=True):
            for module, pair in read_peft(folders[name]).pairs.items():
                expected.get_submodule(module).weight += weight * pair.delta()
    torch.testing.assert_close(logits(found), logits(expected), rtol=1e-4, atol=1e-5)


def test_routers_learn_and_all_else_stays(place, tmp_path):
    make, folders = place
    model = load_mixture(folders, make())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = Labelled.of([([1, 2, 3 + row % 7], [9 + row % 2], "ab"[row % 2]) for row in range(8)], "abc")
    train = TrainConfig(steps=4, batch_size=4, learning_rate=0.05, schedule=Constant.Config(), device="cpu")
    fitted = fit_router(model, rows, tmp_path / "run", train=train, held_out=rows)
    state = model.state_dict()
    moved = [name for name, value in before.items() if not torch.equal(value, state[name])]
    assert moved
    assert all(".router." in name for name in moved)
    assert set(fitted.report.routers[0].by_task) == {0, 1}
    again = load_mixture(folders, make())
    train = train.replace(steps=6)
    fit_router(again, rows, tmp_path / "run", train=train, held_out=rows, resume=True)
    straight = load_mixture(folders, make())
    fit_router(straight, rows, tmp_path / "straight", train=train, held_out=rows)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def continued(model, token_L, count):
    """Greedy, each token by a pass over all before it."""
    with torch.no_grad():
        for _ in range(count):
            token_L = torch.cat([token_L, model(token_L[None], use_cache=False).logits[0, -1].argmax()[None]])
    return token_L


def test_it_is_trained_stored_and_used_from_files_alone(place, tmp_path):
    """A model and adapters in folders, rows; routers learn, are read back, and generation with a cache or a state uses them."""
    make, folders = place
    make().save_pretrained(tmp_path / "base")

    def opened():
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
        return load_mixture(folders, base, top_k=2)

    model = opened()
    rows = Labelled.of([([1, 2, 3 + row % 7], [9 + row % 2], "ab"[row % 2]) for row in range(8)], "abc")
    train = TrainConfig(steps=4, batch_size=4, learning_rate=0.5, schedule=Constant.Config(), device="cpu")
    fitted = fit_router(model, rows, tmp_path / "run", train=train)
    again = opened()
    fresh = logits(again)
    assert load_fitted(fitted.result.checkpoint, again) is again
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), fresh)
    with pytest.raises(ConfigError, match="has no mixed layers; put some on with load_mixture"):
        load_fitted(fitted.result.checkpoint, make())
    with pytest.raises(CheckpointError, match="no weights in"):
        load_fitted(tmp_path / "base" / "none", again)
    found = again.generate(TOKENS[:1, :4], max_new_tokens=6, do_sample=False, eos_token_id=-1)
    assert found[0].tolist() == continued(model, TOKENS[0, :4], 6).tolist()


def checkpointed_by(model):
    """Switch on transformers' own, which has had two names."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


@pytest.fixture
def load_llama(tmp_path):
    """Makes mixtures of two adapters of all of attention."""
    for name in "ab":
        make_adapter(tmp_path / name, linears(llama(), ATTENTION), seed=name)
    return lambda model, **options: load_mixture({name: tmp_path / name for name in "ab"}, model, **options)


def test_losses_come_out_once_where_parts_run_again(load_llama):
    model = load_llama(llama())
    model.train()
    for layer in mixed_layers(model).values():
        layer.router.requires_grad_(True)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpointed_by(model)
        model.zero_grad()
        with passing(model, labels=labelled_rows(torch.tensor([0, 1]), 6, soft=0.5, alignment=0.1), length=6) as seen:
            output = model(TOKENS, use_cache=False).logits
            losses = seen.losses()
            (output.square().mean() + sum(losses.values())).backward()
        # Of each of the four routers once, also of those that ran again.
        assert {name: len(values) for name, values in seen.context.losses.items()} == {
            "specialisation": 4,
            "task_alignment": 4,
        }
        found.append((losses, [layer.router.score.weight.grad.clone() for layer in mixed_layers(model).values()]))
    (plain, plain_grads), (again, again_grads) = found
    assert plain.keys() == {"specialisation", "task_alignment"}
    for name in plain:
        torch.testing.assert_close(again[name], plain[name])
    for one, other in zip(again_grads, plain_grads, strict=True):
        torch.testing.assert_close(one, other)


def test_one_router_for_queries_keys_and_values(load_llama):
    model = load_llama(llama())
    names = [name for name, _ in model.named_parameters() if name.endswith("router.score.weight")]
    assert [name.split(".")[-5] for name in names] == ["q_proj", "o_proj"] * 2
    assert {layer.group.size for layer in mixed_layers(model).values()} == {1, 3}
    apart = load_llama(llama(), groups={})
    assert len([1 for name, _ in apart.named_parameters() if name.endswith("router.score.weight")]) == 8


def test_padding_neither_routes_nor_counts(load_llama):
    model = load_llama(llama())
    mask = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    report = mixture_report(model, [(TOKENS, mask, None)])
    assert {facts.tokens for facts in report.routers} == {10}
    with passing(model, mask_BL=mask):
        found = model(TOKENS, attention_mask=mask.long(), use_cache=False).logits
        alone = None
    with passing(model, length=4):
        alone = model(TOKENS[:1, 2:], use_cache=False).logits
    torch.testing.assert_close(found[:1, 2:], alone, rtol=1e-4, atol=1e-5)


class Fused(nn.Module):
    """Queries, keys and values in one matrix, as some models have them."""

    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict({"qkv_proj": nn.Linear(8, 14), "o_proj": nn.Linear(6, 8)})

    def forward(self, x):
        return self.attention["o_proj"](self.attention["qkv_proj"](x)[..., :6])


def test_parts_of_a_fused_matrix(tmp_path):
    parts = {"attention.q_proj": (8, 6), "attention.v_proj": (8, 4)}
    make_adapter(tmp_path / "a", parts, seed="a", rank=2)
    make_adapter(tmp_path / "b", {"attention.k_proj": (8, 4), "attention.o_proj": (6, 8)}, seed="b", rank=3)
    fused = {"qkv_proj": (("q_proj", 6), ("k_proj", 4), ("v_proj", 4))}
    torch.manual_seed(0)
    base = Fused()
    x = torch.randn(2, 3, 8)
    model = Fused()
    model.load_state_dict(base.state_dict())
    load_mixture({name: tmp_path / name for name in "ab"}, model, fused=fused)
    pairs = read_peft(tmp_path / "a").pairs
    with passing(model, labels=labelled_rows(torch.zeros(2, dtype=torch.int64), 3), length=3):
        found = model.attention["qkv_proj"](x)
        model.attention["o_proj"](found[..., :6])
    whole = base.attention["qkv_proj"](x)
    expected = torch.cat(
        [
            whole[..., :6] + x @ pairs["attention.q_proj"].delta().T,
            whole[..., 6:10],
            whole[..., 10:] + x @ pairs["attention.v_proj"].delta().T,
        ],
        -1,
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert mixed_layers(model)["attention.o_proj"].config.closed == (0,)
    with pytest.raises(
        CheckpointError, match=r"a adapts attention\.q_proj with 8 inputs and 6 outputs, and the model's has 8 and 14"
    ):
        load_mixture(
            {name: tmp_path / name for name in "ab"},
            Fused(),
            fused={"qkv_proj": (("q_proj", 6), ("k_proj", 4), ("v_proj", 5))},
        )


def test_a_matrix_is_multiplied_by_in_any_way(load_llama):
    model = load_llama(llama())
    place = model.model.layers[0].self_attn.o_proj
    x = torch.randn(2, 3, 16)
    expected = place(x)
    with torch.no_grad():
        torch.testing.assert_close((place.weight @ x.transpose(1, 2)).transpose(1, 2), expected)
        torch.testing.assert_close(torch.matmul(place.weight, x.transpose(1, 2)).transpose(1, 2), expected)
        torch.testing.assert_close(nn.functional.linear(x, place.weight), expected)
        torch.testing.assert_close(place.weight @ x[0, 0], expected[0, 0])
        torch.testing.assert_close(nn.functional.linear(input=x, weight=place.weight, bias=place.bias), expected)
        torch.testing.assert_close(nn.functional.linear(x, weight=place.weight.to(x.dtype)), expected)
        torch.testing.assert_close(
            nn.functional.linear(x.double(), place.weight.double()), expected.double(), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(place(input=x), expected)
    assert place.weight.dtype == torch.float32
    assert (place.in_features, place.out_features, place.bias) == (16, 16, None)


class PastIt(nn.Module):
    """Reads a matrix in a way that nobody can add to."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.one(x) + torch.einsum("oc,nc->no", self.two.weight, x)


def test_what_is_passed_by_is_told(tmp_path):
    for name in "ab":
        make_adapter(tmp_path / name, {"one": (4, 4), "two": (4, 4)}, seed=name)
    model = load_mixture({name: tmp_path / name for name in "ab"}, PastIt())
    with (
        pytest.raises(
            ConfigError, match=r"the model reads the matrix of two and does not call it \(einsum\), as fused kernels do"
        ),
        passing(model),
    ):
        model(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("layers", "extra", "error", "message"),
    [
        ({"three": (4, 4)}, {}, CheckpointError, "b adapts three, which the model has not; is it another model's"),
        ({"one": (4, 5)}, {}, CheckpointError, "b adapts one with 4 inputs and 5 outputs, and the model's has 4 and 4"),
        ({"norm": (4, 4)}, {}, CheckpointError, "b adapts norm, which is a LayerNorm in the model and no linear layer"),
        (
            {"one": (4, 4)},
            {"norm.weight": torch.ones(4)},
            ConfigError,
            r"b brings norm\.weight, which has no place in a mixture",
        ),
    ],
)
def test_adapters_that_do_not_fit(tmp_path, layers, extra, error, message):
    make_adapter(tmp_path / "a", {"one": (4, 4)}, seed="a")
    make_adapter(tmp_path / "b", layers, seed="b", extra=extra, modules_to_save=["norm"] if extra else None)
    model = PastIt()
    model.norm = nn.LayerNorm(4)
    with pytest.raises(error, match=message):
        load_mixture({name: tmp_path / name for name in "ab"}, model)
    assert not any(isinstance(module, Beside) for module in model.modules())


def test_adapters_of_other_kinds_are_refused(tmp_path):
    """What they hold besides A and B would be left out without a word."""
    make_adapter(tmp_path / "a", {"one": (4, 4)}, seed="a")
    extra = {"one.lora_magnitude_vector": torch.ones(4)}
    make_adapter(tmp_path / "b", {"one": (4, 4)}, seed="b", use_dora=True, extra=extra)
    with pytest.raises(ConfigError, match="adapter 'b' is DoRA, and routers choose among plain LoRA alone"):
        load_mixture({name: tmp_path / name for name in "ab"}, PastIt())


def test_a_second_mixture_and_a_models_own_checkpointing_are_refused(load_llama, tmp_path):
    model = load_llama(llama())
    with pytest.raises(ConfigError, match="has a mixture already"):
        load_llama(model)
    checkpointed_by(model)
    rows = Labelled.of([([1, 2], [3], "a")], "ab")
    with pytest.raises(ConfigError, match="own gradient checkpointing is on"):
        fit_router(model, rows, tmp_path / "run", train=TrainConfig(steps=1, batch_size=1))


# Matrices that lie turned


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=61,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_inner=24,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


TURNED = ["c_attn", "c_proj", "c_fc"]


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    """Adapter folders for all Conv1D of GPT-2, as peft writes them: halves as beside linear layers, and ``fan_in_fan_out`` told."""
    root = tmp_path_factory.mktemp("gpt2")
    layers = {
        name: tuple(module.weight.shape) for name, module in gpt2().named_modules() if name.split(".")[-1] in TURNED
    }
    assert len(layers) == 8
    for seed, (name, words) in enumerate({"a": TURNED, "b": ["c_attn", "c_fc"], "c": ["c_attn"]}.items()):
        chosen = {place: size for place, size in layers.items() if place.split(".")[-1] in words}
        make_adapter(root / name, chosen, seed=name, rank=2 + seed, fan_in_fan_out=True)
    return {name: root / name for name in "abc"}


def test_each_expert_alone_is_its_adapter_in_turned_matrices(turned):
    model = load_mixture(turned, gpt2())
    for number, name in enumerate(turned):
        plain = gpt2()
        with torch.no_grad():
            for place, pair in read_peft(turned[name]).pairs.items():
                plain.get_submodule(place).weight += pair.delta().T
        with passing(model, labels=hard(number), length=6):
            found = logits(model)
        torch.testing.assert_close(found, logits(plain), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(found, logits(gpt2()))
    # Code that reads such a matrix sees it as it lies.
    assert mixed_layers(model).keys() == {
        name for name in dict(gpt2().named_modules()) if name.split(".")[-1] in TURNED
    }
    beside = model.transformer.h[0].attn.c_attn
    assert (beside.in_features, beside.out_features, tuple(beside.weight.shape)) == (16, 48, (16, 48))


class DenseTurned(nn.Module):
    """x W + b + sum_e p_e scale_e B_e A_e x, all experts for each token, by the formula."""

    def __init__(self, matrix, layer, top_k):
        super().__init__()
        self.matrix, self.layer, self.top_k = matrix, layer, top_k
        self.router = nn.Parameter(layer.router.score.weight.detach().clone())
        self.a = nn.Parameter(layer.pool.a.detach().clone())

    def forward(self, x):
        logit = x @ self.router.T
        for expert in self.layer.config.closed:
            logit = logit.masked_fill(torch.arange(logit.shape[-1]) == expert, float("-inf"))
        share = logit.softmax(-1)
        if not self.training:
            best = share.topk(self.top_k, -1).indices
            share = share * torch.zeros_like(share).scatter(-1, best, 1.0)
            share = share / share.sum(-1, keepdim=True)
        y = x @ self.matrix.weight + self.matrix.bias
        for expert, scale in enumerate(self.layer.pool.scales):
            y = y + share[..., expert, None] * scale * (x @ self.a[expert].T @ self.layer.pool.b[expert].T)
        return y


@pytest.mark.parametrize("training", [True, False])
def test_a_mixture_in_turned_matrices_is_the_dense_formula_with_its_gradient(turned, training):
    model, dense = load_mixture(turned, gpt2(), top_k=2), gpt2()
    with torch.no_grad():
        for layer in mixed_layers(model).values():
            layer.router.score.weight.mul_(5)
    for name, layer in mixed_layers(model).items():
        owner, _, leaf = name.rpartition(".")
        setattr(dense.get_submodule(owner), leaf, DenseTurned(dense.get_submodule(name), layer, 2))
    for each in (model, dense):
        # Without dropout, which GPT-2 has in training.
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        each.train(training)
    weight = torch.randn(*TOKENS.shape, 61, generator=torch.Generator().manual_seed(4))
    with passing(model, length=6):
        found = model(TOKENS, use_cache=False).logits
        (found * weight).sum().backward()
    wanted = dense(TOKENS, use_cache=False).logits
    (wanted * weight).sum().backward()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    for name, layer in mixed_layers(model).items():
        own = dense.get_submodule(name)
        size = own.router.grad.abs().max()
        # A router with one expert that is open has nothing to learn.
        assert (size > 1e-3) == (len(layer.config.closed) < 2), name
        torch.testing.assert_close(layer.router.score.weight.grad, own.router.grad, rtol=1e-3, atol=1e-4)
        assert layer.pool.a.grad is None


def test_routers_learn_in_turned_matrices(turned, tmp_path):
    model = load_mixture(turned, gpt2())
    rows = Labelled.of([([1, 2, 3], [4, 5], "a"), ([9, 8], [7, 6], "b"), ([3, 3], [1, 2], "c")] * 2, ("a", "b", "c"))
    before = {name: layer.router.score.weight.detach().clone() for name, layer in mixed_layers(model).items()}
    fitted = fit_router(model, rows, tmp_path / "run", train=TrainConfig(steps=2, batch_size=3))
    assert any(not torch.equal(layer.router.score.weight, before[name]) for name, layer in mixed_layers(model).items())
    again = load_fitted(fitted.result.checkpoint, load_mixture(turned, gpt2()))
    assert torch.equal(logits(again), logits(model.eval()))


def test_sizes_of_a_turned_matrix_are_checked(tmp_path):
    make_adapter(tmp_path / "a", {"transformer.h.0.attn.c_attn": (48, 16)}, seed="a")
    make_adapter(tmp_path / "b", {"transformer.h.0.attn.c_attn": (16, 48)}, seed="b")
    with pytest.raises(CheckpointError, match="with 48 inputs and 16 outputs, and the model's has 16 and 48"):
        load_mixture({name: tmp_path / name for name in "ab"}, gpt2())
