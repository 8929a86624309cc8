"""Methods of the catalogue as methods of `adapt`: each learns from rows, and what it writes does the same on another copy of the base."""

import json
import shutil

import pytest
import torch

from anabranch.adapters import load_peft
from anabranch.adapters.adapt import AdaptTask, Catalogued, method_named, method_names, methods_with
from anabranch.adapters.catalogue import CARDS
from anabranch.adapters.graft import layers_of
from anabranch.adapters.own_folder import is_own, read_own
from anabranch.data import ByteTokenizer
from anabranch.errors import ConfigError
from anabranch.experts.rexmoe import ProgressiveScaling, ReXMoE
from anabranch.extras import is_installed
from anabranch.lm import Decoder, export_huggingface, load_model, save_model
from anabranch.nn import MoE, SelfAttention, SwiGLU
from anabranch.routing import BiasBalancer, HashScore, Positive, RateBalance, ReluScore, Router, SwitchLoss, TopK
from anabranch.train import Constant, Examples, TaskRunConfig, TrainConfig, Trainer, checkpoints, read_task_run_config
from anabranch.train.hooks import StepHooks

OPTIONS = {
    "lora-plus": {"rank": 2},
    "lora-fa": {"rank": 2},
    "eva": {"rank": 2},
    "dylora": {"rank": 2},
    "dora": {"rank": 2},
    "ia3": {},
    "ssf": {"targets": ("q",)},
    "adapter-parallel": {"width": 2},
    "adapter-houlsby": {"width": 2},
    "shira": {"rank": 1},
    "fish-mask": {"rank": 1},
    "intrinsic": {"size": 16},
    "mixlora": {"rank": 2, "number": 3, "active": 2},
    "prompt-tuning": {"tokens": 3},
    "prefix-tuning": {"tokens": 3},
    "mam": {"tokens": 2, "width": 2},
    "lst": {"reduction": 4},
    "ln-tuning": {},
    "full": {},
}
# What peft has, too, in its own form.
IN_PEFTS_FORM = {"lora-plus", "lora-fa", "eva", "dylora", "dora", "ia3", "prompt-tuning", "prefix-tuning"}
# Where one is enough, the others are among the slow ones.
QUICK = {"dora", "lst", "mam", "ln-tuning"}
TRAIN_THE_BASE = [id for id in method_names() if id in CARDS and CARDS[id].trains_base]
BALANCE = (BiasBalancer.Config(), SwitchLoss.Config())
ROUTER = Router.Config(select=TopK.Config(top_k=1), balance=BALANCE)
HASHED = Router.Config(score=HashScore.Config(), select=TopK.Config(top_k=1), balance=BALANCE[:1])
RATED = Router.Config(score=ReluScore.Config(), select=Positive.Config(), balance=(RateBalance.Config(),))
EXPERTS = {
    "linear": MoE.Config(num_experts=4, hidden_dim=16, router=ROUTER),
    # Without a parameter, and with a schedule of candidates that is over.
    "hash": MoE.Config(num_experts=4, hidden_dim=16, router=HASHED),
    "rexmoe": ReXMoE.Config(num_experts=4, hidden_dim=8, reuse=2, psr=ProgressiveScaling.Config(), router=ROUTER),
    "relu": MoE.Config(num_experts=4, hidden_dim=16, router=RATED),
}
TOKENS = torch.tensor([[3, 17, 60, 8, 90, 41, 7, 1], [0, 5, 22, 1, 59, 30, 2, 2]])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("catalogued")
    config = Decoder.Config(
        vocab_size=257,
        dim=32,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
        feed_forward=SwiGLU.Config(hidden_dim=48),
        max_positions=64,
    )
    export_huggingface(root / "base", config.build(seed=1), ByteTokenizer.Config().build(), family="llama")
    rows = [
        {"task": "upper", "input": word, "output": word.upper()} for word in ("ab", "cde", "fghi", "jk", "lmn", "op")
    ]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def trainer(place, out, id, steps, base="base", accumulation=1, **more):
    method = Catalogued.Config(id=id, **OPTIONS.get(id, {}))
    task = AdaptTask.Config(model=str(place / base), data=str(place / "rows.jsonl"), method=method, held_out=0.0)
    train = TrainConfig(
        steps=steps,
        batch_size=2,
        accumulation=accumulation,
        learning_rate=0.01,
        eval_every=None,
        checkpoint_every=2,
        device="cpu",
        schedule=Constant.Config(),
    )
    return Trainer(TaskRunConfig(task=task, train=train), out, **more)


def routed(kind):
    """A base whose routers are of this kind."""
    return Decoder.Config(
        vocab_size=257,
        dim=32,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=4, num_kv_heads=2, qkv_bias=True),
        feed_forward=EXPERTS[kind],
        max_positions=64,
    ).build(seed=1)


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits_BLV


@pytest.mark.parametrize("id", [id if id in QUICK else pytest.param(id, marks=pytest.mark.slow) for id in OPTIONS])
def test_from_rows_to_what_others_read(place, tmp_path, id):
    run = trainer(place, tmp_path / "run", id, 4)
    run.fit()
    found = logits(run.task.base)
    base, _ = load_model(place / "base")
    assert not torch.equal(found, logits(base))
    written = run.task.write(tmp_path / "adapter")
    assert written.form == ("model" if CARDS[id].trains_base else "peft" if id in IN_PEFTS_FORM else "anabranch")
    if written.form == "model":
        again, tokenizer = load_model(written.folder)
        assert tokenizer is not None
    else:
        again = (read_own if is_own(written.folder) else load_peft)(written.folder, base)
    assert torch.equal(logits(again), found)


@pytest.mark.parametrize(
    "id",
    ["lst", "ln-tuning", pytest.param("mam", marks=pytest.mark.slow), pytest.param("full", marks=pytest.mark.slow)],
)
def test_resumed_to_the_bit(place, tmp_path, id):
    straight = trainer(place, tmp_path / "straight", id, 4)
    straight.fit()
    trainer(place, tmp_path / "parts", id, 2).fit()
    config = read_task_run_config(tmp_path / "parts", AdaptTask)
    config = config.replace(train=config.train.replace(steps=4))
    resumed = Trainer(config, tmp_path / "parts", resume=True)
    resumed.fit()
    assert torch.equal(logits(resumed.task.base), logits(straight.task.base))


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("id", TRAIN_THE_BASE)
def test_a_base_that_moves_goes_on_where_it_stopped(place, tmp_path, id, kind):
    """Biases, rates and schedules of its routers are no parameters; from those that it was read with, it was another run."""
    base = tmp_path / "routed"
    save_model(base, routed(kind), ByteTokenizer.Config().build())
    straight = trainer(place, tmp_path / "straight", id, 4, base=base)
    straight.fit()
    wanted, begun = straight.task.base.state_dict(), routed(kind).state_dict()
    buffers = wanted.keys() - dict(straight.task.base.named_parameters()).keys()
    assert any(not torch.equal(wanted[name], begun[name]) for name in buffers)
    # Ended after step 2 of 4, by whose share of all a schedule goes.
    shutil.copytree(tmp_path / "straight", tmp_path / "ended")
    *_, last = checkpoints(tmp_path / "ended")
    shutil.rmtree(last)
    resumed = trainer(place, tmp_path / "ended", id, 4, base=base, resume=True)
    resumed.fit()
    found = resumed.task.base.state_dict()
    assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []


def test_b_of_lora_plus_learns_16_times_as_quickly(place, tmp_path):
    run = trainer(place, tmp_path / "run", "lora-plus", 2)
    factors = {name: run.task.speed(name, one) for name, one in run.model.named_parameters() if one.requires_grad}
    assert {name.endswith(".b"): speed and speed.factor for name, speed in factors.items()} == {True: 16.0, False: None}


def test_whatever_a_card_may_be_told_can_be_said():
    own = [card for card in CARDS.values() if card.backend == "own" and card.id != "lt-sft"]
    for card in (card for card in own if method_named(card.id).owner is Catalogued):
        assert set(card.options) <= {"targets", *Catalogued.Config.__dataclass_fields__}, card.id
        assert Catalogued.Config(id=card.id, **card.options).options() == card.options


def test_a_method_that_needs_a_whole_training_first_is_refused():
    with pytest.raises(ConfigError, match="a full training moved furthest, and adapt makes none"):
        method_named("lt-sft")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_entries_of_fish_mask_have_the_greatest_information_of_the_rows(place, tmp_path, accumulation):
    """However a step is cut up: of all rows where there are few, each for itself, and of the sum over the answer's tokens."""
    run = trainer(place, tmp_path / "run", "fish-mask", 1, accumulation=accumulation)
    layers = layers_of(run.task.base)
    # Written out: the matrices themselves learn, one row after another.
    base, _ = load_model(place / "base")
    names, weights = [f"blocks.{n}.attention.qkv.weight" for n in range(2)], dict(base.named_parameters())
    rows = Examples(*run.task.learned.tensors, *run.task.choices[0], seed=0).next_batch(6)
    # Answers differ in length, or sum and mean would choose the same.
    assert len({int(length - start) for start, length in zip(rows[1], rows[2], strict=True)}) > 1
    total = {name: torch.zeros_like(weights[name]) for name in names}
    for row in range(6):
        token_L, start, length = rows[0][row].long(), int(rows[1][row]), int(rows[2][row])
        log_LV = base(token_L[None, :length]).logits_BLV[0].log_softmax(-1)
        loss = -log_LV[start - 1 : length - 1].gather(1, token_L[start:length, None]).sum()
        for name, slope in zip(names, torch.autograd.grad(loss, [weights[name] for name in names]), strict=True):
            total[name] += slope**2
    # q has 32 outputs, k and v have 16 each.
    part = {"q": slice(0, 32), "v": slice(48, 64)}
    assert layers.keys() == {f"blocks.{n}.attention.{word}" for n in range(2) for word in part}
    for name, layer in layers.items():
        matrix, _, word = name.rpartition(".")
        score_OC = total[f"{matrix}.qkv.weight"][part[word]]
        wanted = score_OC.reshape(-1).topk(layer.config.entries).indices.sort().values
        assert torch.equal(layer.index, wanted)
        assert not layer.value.any()


@pytest.mark.parametrize("targets", [("q", "v"), ("all",)])
def test_eva_starts_in_the_main_directions_of_what_layers_are_given(place, tmp_path, targets, monkeypatch):
    """Of the tokens of all rows, without padding; nothing is added before the first step, and what was written is LoRA of peft's."""
    monkeypatch.setitem(OPTIONS, "eva", {"rank": 3, "targets": targets})
    run = trainer(place, tmp_path / "run", "eva", 1)
    layers = layers_of(run.task.base)
    assert not any(layer.b.any() for layer in layers.values())
    # Written out: what goes into q and v is what the norm before makes, and into o and down what stands before these.
    base, _ = load_model(place / "base")
    inputs = {}
    for name, module in base.named_modules():
        if name.endswith(("qkv", "attention.out", "w13", "w2")):
            module.register_forward_pre_hook(
                lambda module, given, name=name: inputs.setdefault(name, []).append(given[0][0])
            )
    rows = Examples(*run.task.learned.tensors, *run.task.choices[0], seed=0).next_batch(6)
    with torch.no_grad():
        for row in range(6):
            base(rows[0][row].long()[None, : int(rows[2][row]) - 1])
    fused = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "out", "gate": "w13", "up": "w13", "down": "w2"}
    for name, layer in layers.items():
        matrix, _, word = name.rpartition(".")
        x_NC = torch.cat(inputs[f"{matrix}.{fused[word]}"]).double()
        wanted_RC = torch.linalg.svd(x_NC, full_matrices=False).Vh[:3]
        torch.testing.assert_close(layer.a.double() @ wanted_RC.mT @ wanted_RC, layer.a.double(), atol=1e-4, rtol=0)
        torch.testing.assert_close(layer.a @ layer.a.mT, torch.eye(3), atol=1e-5, rtol=0)
    run.fit()
    written = run.task.write(tmp_path / "adapter")
    assert written.form == "peft"
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize("kind", ["linear", "hash", "rexmoe"])
@pytest.mark.parametrize("id", ["fish-mask", "dora", "lst", "prompt-tuning", "full"])
def test_routers_of_a_frozen_base_are_as_they_were(place, tmp_path, id, kind):
    """Biases too, which no gradient moves: they are not in what an adapter writes, and it would be used beside others than it learned."""
    if (id, kind) == ("prompt-tuning", "hash"):
        pytest.skip("virtual tokens have no ids to route by")
    base = routed(kind)
    StepHooks(base, 10).run_after(10)
    save_model(tmp_path / "routed", base, ByteTokenizer.Config().build())
    before, _ = load_model(tmp_path / "routed")
    run = trainer(place, tmp_path / "run", id, 3, base=tmp_path / "routed")
    state = run.task.base.state_dict()
    biases = [name for name in before.state_dict() if name.endswith("expert_bias")]
    assert biases
    # A look at the first rows counts nothing either.
    assert not any(value.any() for name, value in run.task.base.named_buffers() if name.endswith("load_E"))
    run.fit()
    moved = {
        name for name, value in before.state_dict().items() if name in state and not torch.equal(value, state[name])
    }
    assert moved.issuperset(biases) if id == "full" else not moved


def test_names():
    assert {"lora", "mhr", "gate", "dora", "lst", "full"} <= set(method_names())
    assert not {"catalogue", "adalora", "cpt"} & set(method_names())
    # What peft runs is there where peft is.
    assert ("vera" in method_names()) == is_installed("peft")
    assert method_named("dora") == Catalogued.Config(id="dora")
    # Those that have more to them than the catalogue knows are themselves.
    assert method_named("mhr").owner.kind == "mhr"
    own = {id for id, card in CARDS.items() if card.backend == "own"}
    # What `--method` would refuse is not among them.
    assert own - set(method_names()) == {"lt-sft"}
    assert methods_with("start") == ["mhr", "poly"]
    assert {"lora", "dora", "mhr"} <= set(methods_with("rank"))
    assert not {"ia3", "gate", "lt-sft"} & set(methods_with("rank"))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: method_named("lorra"), "did you mean 'lora'"),
        (lambda: method_named("vera"), "run by peft, not by code of ours; train it with the package peft"),
        (lambda: method_named("mera"), "method is 'mera', which nobody runs here; "),
        (
            lambda: method_named("lorahub"),
            "method is 'lorahub', which adapt does not train; what runs it: anabranch adapters merge --method linear --model MODEL",
        ),
        (
            lambda: method_named("mezo"),
            "method is 'mezo', which is a setting of training and no adapter; say --set train.optimizer=mezo with any method",
        ),
        (lambda: method_named("gradient-checkpointing"), "say --set train.recompute=true with any method"),
        (lambda: method_named("catalogue"), "takes a method's id"),
        (lambda: Catalogued.Config(id="dora", width=3), "dora has no option 'width'; it has rank, alpha, targets"),
        (lambda: Catalogued.Config(id="dorra"), "there is no method 'dorra'; did you mean 'dora'"),
    ],
)
def test_what_cannot_be(make, told):
    with pytest.raises(ConfigError, match=told):
        make()


def test_hyphens_and_underscores_name_the_same_method():
    """Pages, cards and cures of errors have both."""
    for name in method_names():
        assert {method_named(name.replace("_", "-")), method_named(name.replace("-", "_"))} == {method_named(name)}
