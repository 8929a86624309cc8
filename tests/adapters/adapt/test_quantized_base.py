"""Adapters learn beside a base in NF4 (QLoRA), and stand beside it as it was afterwards."""

import json

import pytest
import torch

from anabranch.adapters import load_peft
from anabranch.adapters.adapt import AdaptTask, method_named
from anabranch.adapters.own_folder import is_own, read_own
from anabranch.cli.main import main
from anabranch.data import ByteTokenizer
from anabranch.errors import ConfigError
from anabranch.lm import Decoder, load_model, save_model
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.nn.nf4 import Nf4Linear
from anabranch.train import Constant, TaskRunConfig, TrainConfig, Trainer

CONFIG = Decoder.Config(
    vocab_size=257,
    dim=32,
    num_layers=2,
    attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
    feed_forward=SwiGLU.Config(hidden_dim=64),
    max_positions=64,
    init_std=0.2,
)
TRAIN = {
    "steps": 4,
    "batch_size": 4,
    "eval_every": 2,
    "checkpoint_every": 2,
    "log_every": 1,
    "device": "cpu",
    "learning_rate": 1e-2,
}
METHODS = [
    "lora",
    "dora",
    "ia3",
    "ssf",
    "adapter-houlsby",
    "adapter-parallel",
    "intrinsic",
    "unipelt",
    "lst",
    "poly",
    "mhr",
    "dynmole",
]
QUICK = ("lora", "adapter-houlsby", "dora")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("nf4")
    save_model(root / "base", CONFIG.build(seed=1), ByteTokenizer.Config().build())
    words = ["ab", "cde", "fghi", "jk", "lmnop", "q", "rst", "uv"]
    rows = [{"task": task, "input": word, "output": word[::-1]} for word in words for task in ("back", "again")]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def run_of(place, name, **task):
    held = {"held_out": 0.3, "quantize": "nf4", **task}
    made = AdaptTask.Config(
        model=str(place / "base"), data=str(place / "rows.jsonl"), method=method_named(name), **held
    )
    return TaskRunConfig(task=made, train=TrainConfig(**TRAIN))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_methods_learn_beside_it(place, tmp_path, name):
    trainer = Trainer(run_of(place, name), tmp_path / "run")
    task = trainer.task
    packed = [module for module in task.base.modules() if isinstance(module, Nf4Linear)]
    assert len(packed) >= 4 * CONFIG.num_layers
    before = [module.code.clone() for module in packed]
    added = {
        key: value.clone() for key, value in task.base.state_dict().items() if key in set(task.method.kept(task.base))
    }
    trainer.fit()
    for module, code in zip(packed, before, strict=True):
        assert torch.equal(module.code, code)
    after = task.base.state_dict()
    assert any(not torch.equal(value, after[key]) for key, value in added.items())
    written = task.method.write(tmp_path / "adapter", task.base, "base")
    assert written.folder == tmp_path / "adapter"
    # On the base as it was.
    model, _ = load_model(place / "base")
    put = read_own if is_own(tmp_path / "adapter") else load_peft
    put(tmp_path / "adapter", model)


def test_double_quantisation_is_a_choice(place, tmp_path):
    for double in (True, False):
        task = run_of(place, "lora", double_quantize=double).task.build()
        packed = next(module for module in task.base.modules() if isinstance(module, Nf4Linear))
        assert (packed.mean is not None) is double


def test_a_run_goes_on_to_the_bit(place, tmp_path):
    half = run_of(place, "lora")
    half = half.replace(train=half.train.replace(schedule=Constant.Config()))
    whole = Trainer(half, tmp_path / "whole")
    whole.fit()
    part = Trainer(half.replace(train=half.train.replace(steps=2)), tmp_path / "part")
    part.fit()
    again = Trainer(half, tmp_path / "part", resume=True)
    again.fit()
    names = whole.task.method.kept(whole.task.base)
    for name in names:
        assert torch.equal(whole.task.base.state_dict()[name], again.task.base.state_dict()[name]), name


@pytest.mark.parametrize("name", ["full", "bitfit", "ln-tuning"])
def test_what_trains_the_base_does_not(place, name):
    with pytest.raises(ConfigError, match=f"quantize is 'nf4', in which nothing learns, and {name} trains the base"):
        run_of(place, name).task.build()


@pytest.mark.slow
def test_by_the_command(place, tmp_path, capsys):
    line = [
        "adapt",
        str(place / "base"),
        str(place / "rows.jsonl"),
        "--quantize",
        "nf4",
        "--steps",
        "2",
        "--out",
        str(tmp_path / "r"),
    ]
    assert main([*line, "--target", "all", "--quiet", "--json"]) == 0
    capsys.readouterr()
    assert json.loads((tmp_path / "r" / "config.json").read_text())["task"]["quantize"] == "nf4"
    assert main(["eval", str(place / "base"), "--adapter", str(tmp_path / "r" / "adapter"), "--json"]) == 0
    assert main([*line[:-1], str(tmp_path / "s"), "--method", "full"]) == 2
    assert "in which nothing learns, and full trains the base" in capsys.readouterr().err
    assert main(["adapters", "card", "qlora"]) == 0
    assert "task.quantize=nf4" in capsys.readouterr().out
