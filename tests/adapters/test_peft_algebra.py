"""Combinations of peft itself (``add_weighted_adapter``), kept in algebra_golden.json, and where peft is installed those that it makes now.

To write the golden anew: ``PYTHONPATH=src:tests python -c "import adapters.test_peft_algebra as t; t.write_golden()"`` with peft.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch

from adapter_models import TOKENS, linear_layers, logits, make_adapter, make_base
from anabranch.adapters import combine, export_mixture, load_peft, read_peft, write_peft
from anabranch.adapters.algebra import _Way
from anabranch.adapters.thinning import drop
from anabranch.lm import load_model
from with_peft import needs_peft, theirs

GOLDEN = Path(__file__).with_name("algebra_golden.json")
WEIGHTS = [0.5, -0.75]
# By the name of a case: the method of peft, ours, and options of both.
CASES = {
    "cat": ("cat", "exact", {}),
    "linear": ("linear", "linear", {}),
    "svd": ("svd", "svd", {"rank": 3}),
    "ties": ("ties", "ties", {"density": 0.4}),
    "ties frequency": ("ties", "ties", {"density": 0.4, "majority": "frequency"}),
    "magnitude_prune": ("magnitude_prune", "magnitude_prune", {"density": 0.3}),
    "ties_svd": ("ties_svd", "ties_svd", {"density": 0.4}),
    "magnitude_prune_svd": ("magnitude_prune_svd", "magnitude_prune_svd", {"density": 0.3, "rank": 5}),
}
DRAWN = ("dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd")


def make(root):
    layers = linear_layers(make_base(root / "base", "llama"), ["q_proj", "down_proj"])
    make_adapter(root / "a", layers, seed="a", lora_alpha=6)
    make_adapter(root / "b", layers, seed="b", use_rslora=True)
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make(tmp_path_factory.mktemp("algebra"))


def of_peft(model, method, options):
    """Logits with peft's combination."""
    names = {"rank": "svd_rank", "majority": "majority_sign_method"}
    named = {names.get(name, name): value for name, value in options.items()}
    model.add_weighted_adapter(["default", "b"], WEIGHTS, "sum", combination_type=method, **named)
    model.set_adapter("sum")
    with torch.no_grad():
        found = model.eval()(TOKENS).logits
    model.set_adapter("default")
    model.delete_adapter("sum")
    return found


def opened(place):
    model = theirs(place / "base", place / "a")
    model.load_adapter(place / "b", "b")
    return model


def ours(place, method, options, tmp_path):
    made = combine([read_peft(place / name) for name in "ab"], WEIGHTS, method, **options)
    write_peft(tmp_path / "sum", made.adapter)
    return logits(load_peft(tmp_path / "sum", load_model(place / "base")[0]))


def write_golden():
    with tempfile.TemporaryDirectory() as root:
        model = opened(make(Path(root)))
        found = {name: of_peft(model, method, options)[1, 1::2] for name, (method, _, options) in CASES.items()}
    rounded = {name: [[round(float(value), 5) for value in row] for row in values] for name, values in found.items()}
    GOLDEN.write_text(json.dumps(rounded, separators=(",", ":")) + "\n")


@pytest.mark.parametrize("name", CASES)
def test_combinations_are_those_that_peft_made(name, place, tmp_path):
    _, method, options = CASES[name]
    wanted = torch.tensor(json.loads(GOLDEN.read_text())[name])
    torch.testing.assert_close(ours(place, method, options, tmp_path)[1, 1::2], wanted, rtol=1e-5, atol=2e-5)


@pytest.fixture(scope="module")
def peft_model(place):
    return opened(place)


@needs_peft
@pytest.mark.parametrize("name", CASES)
def test_combinations_are_those_that_peft_makes(name, place, peft_model, tmp_path):
    method, own, options = CASES[name]
    wanted = of_peft(peft_model, method, options)
    torch.testing.assert_close(ours(place, own, options, tmp_path), wanted, rtol=1e-5, atol=2e-5)
    # What we wrote, peft reads to the same logits.
    with torch.no_grad():
        found = theirs(place / "base", tmp_path / "sum")(TOKENS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


@needs_peft
@pytest.mark.parametrize("method", DRAWN)
def test_where_the_same_numbers_are_dropped_peft_makes_the_same(method, place, peft_model, tmp_path, monkeypatch):
    """peft drops by torch's global generator, module after module; here it is handed ours."""
    import peft
    from peft.utils import merge_utils

    way = _Way(method, None, 0.6, 4, "total")
    modules = [
        name.removeprefix("base_model.model.")
        for name, module in peft_model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    ]
    kinds = ("BA",) if method.endswith("svd") else ("A", "B")
    calls = iter([(module, kind, number) for module in modules for kind in kinds for number in range(2)])

    def pruned(tensor, density, rescale):
        assert rescale
        return drop(tensor, density, way.generator(*next(calls)))

    monkeypatch.setattr(merge_utils, "random_pruning", pruned)
    wanted = of_peft(peft_model, method, {"density": 0.6})
    assert next(calls, None) is None
    found = ours(place, method, {"density": 0.6, "seed": 4}, tmp_path)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


@needs_peft
def test_a_mixture_that_is_exported_gives_the_same_logits_in_peft(place, tmp_path):
    model = load_model(place / "base")[0]
    done = export_mixture(tmp_path / "sum", model, dict(zip([place / "a", place / "b"], WEIGHTS, strict=True)))
    assert done.difference < 1e-5
    with torch.no_grad():
        found = theirs(place / "base", tmp_path / "sum")(TOKENS).logits
    wanted = logits(load_peft(tmp_path / "sum", model))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
