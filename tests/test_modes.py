"""Modes of modules: whoever looks at a model leaves each of its blocks in training or evaluation, as it was; and nobody does it by hand."""

import ast
from pathlib import Path

import pytest
import torch

import anabranch
import duo
from adapter_models import ATTENTION, TOKENS, linear_layers, make_adapter, make_base
from anabranch.adapters import export_mixture, load_peft, unload
from anabranch.adapters.lora_mixer import load_mixture
from anabranch.adapters.mhr import MultiHeadRouted, to_single_lora
from anabranch.adapters.mixture_report import mixture_report
from anabranch.adapters.put_on import put_on, take_off
from anabranch.data import ByteTokenizer, text_windows
from anabranch.depth.duo_llm import oracle
from anabranch.experts.rmoe import to_recurrent
from anabranch.experts.rmoe_measure import measure_gates
from anabranch.lm import Decoder, load_model
from anabranch.nn import MoE, SelfAttention
from anabranch.train import evaluate

SOURCE = Path(anabranch.__file__).parent


def routed(vocab_size=257):
    return Decoder.Config(
        vocab_size=vocab_size,
        dim=16,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=MoE.Config(num_experts=4, hidden_dim=8),
    ).build(seed=0)


def ids(model):
    return torch.randint(0, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))


def _evaluate(model, place):
    evaluate(model, text_windows(["a text of some length"], ByteTokenizer(), 8))


def _put_and_take_off(model, place):
    load_peft(place / "a", model)
    unload(model)
    put_on(model, {"*.attention.*": MultiHeadRouted.Config(tasks=("a",), skills=2, heads=1, rank=2)})
    take_off(model)


def _mixture_report(model, place):
    mixture_report(model, [(TOKENS, None, None)])


def _one_task(model, place):
    put_on(model, {"*.attention.*": MultiHeadRouted.Config(tasks=("a",), skills=2, heads=1, rank=2)})
    to_single_lora(model, "a")
    take_off(model)


def of_peft(place):
    return load_model(place / "base")[0]


LOOKS = {
    "evaluate": (lambda place: routed(), _evaluate),
    "measure_gates": (lambda place: routed(), lambda model, place: measure_gates(model, ids(model))),
    "to_recurrent": (lambda place: routed(), lambda model, place: to_recurrent(model, ids(model), state_dim=4)),
    "oracle": (lambda place: duo.decoder(2), lambda model, place: oracle(model, duo.tokens(2, 6), 1)),
    "export_mixture": (of_peft, lambda model, place: export_mixture(place / "made", model, {place / "a": 1.0})),
    "on and off again": (of_peft, _put_and_take_off),
    "mixture_report": (
        lambda place: load_mixture({"a": place / "a", "b": place / "b"}, of_peft(place)),
        _mixture_report,
    ),
    "to_single_lora": (of_peft, _one_task),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("modes")
    base = make_base(root / "base", "llama")
    for name in "ab":
        make_adapter(root / name, linear_layers(base, ATTENTION), seed=name)
    return root


@pytest.mark.parametrize("whole", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("name", LOOKS)
def test_each_block_is_afterwards_in_the_mode_that_it_was_in(name, whole, place):
    make, look = LOOKS[name]
    model = make(place)
    model.train(whole)
    # One block, and one matrix of the other, are otherwise.
    model.blocks[0].train(not whole)
    model.blocks[1].attention.train(not whole)
    before = {where: module.training for where, module in model.named_modules()}
    look(model, place)
    assert {where: module.training for where, module in model.named_modules()} == before


def _names(function):
    """Of variables that are assigned a ``.training``."""
    return {
        target.id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute) and node.value.attr == "training"
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def by_hand(source):
    """Lines of ``.train(...)`` that put a whole model back into a mode that was kept of it, or that follow an ``.eval()`` of the same."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        calls = [
            node for node in ast.walk(function) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        ]
        kept = _names(function)
        first_eval = {}
        for call in calls:
            if call.func.attr == "eval" and not call.args:
                where = ast.unparse(call.func.value)
                first_eval[where] = min(call.lineno, first_eval.get(where, call.lineno))
        for call in calls:
            if call.func.attr != "train":
                continue
            restores = any(isinstance(argument, ast.Name) and argument.id in kept for argument in call.args)
            follows = first_eval.get(ast.unparse(call.func.value), call.lineno) < call.lineno
            if restores or follows:
                found.append(call.lineno)
    return found


def test_nobody_puts_modes_back_by_hand():
    """`anabranch.lm.generate.evaluating` keeps those of single blocks. Contracts set modes of models that are given to them for that."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        text = path.read_text("utf-8")
        if ".train(" in text and "testing" not in path.parts and (lines := by_hand(text)):
            found[str(path.relative_to(SOURCE))] = lines
    assert found == {}


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("def f(m):\n was = m.training\n m.eval()\n try:\n  m(1)\n finally:\n  m.train(was)", [7]),
        ("def f(m):\n m.eval()(1)\n m.train()", [3]),
        ("def f(s):\n s.model.eval()\n def g():\n  s.model.train(True)\n g()", [4]),
        ("def f(m):\n m.train()\n m.step()\n return m.eval()", []),
        ("def f(m, n):\n n.eval()\n return m.make().train(n.training)", []),
        ("def f(m):\n was = m.trained\n m.train(was)", []),
    ],
)
def test_what_is_found(source, lines):
    assert by_hand(source) == lines
