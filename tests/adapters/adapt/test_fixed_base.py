"""Each method of `adapt` on a base whose routers are balanced by biases: what no gradient moves stays, or an adapter would be used
beside another base than it learned on."""

import json

import pytest
import torch

from anabranch.adapters import load_peft, save_peft
from anabranch.adapters.adapt import AdaptTask, method_named, method_names
from anabranch.adapters.around import bare_name
from anabranch.adapters.catalogue import CARDS, apply
from anabranch.adapters.graft import layers_of
from anabranch.adapters.own_folder import is_own, read_own
from anabranch.adapters.tasks import task_rows
from anabranch.adapters.tuners import MovedLowRank
from anabranch.data import ByteTokenizer
from anabranch.lm import Decoder, export_huggingface, load_model
from anabranch.nn import MoE, SelfAttention
from anabranch.routing import BiasBalancer, LinearScore, Router, TopK
from anabranch.routing.fixed import is_fixed
from anabranch.train import Constant, TaskRunConfig, TrainConfig, Trainer
from every_method import SMALL

# It refuses a base without biases.
NAMES = [name for name in method_names() if name != "bitfit"]
QUICK = {"lora_mixer", "prompt-tuning", "lst", "mhr"}
TOKENS = torch.tensor([[3, 17, 60, 8, 90, 41, 7, 1], [0, 5, 22, 1, 59, 30, 2, 2]])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("fixed")
    score, select = LinearScore.Config(activation="sigmoid"), TopK.Config(top_k=2, normalize="sum")
    router = Router.Config(score=score, select=select, balance=(BiasBalancer.Config(),))
    model = Decoder.Config(
        vocab_size=257,
        dim=32,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
        feed_forward=MoE.Config(num_experts=4, hidden_dim=16, router=router, shared_experts=1),
        max_positions=64,
    ).build(seed=1)
    export_huggingface(root / "base", model, ByteTokenizer.Config().build(), family="glm4_moe")
    for name in ("law", "sql"):
        one, _ = load_model(root / "base")
        apply(one, "lora", rank=2, targets=("q", "v"))
        with torch.no_grad():
            for parameter in one.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)
        save_peft(root / name, one, family="glm4_moe")
    words = ("ab", "cde", "fghi", "jk", "lmn", "op")
    rows = [{"task": task, "input": word, "output": word.upper()} for task in ("up", "down") for word in words]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def given(place):
    """Options of those that begin from what is there."""
    law, sql = str(place / "law"), str(place / "sql")
    return {"lora_mixer": {"adapters": (law, sql), "top_k": 1}, "gate": {"adapter": law}}


def outputs(model, needs_task):
    state = task_rows(model, ["up", "down"], TOKENS.shape[1]) if needs_task else None
    with torch.no_grad():
        return model.eval()(TOKENS, state=state).logits_BLV


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_a_base_is_as_it_was_and_takes_what_it_taught(place, tmp_path, name):
    method = method_named(name)
    # What comes as it is wants wider matrices.
    sizes = CARDS[name].options if name in CARDS and CARDS[name].backend == "peft" else ()
    method = method.replace(
        **{option: value for option, value in SMALL.items() if option in sizes}, **given(place).get(name, {})
    )
    task = AdaptTask.Config(model=str(place / "base"), data=str(place / "rows.jsonl"), method=method, held_out=0.0)
    train = TrainConfig(
        steps=3,
        batch_size=2,
        eval_every=None,
        checkpoint_every=None,
        device="cpu",
        schedule=Constant.Config(),
    )
    run = Trainer(TaskRunConfig(task=task, train=train), tmp_path / "run")
    trains_base = run.task.method.trains_base
    routers = [module for key, module in run.task.base.named_modules() if key.endswith("feed_forward.router")]
    assert len(routers) == 2
    assert all(is_fixed(router) is not trains_base for router in routers)
    run.fit()
    before, _ = load_model(place / "base")
    state = {bare_name(key): value for key, value in run.task.base.state_dict().items()}
    there = {key: value for key, value in before.state_dict().items() if key in state}
    moved = {key for key, value in there.items() if not torch.equal(value, state[key])}
    biases = {key for key in there if key.endswith("expert_bias")}
    assert biases
    assert moved >= biases if trains_base else not moved
    if name == "gate":
        # It writes gates beside the adapter, for pools to read.
        return
    needs_task = run.task.method.needs_task
    found, written = outputs(run.task.base, needs_task), run.task.write(tmp_path / "adapter")
    if written.form == "model":
        again, _ = load_model(written.folder)
    else:
        again = (read_own if is_own(written.folder) else load_peft)(written.folder, before)
    if any(isinstance(layer, MovedLowRank) for layer in layers_of(run.task.base).values()):
        # Two products are written as one of twice the rank, whose sums are made in another order.
        torch.testing.assert_close(outputs(again, needs_task), found, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(outputs(again, needs_task), found)
