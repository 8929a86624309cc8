"""Layers put onto a model that is not ours: which matrices, by which names, in which mode, and what of the base learns."""

import pytest
import torch
from torch import nn

from adapter_models import CONFIGS
from anabranch.adapters import LowRank, MixedLowRank, merge, unmerge
from anabranch.adapters.graft import layers_of
from anabranch.adapters.mhr import MultiHeadRouted
from anabranch.adapters.mhr.penalties import Penalties
from anabranch.adapters.onto_module import linears_in
from anabranch.adapters.own_folder import OWN, read_own, write_own
from anabranch.adapters.put_on import added_names, put_on
from anabranch.errors import CapacityError, CheckpointError
from every_method import drawn


def ours():
    return CONFIGS["llama"]().build(seed=1)


class Blocks(nn.Module):
    """Matrices by the names of GPT-2: ``h.0.mlp.up``, ``h.0.mlp.down``, ..., and a head."""

    def __init__(self, num_layers=3):
        super().__init__()
        torch.manual_seed(0)
        self.h = nn.ModuleList(
            nn.ModuleDict({"mlp": nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)})})
            for _ in range(num_layers)
        )
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        for block in self.h:
            x = x + block["mlp"]["down"](block["mlp"]["up"](x))
        return self.head(x)


# One table of all, which has a linear layer of its own.
TOGETHER = MultiHeadRouted.Config(
    tasks=("sql", "law"), skills=3, heads=1, rank=2, granularity="coarsegrained", penalties=Penalties(prediction=0.1)
)


def test_the_first_pattern_that_fits_counts():
    model = Blocks()
    configs = [LowRank.Config(rank=rank) for rank in (1, 2, 3)]
    put_on(model, dict(zip(("h.1.*", "*.up", "*"), configs, strict=True)))
    ranks = {name: layer.config.rank for name, layer in layers_of(model).items()}
    assert ranks == {
        "h.0.mlp.up": 2,
        "h.0.mlp.down": 3,
        "h.1.mlp.up": 1,
        "h.1.mlp.down": 1,
        "h.2.mlp.up": 2,
        "h.2.mlp.down": 3,
        "head": 3,
    }


def test_routers_know_their_block():
    model = put_on(Blocks(), {"*": MixedLowRank.Config(ranks=(2, 2))})
    found = {name: layer.router.layer for name, layer in layers_of(model).items()}
    assert found == {name: int(name[2]) if name.startswith("h.") else 0 for name in found}
    assert len(found) == 7


def test_what_layers_share_is_no_matrix_of_the_model():
    model = Blocks()
    names = list(linears_in(model))
    put_on(model, {"*": TOGETHER})
    assert any(isinstance(module, nn.Linear) for module in model.anabranch_shared.modules())
    assert list(linears_in(model)) == names


@pytest.mark.parametrize("is_training", [True, False])
def test_what_is_put_on_trains_where_the_model_does(is_training):
    model = put_on(Blocks().train(is_training), {"h.*": TOGETHER, "head": LowRank.Config(rank=1, dropout=0.5)})
    for added in (*layers_of(model).values(), model.anabranch_shared):
        assert {module.training for module in added.modules()} == {is_training}


def test_numbers_of_a_layer_at_two_places_have_two_names(tmp_path):
    def tied():
        model = Blocks(2)
        model.h[1]["mlp"]["up"] = model.h[0]["mlp"]["up"]
        return model

    model = drawn(put_on(tied(), {"*.up": LowRank.Config(rank=1)}), 3)
    leaves = [f"h.{number}.mlp.up.beside.{leaf}" for number in range(2) for leaf in ("a", "b")]
    assert added_names(model) == leaves
    assert [name for name in model.state_dict() if name not in tied().state_dict() and ".matrix." not in name] == leaves
    write_own(tmp_path / "made", model)
    x = torch.randn(3, 4)
    assert torch.equal(read_own(tmp_path / "made", tied())(x), model(x))


@pytest.mark.parametrize("make", [ours, Blocks])
def test_what_is_more_than_memory_is_not_built(make, monkeypatch):
    monkeypatch.setattr("anabranch.adapters.put_on.room_bytes", lambda: 1000)
    model = make()
    names = list(model.state_dict())
    with pytest.raises(CapacityError, match="take a smaller rank"):
        put_on(model, {"*": LowRank.Config(rank=64)})
    assert list(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("make", [ours, Blocks])
def test_what_learns_of_the_base_still_learns_behind_a_merge(make):
    model = drawn(put_on(make(), {"head": LowRank.Config(rank=1)}), 3)
    merge(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("0" in name)
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learns
    unmerge(model)
    added = set(added_names(model))
    assert {name for name, one in model.named_parameters() if one.requires_grad} - added == learns


@pytest.mark.parametrize("make", [ours, Blocks])
def test_a_folder_that_asks_for_more_numbers_than_it_holds_builds_none(make, tmp_path, monkeypatch):
    write_own(tmp_path / "made", put_on(make(), {"*": LowRank.Config(rank=1)}))
    table = tmp_path / "made" / OWN
    rank = '"rank": 1'
    assert rank in table.read_text()
    table.write_text(table.read_text().replace(rank, f'"rank": {2**17}'))
    model = make()
    names = list(model.state_dict())
    monkeypatch.setattr(LowRank, "__init__", lambda *args: pytest.fail("a layer was built"))
    with pytest.raises(CheckpointError, match=r"holds [0-9,]+ numbers, and .* describes an adapter of [0-9,]+; copy"):
        read_own(tmp_path / "made", model)
    assert list(model.state_dict()) == names
