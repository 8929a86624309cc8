"""Adapters of every kind fused with their base: the model computes what base and adapter did, and saves as a model."""

import pytest
import torch

from anabranch.adapters import catalogue, save_peft
from anabranch.adapters.fusing import fuse_adapter
from anabranch.adapters.own_folder import write_own
from anabranch.errors import ConfigError, InputError
from anabranch.lm import Decoder, load_model, save_model
from anabranch.nn import SelfAttention, SwiGLU

CONFIG = Decoder.Config(
    vocab_size=61,
    dim=32,
    num_layers=2,
    attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
    feed_forward=SwiGLU.Config(hidden_dim=48),
    max_positions=64,
)
TOKENS = torch.tensor([[3, 17, 60, 8, 8, 41, 7, 1], [0, 5, 22, 1, 59, 30, 2, 2]])
# By method: options, and whether matrices take it in.
KINDS = {
    "lora": ({"rank": 2}, True),
    "dora": ({"rank": 2}, True),
    "ia3": ({}, True),
    "shira": ({"rank": 1}, True),
    "intrinsic": ({"size": 16}, True),
    "adapter-parallel": ({"width": 2}, False),
    "adapter-houlsby": ({"width": 2}, False),
    "molora": ({"rank": 2}, False),
    "prompt-tuning": ({"tokens": 3}, False),
    "mam": ({"tokens": 3, "width": 2}, False),
    "lst": ({"reduction": 4}, False),
}


def written(folder, id, **options):
    """A folder with an adapter that has learned something, and the logits of base and adapter."""
    model = CONFIG.build(seed=1)
    applied = catalogue.apply(model, id, **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in applied.trainable:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    try:
        save_peft(folder, model)
    except ConfigError:
        write_own(folder, model)
    return model


def logits(model, **state):
    with torch.no_grad():
        return model.eval()(TOKENS, **state).logits_BLV


@pytest.mark.parametrize("id", KINDS)
def test_fused_is_base_and_adapter(id, tmp_path):
    options, merges = KINDS[id]
    wanted = logits(written(tmp_path / "adapter", id, **options))
    model = CONFIG.build(seed=1)
    done = fuse_adapter(model, tmp_path / "adapter")
    assert done.merged == merges
    assert done.difference <= 1e-5 * done.greatest
    assert (model.config == CONFIG) == merges
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=2e-5)
    save_model(tmp_path / "whole", model)
    again, _ = load_model(tmp_path / "whole")
    assert torch.equal(logits(again), logits(model))


def test_beside_where_it_is_asked_for(tmp_path):
    wanted = logits(written(tmp_path / "adapter", "lora", rank=2))
    model = CONFIG.build(seed=1)
    assert not fuse_adapter(model, tmp_path / "adapter", beside=True).merged
    assert model.config.linears
    assert torch.equal(logits(model), wanted)


def test_one_task_of_an_inventory(tmp_path):
    model = CONFIG.build(seed=1)
    catalogue.apply(model, "mhr", rank=2, number=3, heads=4, tasks=2)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    write_own(tmp_path / "adapter", model)
    from anabranch.adapters.tasks import task_rows

    for task in ("0", "1"):
        fused = CONFIG.build(seed=1)
        assert fuse_adapter(fused, tmp_path / "adapter", task=task).merged
        assert fused.config == CONFIG
        wanted = logits(model, state=task_rows(model, [task] * 2, TOKENS.shape[1]))
        torch.testing.assert_close(logits(fused), wanted, rtol=1e-4, atol=2e-5)
    # All of them stay where none is named.
    kept = CONFIG.build(seed=1)
    assert not fuse_adapter(kept, tmp_path / "adapter").merged
    with pytest.raises(InputError, match="task '2' is not one of the 2"):
        fuse_adapter(CONFIG.build(seed=1), tmp_path / "adapter", task="2")


def test_a_task_of_what_has_none(tmp_path):
    written(tmp_path / "adapter", "shira", rank=1)
    with pytest.raises(ConfigError, match="does not go by task; leave it out"):
        fuse_adapter(CONFIG.build(seed=1), tmp_path / "adapter", task="0")
    taken = written(tmp_path / "other", "shira", rank=1)
    with pytest.raises(ConfigError, match="linears of the model has"):
        fuse_adapter(taken, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda table: table | {"block": None}, "describes an adapter of nothing"),
        (lambda table: table | {"block": {"kind": "ladder", "reduction": 0}}, "reduction"),
        (
            lambda table: table | {"block": {"kind": "ladder", "reduction": 1, "expansion": 10**9}},
            "describes an adapter of",
        ),
        (lambda table: table | {"block": {"kind": "pre_norm"}}, "does not describe an adapter"),
        (lambda table: table | {"streams": {"kind": "front", "num_tokens": 10**9}}, "describes an adapter of"),
        (lambda table: table | {"dim": 64}, "whose dim is 64"),
    ],
)
def test_damaged_folders_in_one_line(tmp_path, edit, told):
    import json

    from anabranch.errors import AnabranchError

    written(tmp_path / "adapter", "lst", reduction=4)
    place = tmp_path / "adapter" / "adapter.json"
    place.write_text(json.dumps(edit(json.loads(place.read_text()))))
    model = CONFIG.build(seed=1)
    with pytest.raises(AnabranchError, match=told):
        fuse_adapter(model, tmp_path / "adapter")
    assert model.config == CONFIG
    assert torch.equal(logits(model), logits(CONFIG.build(seed=1)))
