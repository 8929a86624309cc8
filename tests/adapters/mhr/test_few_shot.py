"""New tasks at three prices, the average, and plain LoRA of a task: invariants of the specification, to the bit where it says so."""

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import torch

from adapter_models import CONFIGS, TOKENS, drawn, make_base
from anabranch.adapters import LowRank, load_peft, merge, unmerge, write_peft
from anabranch.adapters.mhr import (
    MultiHeadRouted,
    RoutingTable,
    adapt,
    diagnose,
    gradient_alignment,
    merge_task,
    mu,
    to_single_lora,
)
from anabranch.adapters.mhr.measure import Diagnosis, shared_numbers
from anabranch.adapters.put_on import put_on
from anabranch.adapters.tasks import task_names, task_rows
from anabranch.errors import ConfigError, InputError
from anabranch.lm import load_model

TASKS = ("a", "b")
CONFIG = MultiHeadRouted.Config(tasks=TASKS, skills=3, heads=2, rank=2, alpha=3.0)
GOLDEN = Path(__file__).with_name("poly_golden.json")
HAS_PEFT = importlib.util.find_spec("peft") is not None


def model_of(config=CONFIG, base=None):
    model = put_on(CONFIGS["llama"]().build(seed=3).eval() if base is None else base, {"blocks.*": config}, seed=1)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def logits(model, names=None):
    state = None if names is None else task_rows(model, names, TOKENS.shape[1])
    with torch.no_grad():
        return model(TOKENS, state=state).logits_BLV


def layers(model):
    return [module for module in model.modules() if isinstance(module, MultiHeadRouted)]


def skills_of(model):
    return [tensor.detach().clone() for layer in layers(model) for tensor in (layer.inventory.a, layer.inventory.b)]


def trained(model, names=None, steps=3):
    """A few steps of AdamW on everything that learns."""
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=0.05)
    model.train()
    for _ in range(steps):
        state = None if names is None else task_rows(model, names, TOKENS.shape[1] - 1)
        model(TOKENS[:, :-1], TOKENS[:, 1:], state=state).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("granularity", ["finegrained", "blockwise", "coarsegrained"])
def test_f_mhr_z_trains_the_table_alone(granularity):
    model = model_of(CONFIG.replace(granularity=granularity))
    before, base = skills_of(model), model.embedding.weight.detach().clone()
    adapt(model, "new", mode="z")
    assert task_names(model) == ("new",)
    tables = [module for module in model.modules() if isinstance(module, RoutingTable)]
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count == len(tables) * 2 * 3
    rows = [table.z.detach().clone() for table in tables]
    assert max(float(row.abs().max()) for row in rows) <= 1e-3
    trained(model, ["new", "new"])
    assert all(torch.equal(one, other) for one, other in zip(before, skills_of(model), strict=True))
    assert torch.equal(model.embedding.weight, base)
    assert all(not torch.equal(row, table.z) for row, table in zip(rows, tables, strict=True))


def test_full_trains_skills_and_a_fresh_row():
    model = model_of()
    before = skills_of(model)
    adapt(model, ["new", "newer"], mode="full", seed=4)
    assert task_names(model) == ("new", "newer")
    assert all(torch.equal(one, other) for one, other in zip(before, skills_of(model), strict=True))
    trained(model, ["newer", "new"])
    assert all(not torch.equal(one, other) for one, other in zip(before, skills_of(model), strict=True))


def test_random_draws_skills_anew():
    model = model_of()
    before = skills_of(model)
    adapt(model, "new", mode="random")
    after = skills_of(model)
    assert all(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(bool((b == 0).all()) for b in after[1::2])
    assert all(layer.inventory.a.requires_grad and layer.table.z.requires_grad for layer in layers(model))


@pytest.mark.parametrize("mixes", ["weights", "outputs"])
def test_e_mu_is_what_equal_weights_give(mixes):
    config = CONFIG if mixes == "weights" else CONFIG.replace(heads=1, mixes="outputs")
    expected = logits(model_of(config), [None, None])
    for redundant in (False, True):
        model = adapt(model_of(config), mode="mu", redundant=redundant)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
        learns = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert learns
        assert not any(name.endswith(".z") for name in learns)
        kinds = {type(layer.config) for layer in model.modules() if isinstance(layer, LowRank | MultiHeadRouted)}
        assert kinds == {MultiHeadRouted.Config if redundant else LowRank.Config}
        trained(model)
        assert not torch.allclose(logits(model), expected, rtol=1e-3, atol=1e-3)


def test_weights_that_are_equal_are_mu():
    model = model_of()
    with torch.no_grad():
        for layer in layers(model):
            layer.table.z.fill_(0.3)
    torch.testing.assert_close(logits(model, ["a", "b"]), logits(model, [None, None]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"mode": "half"}, "mode is 'half'; use one of full, z, mu, random"),
        ({"mode": "mu", "tasks": "x"}, "knows no task"),
        ({"mode": "z"}, "name at least one"),
        ({"mode": "full", "tasks": "x", "redundant": True}, "redundant is for mode 'mu'"),
    ],
)
def test_what_cannot_be_asked(given, told):
    model = model_of()
    with pytest.raises(ConfigError, match=told):
        adapt(model, given.pop("tasks", ()), **given)
    assert task_names(model) == TASKS


def test_models_without_such_layers():
    plain = CONFIGS["llama"]().build()
    for call in (lambda: adapt(plain, "x"), lambda: mu(plain), lambda: to_single_lora(plain, "x")):
        with pytest.raises(ConfigError, match="no MultiHeadRouted layers"):
            call()
    mixed = put_on(plain, {"*.attention.q": CONFIG, "*.attention.k": LowRank.Config()})
    with pytest.raises(ConfigError, match="a LowRank beside it"):
        mu(mixed)
    with pytest.raises(InputError, match="task 'x' is not one of"):
        to_single_lora(model_of(), "x")


# Plain LoRA of a task


@pytest.mark.parametrize("task", ["a", "b", None])
def test_a_task_as_plain_lora_gives_the_same(tmp_path, task):
    make_base(tmp_path / "base", "llama")
    model = model_of(base=load_model(tmp_path / "base")[0].eval())
    expected = logits(model, [task, task])
    write_peft(tmp_path / "one", mu(model) if task is None else to_single_lora(model, task))
    single = load_peft(tmp_path / "one", load_model(tmp_path / "base")[0].eval())
    torch.testing.assert_close(logits(single), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(merge_task(model, task)), expected, rtol=1e-5, atol=1e-5)
    # Into the matrices, and out of them again.
    before = {name: tensor.clone() for name, tensor in single.state_dict().items()}
    merge(single)
    torch.testing.assert_close(logits(single), expected, rtol=1e-4, atol=1e-4)
    unmerge(single)
    for name, tensor in single.state_dict().items():
        assert float((tensor - before[name]).norm()) <= 1e-5 * float(before[name].norm())


# peft's Poly


def poly_golden():
    return json.loads(GOLDEN.read_text())


def poly_numbers(model):
    """The numbers of a Poly adapter, drawn by name: of ours, and as `write_poly_golden` gives them to peft."""
    with torch.no_grad():
        for layer in layers(model):
            layer.inventory.a.copy_(drawn(f"{layer.name}.A", layer.inventory.a.shape))
            layer.inventory.b.copy_(drawn(f"{layer.name}.B", layer.inventory.b.shape))
            layer.table.z.copy_(drawn(f"{layer.name}.Z", layer.table.z.shape) * 4)
    return model


POLY = MultiHeadRouted.Config(tasks=("0", "1", "2"), skills=3, heads=2, rank=2)
NAMES = {"q": "self_attn.q_proj", "v": "self_attn.v_proj"}


def test_g_outputs_are_those_of_pefts_poly(tmp_path):
    make_base(tmp_path / "base", "llama")
    model = put_on(load_model(tmp_path / "base")[0].eval(), {"*.attention.q": POLY, "*.attention.v": POLY})
    found = logits(poly_numbers(model), ["2", "0"])
    expected = torch.tensor(poly_golden())
    torch.testing.assert_close(found[:, -1], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.skipif(not HAS_PEFT, reason="peft is not installed")
@pytest.mark.filterwarnings("ignore")
def test_the_golden_is_what_peft_computes(tmp_path):
    torch.testing.assert_close(torch.tensor(poly_golden()), poly_of_peft(tmp_path), rtol=1e-4, atol=2e-5)


def poly_of_peft(folder):
    """peft's logits of the last tokens, in evaluation, with the numbers of `poly_numbers`."""
    import transformers
    from peft import PolyConfig, get_peft_model

    make_base(folder / "base", "llama")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    config = PolyConfig(poly_type="poly", r=2, n_tasks=3, n_skills=3, n_splits=2, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for block, (part, module) in itertools.product(range(2), NAMES.items()):
            layer = model.get_submodule(f"base_model.model.model.layers.{block}.{module}")
            name = f"blocks.{block}.attention.{part}"
            a, b = layer.poly_lora_A["default"], layer.poly_lora_B["default"]
            a.copy_(drawn(f"{name}.A", a.shape))
            b.copy_(drawn(f"{name}.B", b.shape))
            router = layer.poly_router["default"].module_logits
            router.copy_((drawn(f"{name}.Z", (3, 2, 3)) * 4).flatten(1))
        made = model.base_model(input_ids=TOKENS, task_ids=torch.tensor([2, 0])).logits
    return made[:, -1].float()


def write_golden(folder):
    """``PYTHONPATH=src:tests python -c "import adapters.mhr.test_few_shot as t; t.write_golden('x')"`` with peft."""
    values = [[round(value, 5) for value in row] for row in poly_of_peft(Path(folder)).tolist()]
    GOLDEN.write_text(json.dumps(values, separators=(",", ":")) + "\n")


# Measures


def test_diagnoses_by_hand():
    table = RoutingTable(["a", "b"], 1, 2)
    with torch.no_grad():
        table.z.copy_(torch.tensor([[[40.0, -40.0]], [[-40.0, 40.0]]]))
    found = Diagnosis.of(table)
    assert (found.sparsity, found.discreteness, found.efficiency) == pytest.approx((0.5, 0.0, 1.0), abs=1e-6)
    with torch.no_grad():
        table.z.copy_(torch.tensor([[[40.0, -40.0]], [[40.0, -40.0]]]))
    assert Diagnosis.of(table).efficiency == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        table.z.zero_()
    found = Diagnosis.of(table)
    assert (found.sparsity, found.discreteness, found.efficiency) == pytest.approx((1.0, 1.0, 1.0), abs=1e-6)
    assert len(diagnose(model_of(CONFIG.replace(granularity="blockwise")))) == 2
    with pytest.raises(ConfigError, match="no routing tables"):
        diagnose(CONFIGS["llama"]().build())


def test_gradients_of_tasks_are_compared():
    model = model_of()

    def loss(row, sign=1.0):
        def made():
            state = task_rows(model, ["a"], 5)
            return sign * model(TOKENS[row : row + 1, :-1], TOKENS[row : row + 1, 1:], state=state).loss

        return made

    learned = [parameter.requires_grad_(number % 2 > 0) for number, parameter in enumerate(shared_numbers(model))]
    mean, pairs = gradient_alignment(model, {"x": loss(0), "same": loss(0), "other": loss(0, -1.0)})
    assert pairs["x", "same"] == pytest.approx(1.0)
    assert pairs["x", "other"] == pytest.approx(-1.0)
    assert mean == pytest.approx(-1 / 3)
    mean, _ = gradient_alignment(model, {"x": loss(0), "y": loss(1)})
    assert -1 < mean < 1
    assert all(parameter.grad is None for parameter in model.parameters())
    # What learned and what did not is as it was.
    assert [parameter.requires_grad for parameter in learned] == [number % 2 > 0 for number in range(len(learned))]
    with pytest.raises(ConfigError, match="at least two"):
        gradient_alignment(model, {"x": loss(0)})
    with pytest.raises(ConfigError, match="no adapters"):
        gradient_alignment(CONFIGS["llama"]().build(), {"x": loss(0), "y": loss(1)})
