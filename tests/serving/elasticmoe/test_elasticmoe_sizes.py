"""What a front end is told of a model that several devices serve."""

import shutil
from pathlib import Path

import pytest

from anabranch.errors import CheckpointError
from anabranch.lm import load_model
from anabranch.serving.config import ServingConfig
from anabranch.serving.depth import DepthConfig
from anabranch.serving.elasticmoe import group as module
from anabranch.serving.elasticmoe.config import ElasticConfig
from anabranch.serving.elasticmoe.group import Group
from anabranch.serving.elasticmoe.layout import layout_of
from anabranch.serving.elasticmoe.sizes import sizes_of
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.paged import PagedShape
from depth_banks import saved_bank
from elastic_models import save_moe


@pytest.mark.parametrize("inner", ["", "checkpoints/step-00000003"])
def test_a_model_is_called_as_one_engine_calls_it(tmp_path, inner):
    run = tmp_path / "moe"
    save_moe(run / inner)
    assert sizes_of(ElasticConfig(model=str(run)), layout_of(run))[1].model == "moe"


def test_a_group_has_the_checkpoint_of_a_run_that_it_tells(tmp_path, monkeypatch):
    steps = tmp_path / "run" / "checkpoints"
    save_moe(steps / "step-00000001")

    def late(*args):
        shutil.copytree(steps / "step-00000001", steps / "step-00000002")
        return layout_of(*args)

    monkeypatch.setattr(module, "layout_of", late)
    group = Group(ElasticConfig(model=str(tmp_path / "run")))
    told = {Path(one.path).parent for one in group.info.files.files}
    assert told == {Path(group.layout.folder)} == {steps / "step-00000001"}


@pytest.mark.parametrize("name", ["optimizer.safetensors", "adapter_model.safetensors", "zz.safetensors"])
def test_devices_read_no_file_that_lies_beside_the_weights(tmp_path, name):
    save_moe(tmp_path / "moe")
    before = layout_of(tmp_path / "moe")
    other = save_moe(tmp_path / "other", seed=5) / "model.safetensors"
    shutil.copyfile(other, tmp_path / "moe" / name)
    assert layout_of(tmp_path / "moe") == before
    (tmp_path / "moe" / name).write_bytes(b"a download under way")
    assert layout_of(tmp_path / "moe") == before


@pytest.mark.parametrize(
    ("max_depth", "routes", "visits", "told"),
    [(None, False, 2, None), (None, True, 4, 4), (3, False, 3, 3), (3, True, 3, 3), (1, True, 2, 2)],
)
def test_a_cache_has_room_for_any_path_that_may_be_asked_for(tmp_path, max_depth, routes, visits, told):
    """As of one engine: `Engine.of`."""
    folder = save_moe(tmp_path / "moe")
    model, _ = load_model(folder)
    depth = DepthConfig(routers=saved_bank(tmp_path / "routers", model)) if routes else DepthConfig()
    fields = {"num_blocks": 32, "max_depth": max_depth, "depth": depth}
    limits, info, kv_bytes = sizes_of(ElasticConfig(model=str(folder), **fields), layout_of(folder))
    one = Engine.of(model.eval(), ServingConfig(model=str(folder), **fields))
    assert info.max_depth == one.info.max_depth == told
    for name in ("num_layers", "routes_depth", "depth", "num_blocks"):
        assert getattr(info, name) == getattr(one.info, name), name
    # 32 blocks of 16 tokens, keys and values of 2 heads of 8 floats.
    assert kv_bytes == 32 * 16 * visits * 2 * 2 * 8 * 4
    assert PagedShape.of(model, limits.max_depth).layers == one.runner.pool.shape.layers == visits
    one.runner.close()


def test_routers_of_a_model_of_other_sizes_are_refused_before_anything_starts(tmp_path):
    folder = save_moe(tmp_path / "moe")
    model, _ = load_model(folder)
    deeper = saved_bank(tmp_path / "routers", model.config.replace(num_layers=3).build(seed=0))
    for place, says in ((deeper, "of another model: blocks 3, and"), (str(tmp_path / "none"), "no routers in")):
        with pytest.raises(CheckpointError, match=says):
            Group(ElasticConfig(model=str(folder), depth=DepthConfig(routers=place)))
