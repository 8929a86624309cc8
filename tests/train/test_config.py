import json

import pytest

from anabranch.errors import CheckpointError, ConfigError, DataError
from anabranch.train import RunConfig, TrainConfig, WarmupStableDecay, read_run_config
from anabranch.train.config import differences


def test_saved_config_reads_back_equal(tmp_path, make_run):
    config = make_run(schedule=WarmupStableDecay.Config(decay=100), clip=None)
    config.save(tmp_path)
    assert read_run_config(tmp_path) == config
    assert json.loads((tmp_path / "config.json").read_text())["schema"] == 1


def test_differences_name_fields_by_path(make_run):
    old = make_run()
    new = make_run(learning_rate=1.0, clip=None)
    assert differences(old, new) == {"train.learning_rate": (1e-2, 1.0), "train.clip": (1.0, None)}
    assert differences(old, old) == {}


def test_a_folder_without_a_run_and_a_damaged_one(tmp_path):
    with pytest.raises(DataError, match="no training run in"):
        read_run_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read"):
        read_run_config(tmp_path)
    (tmp_path / "config.json").write_text('{"schema": 2}')
    with pytest.raises(CheckpointError, match=r"schema in .* is 2; this version reads 1 to 1"):
        read_run_config(tmp_path)
    (tmp_path / "config.json").write_text('{"schema": 1, "train": {"steps": -1}}')
    with pytest.raises(CheckpointError, match=r"does not describe a run: train\.steps is -1"):
        read_run_config(tmp_path)


def test_values_out_of_range():
    with pytest.raises(ConfigError, match="accumulation is 3, which does not divide batch_size=8 sequences"):
        TrainConfig(batch_size=8, accumulation=3)
    with pytest.raises(ConfigError, match="betas is"):
        TrainConfig(betas=(0.9, 1.0))
    with pytest.raises(ConfigError, match="precision is 'float16'"):
        TrainConfig(precision="float16")
    assert RunConfig() == RunConfig()
