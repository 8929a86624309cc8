"""What a front end is told of a model that several devices serve."""

import shutil
from pathlib import Path

import pytest

from anabranch.serving.elasticmoe import group as module
from anabranch.serving.elasticmoe.config import ElasticConfig
from anabranch.serving.elasticmoe.group import Group
from anabranch.serving.elasticmoe.layout import layout_of
from anabranch.serving.elasticmoe.sizes import sizes_of
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
