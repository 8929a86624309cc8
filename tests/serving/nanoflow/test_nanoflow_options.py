"""Which pipeline an engine's steps run by: read, searched and kept, or none where it will not pay."""

import contextlib
import json

import pytest

from anabranch.errors import ConfigError, DataError
from anabranch.lm import Decoder
from anabranch.serving import LLM, Sampling, ServingConfig
from anabranch.serving.nanoflow.options import find_pipeline
from anabranch.serving.planning.cost import Workload
from anabranch.serving.planning.hardware import Hardware
from anabranch.serving.planning.search import search
from anabranch.serving.planning.shape import shape_of
from serving_models import saved_moe

FAST = Hardware(name="fast", memory_bytes=1e9, memory_bandwidth=1e14, compute=1e12)  # T_R far below 1
SLOW = Hardware(name="slow", memory_bytes=1e9, memory_bandwidth=1e6, compute=1e12)


@pytest.fixture(scope="module")
def model():
    return Decoder.Config(dim=32, num_layers=2, vocab_size=61).build(seed=1)


def test_it_is_searched_once_and_kept(model, tmp_path, monkeypatch):
    path = tmp_path / "pipeline.json"
    config = ServingConfig(nano_batches=True, pipeline=str(path), max_batched_tokens=512)
    made = find_pipeline(model, config, FAST, budget_s=0.5)
    assert len(made.schedule.graph.ops) >= 6
    before = path.read_bytes()
    monkeypatch.setattr("anabranch.serving.nanoflow.options.search", None)
    again = find_pipeline(model, config)  # neither measured nor searched
    assert (again.schedule.order, again.schedule.shares) == (made.schedule.order, made.schedule.shares)
    assert path.read_bytes() == before


@pytest.mark.parametrize(("hardware", "batch", "why"), [(SLOW, 256, "T_R is"), (FAST, 128, "below two tiles")])
def test_nano_batches_that_will_not_pay_are_warned_of(model, hardware, batch, why, caplog, tmp_path):
    path = tmp_path / "pipeline.json"
    config = ServingConfig(nano_batches=True, max_batched_tokens=batch, pipeline=str(path))
    assert find_pipeline(model, config, hardware) is None
    assert why in caplog.text
    assert not path.exists()


def test_one_for_other_lengths_and_bits_is_taken_and_one_for_another_model_refused(model, tmp_path):
    path = tmp_path / "pipeline.json"
    config = ServingConfig(nano_batches=True, pipeline=str(path))
    shape = shape_of(model.config, "mine", weight_bytes=0.5, kv_bytes=2.0)
    search(shape, FAST, Workload(prompt=9, output=7, dense_batch=1024), evaluations=50).save(path)
    assert find_pipeline(model, config).schedule.graph.layer.batch == 1024
    other = Decoder.Config(dim=64, num_layers=2, vocab_size=61).build(seed=1)
    with pytest.raises(ConfigError, match="a pipeline for 'mine', a model of another shape"):
        find_pipeline(other, config)


@pytest.mark.parametrize("change", ["no json", [], {"schema": 1}, {"key": {}}, {"order": ["kqv.0"]}, {"hardware": {}}])
def test_files_that_are_none(model, tmp_path, change):
    path = tmp_path / "pipeline.json"
    config = ServingConfig(nano_batches=True, pipeline=str(path))
    made = search(shape_of(model.config), FAST, Workload(dense_batch=256), evaluations=20)
    if isinstance(change, dict):
        path.write_text(json.dumps(json.loads(json.dumps(made.to_dict())) | change))
    else:
        path.write_text(change if isinstance(change, str) else json.dumps(change))
    with pytest.raises(DataError, match=r"pipeline\.json is (no|a) pipeline"):
        find_pipeline(model, config)


def test_what_plan_wrote_is_served_with_the_same_tokens(tmp_path, capsys):
    from anabranch.cli.main import main
    from anabranch.serving.nanoflow.runtime import NanoRunner

    path, folder = tmp_path / "pipeline.json", saved_moe()
    words = ("--hardware", "compute=1T,bandwidth=100T,memory=1G", "--batch", "512", "--budget", "1", "--out", str(path))
    assert main(["plan", str(folder), *words]) == 0
    assert "pipeline" in capsys.readouterr().out
    prompts = [[65 + at] * (50 + at) for at in range(6)]
    greedy = Sampling(temperature=0, max_tokens=12, ignore_eos=True)
    found = []
    for options in ({}, {"nano_batches": True, "pipeline": str(path)}):
        with contextlib.closing(LLM(folder, dtype="float32", **options)) as llm:
            found.append([answer.tokens for answer in llm.generate(prompts, greedy)])
            runner = llm.engine.runner
    assert isinstance(runner, NanoRunner)
    assert runner.num_cut > 0
    assert runner.plan.parts
    assert found[0] == found[1]


def test_a_pipeline_without_nano_batches_is_refused():
    with pytest.raises(ConfigError, match="pipeline is set, but nano_batches is not"):
        ServingConfig(pipeline="x.json")
