"""Two processes train as one does."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from anabranch.errors import ConfigError
from anabranch.lm import load_model
from anabranch.routing import BiasBalancer, SwitchLoss, ZLoss
from anabranch.train import Trainer, checkpoints, read_metrics, read_run_config
from anabranch.train.config import Parallel
from ranks import run_ranks

TRAIN = """
from pathlib import Path
from anabranch.train import Trainer, read_run_config
for name in {names}:
    config = read_run_config("{folder}/" + name + ".config")
    trainer = Trainer(config, "{folder}/" + name)
    result = trainer.fit()
    pool = trainer.model.shared["experts_0"].w13
    held = getattr(pool, "to_local", lambda: pool)().numel() / pool.numel()
    print(name, result.status, held, repr(result.bits_per_byte))
"""

RESUME = """
from anabranch.train import Trainer, read_run_config
config = read_run_config("{folder}")
Trainer(config.replace(train=config.train.replace(parallel="{parallel}", steps={steps})), "{folder}", resume=True).fit()
"""


def assert_same_curve(one, two, tolerance):
    ours, theirs = read_metrics(one), read_metrics(two)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["kind"] == other["kind"]
        assert mine["max_violation_by_layer"] == pytest.approx(other["max_violation_by_layer"], abs=0.05)
        if mine["kind"] == "validation":
            assert mine["nats_per_token"] == pytest.approx(other["nats_per_token"], abs=tolerance)
            continue
        assert mine["loss"] == pytest.approx(other["loss"], abs=tolerance)
        assert mine["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
        assert mine["auxiliary"] == pytest.approx(other["auxiliary"], rel=1e-3)


@pytest.fixture
def config(make_run, balanced_model):
    # a loss over the global batch and a bias moved by global loads: both need what the other process saw
    return make_run(balanced_model(SwitchLoss.Config(scope="global_batch"), ZLoss.Config(), BiasBalancer.Config()))


@pytest.mark.slow
def test_sequences_cut_over_nodes_learn_as_one_process_does(tmp_path, config):
    """TokenRing inside two nodes of two processes, a ring of keys between them."""
    Trainer(config, tmp_path / "one").fit()
    folder = tmp_path / "nodes.config"
    folder.mkdir()
    shared = Parallel(context=4, context_scheme="hybrid", context_node=2)
    config.replace(parallel=shared, train=config.train.replace(parallel="none")).save(folder)
    outputs = run_ranks(TRAIN.format(names=("nodes",), folder=tmp_path), 4)
    assert len(set(outputs)) == 1
    assert outputs[0].split()[:2] == ["nodes", "finished"]
    assert_same_curve(tmp_path / "one", tmp_path / "nodes", 2e-5)


def test_nodes_that_are_no_whole_ones():
    with pytest.raises(ConfigError, match="context_node is 3, and context 4"):
        Parallel(context=4, context_node=3)
    assert Parallel(context_node=3).context_node == 3


def test_replicas_and_shards_and_cut_sequences_learn_as_one_process_does(tmp_path, config):
    Trainer(config, tmp_path / "one").fit()
    ways = ("ddp", "fsdp", "context", "context-fsdp")
    for name in ways:
        folder = tmp_path / f"{name}.config"
        folder.mkdir()
        if name.startswith("context"):
            train = config.train.replace(parallel="fsdp" if name.endswith("fsdp") else "none")
            config.replace(parallel=Parallel(context=2), train=train).save(folder)
        else:
            config.replace(train=config.train.replace(parallel=name)).save(folder)
    outputs = run_ranks(TRAIN.format(names=ways, folder=tmp_path))
    assert outputs[0] == outputs[1]  # both know the result of all
    held = [line.split()[:3] for line in outputs[0].splitlines()]
    assert held == [
        ["ddp", "finished", "1.0"],
        ["fsdp", "finished", "0.5"],
        ["context", "finished", "1.0"],
        ["context-fsdp", "finished", "0.5"],
    ]
    for name in ways:
        assert_same_curve(tmp_path / "one", tmp_path / name, 2e-5)
        ours, _ = load_model(tmp_path / name)
        theirs, _ = load_model(tmp_path / "one")
        for (key, tensor), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(tensor, other, rtol=0, atol=2e-3, msg=lambda text, key=key: f"{key}: {text}")
        assert ours.state_dict().keys() == theirs.state_dict().keys()

    for name in ("one", "fsdp", "context"):  # what two processes wrote, one goes on with
        longer = read_run_config(tmp_path / name)
        longer = longer.replace(train=longer.train.replace(parallel="none", steps=8), parallel=Parallel())
        Trainer(longer, tmp_path / name, resume=True).fit()
    for name in ("fsdp", "context"):
        assert_same_curve(tmp_path / "one", tmp_path / name, 5e-5)


SHARED = """
from anabranch.train import Trainer, read_run_config
for name in {names}:
    trainer = Trainer(read_run_config("{folder}/" + name + ".config"), "{folder}/" + name)
    result = trainer.fit()
    pool = trainer.model.shared["experts_0"].w13
    print(name, result.status, pool.to_local().numel() / pool.numel(), repr(result.bits_per_byte))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("names", "world"), [(("none", "fsdp"), 2), (("ddp",), 4)])
def test_processes_that_share_experts_learn_as_one_does(tmp_path, config, names, world):
    """The same curves, checkpoints and moments; what they wrote one process goes on with, and the reverse. Four are two groups of two."""
    Trainer(config, tmp_path / "one").fit()
    for name in names:
        folder = tmp_path / f"{name}.config"
        folder.mkdir()
        train = config.train.replace(parallel=name)
        config.replace(train=train, parallel=Parallel(experts=2)).save(folder)
    outputs = run_ranks(SHARED.format(names=(*names,), folder=tmp_path), world)
    assert len(set(outputs)) == 1
    assert [line.split()[:3] for line in outputs[0].splitlines()] == [[name, "finished", "0.5"] for name in names]
    for name in names:
        assert_same_curve(tmp_path / "one", tmp_path / name, 2e-5)
        assert_same_files(checkpoints(tmp_path / "one")[-1], checkpoints(tmp_path / name)[-1])
    alone = read_run_config(tmp_path / names[0])
    alone = alone.replace(train=alone.train.replace(parallel="none", steps=8), parallel=Parallel())
    Trainer(alone, tmp_path / names[0], resume=True).fit()
    run_ranks(RESUME_SHARED.format(folder=tmp_path / "one"), world)
    assert checkpoints(tmp_path / "one")[-1].name == checkpoints(tmp_path / names[0])[-1].name == "step-00000008"
    assert_same_curve(tmp_path / "one", tmp_path / names[0], 5e-5)


RESUME_SHARED = """
from anabranch.train import Trainer, read_run_config
from anabranch.train.config import Parallel
config = read_run_config("{folder}")
config = config.replace(train=config.train.replace(steps=8), parallel=Parallel(experts=2))
Trainer(config, "{folder}", resume=True).fit()
"""


def assert_same_files(one, two):
    """Weights and moments have the same names, and values as near as sums in another order leave them."""
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(one / file), load_file(two / file)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(
                theirs[name], tensor, rtol=0, atol=2e-3, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.slow
def test_shards_go_on_with_what_one_process_wrote(tmp_path, config):
    for name in ("one", "two"):
        Trainer(config, tmp_path / name).fit()
    longer = config.replace(train=config.train.replace(steps=8))
    Trainer(longer, tmp_path / "one", resume=True).fit()
    run_ranks(RESUME.format(folder=tmp_path / "two", parallel="fsdp", steps=8))
    assert checkpoints(tmp_path / "two")[-1].name == "step-00000008"
    assert_same_curve(tmp_path / "one", tmp_path / "two", 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_torchrun_with_accumulation_and_recompute(tmp_path, make_run, balanced_model, parallel):
    settings = {"accumulation": 2, "recompute": True, "precision": "bfloat16"}
    config = make_run(balanced_model(ZLoss.Config()), **settings)
    Trainer(config, tmp_path / "one").fit()
    config.replace(train=config.train.replace(parallel=parallel)).save(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom anabranch.train import Trainer, read_run_config\n"
        f"Trainer(read_run_config({str(tmp_path)!r}), {str(tmp_path / 'two')!r}).fit()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        name = "loss" if ours["kind"] == "train" else "nats_per_token"
        assert ours[name] == pytest.approx(theirs[name], rel=2e-3)  # bf16
