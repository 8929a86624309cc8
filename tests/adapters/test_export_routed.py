"""Routed adapters as one plain LoRA: of a task exactly, of a mixture by what its tokens use; and what cannot be asked."""

import pytest
import torch

from anabranch.adapters import load_peft, mixture_report, read_peft, static_mixture
from anabranch.adapters.export_routed import export_task
from anabranch.adapters.mhr import to_single_lora
from anabranch.adapters.own_folder import read_own, write_own
from anabranch.errors import ConfigError, InputError
from anabranch.lm import load_model
from every_method import TOKENS, drawn, make_place, method_of


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = make_place(tmp_path_factory.mktemp("routed"))
    base, _ = load_model(root / "base")
    method_of("dynmole", root).build().begin(base, [""], seed=0)
    write_own(root / "mixture", drawn(base, 0))
    return root


def base_of(place):
    return load_model(place / "base")[0].eval()


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits_BLV


def test_a_task_leaves_exactly(place, tmp_path):
    told = export_task(tmp_path / "out", base_of(place), place / "mhr-start", "two", is_average=False)
    assert told["task"] == "two"
    assert told["difference"] < 1e-5 * max(1.0, told["greatest_logit"])
    inventory = read_own(place / "mhr-start", base_of(place))
    found = read_peft(tmp_path / "out").pairs
    of_each = {name: to_single_lora(inventory, name).pairs for name in ("one", "two")}
    for name, pair in found.items():
        torch.testing.assert_close(pair.delta(), of_each["two"][name].delta(), rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(pair.delta(), of_each["one"][name].delta()) for name, pair in found.items())


def test_a_mixture_leaves_as_its_tokens_use_it(place, tmp_path):
    rows = [(TOKENS[:1], None), (TOKENS[1:], torch.ones(1, TOKENS.shape[1], dtype=torch.bool))]
    told = export_task(tmp_path / "out", base_of(place), place / "mixture", "any", is_average=False, rows=rows)
    assert told["task"] == "any"
    mixture = read_own(place / "mixture", base_of(place))
    weights = mixture_report(mixture, [(token, mask, torch.zeros(1).long()) for token, mask in rows]).weights_of(0)
    made = static_mixture(mixture, weights)
    plain = load_peft(tmp_path / "out", base_of(place))
    found = read_peft(tmp_path / "out").pairs
    assert found.keys() == made.pairs.keys()
    for name, pair in made.pairs.items():
        torch.testing.assert_close(found[name].delta(), pair.delta(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(logits(plain), logits(base_of(place)))


@pytest.mark.parametrize(
    ("folder", "task", "options", "error", "message"),
    [
        ("mhr-start", None, {"is_average": False}, ConfigError, "name one of .* with --task, or say --average"),
        ("mhr-start", "one", {"is_average": True}, ConfigError, "not both"),
        ("mhr-start", "three", {"is_average": False}, InputError, "three"),
        ("mhr-start", "one", {"is_average": False, "rows": []}, ConfigError, "nothing is measured on rows"),
        ("mixture", None, {"is_average": False}, ConfigError, "--average writes the plain average"),
        ("mixture", "one", {"is_average": False}, ConfigError, "--task is 'one', but"),
        ("mixture", "one", {"is_average": False, "rows": []}, InputError, "there are no rows to report on"),
        ("law-bottleneck", "one", {"is_average": False}, ConfigError, "has no tasks and no experts"),
    ],
)
def test_what_cannot_be_exported_writes_nothing(place, tmp_path, folder, task, options, error, message):
    with pytest.raises(error, match=message):
        export_task(tmp_path / "out", base_of(place), place / folder, task, **options)
    assert not (tmp_path / "out").exists()
