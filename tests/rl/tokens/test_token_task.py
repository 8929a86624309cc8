"""GRPO and PPO of token policies as tasks: resumed to the bit, shared by processes, learned, and what is told on the way."""

import json
import math
import os
import signal
import threading

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from anabranch.errors import CheckpointError, ConfigError, DataError
from anabranch.experts.parscale import ParScale
from anabranch.lm import load_model
from anabranch.lm.decoder import Decoder
from anabranch.nn.attention import SelfAttention
from anabranch.nn.feed_forward import SwiGLU
from anabranch.nn.moe import MoE
from anabranch.rl import GRPO, TokenPPO
from anabranch.rl.tokens import Drawn, Outcome, Told
from anabranch.routing import Router
from anabranch.testing import check_task
from anabranch.train import Constant, TaskRunConfig, TrainConfig, Trainer, checkpoints, read_metrics
from rl_token_worlds import VOCABULARY, Echo, _EchoPlay, train_rank

MODEL = Decoder.Config(
    vocab_size=VOCABULARY,
    dim=32,
    num_layers=1,
    max_positions=48,
    attention=SelfAttention.Config(num_heads=2),
    feed_forward=SwiGLU.Config(hidden_dim=32),
)
EXPERTS = MODEL.replace(feed_forward=MoE.Config(num_experts=4, hidden_dim=32, router=Router.Config(balance=())))


def run(kind=GRPO, *, train=None, **fields):
    given = {"world": Echo.Config(), "model": MODEL, "questions": 4, "group": 4, "slots": 8, "eval_episodes": 4}
    settings = {"steps": 4, "batch_size": 8, "learning_rate": 1e-2, "schedule": Constant.Config(), "weight_decay": 0.0}
    return TaskRunConfig(task=kind.Config(**(given | fields)), train=TrainConfig(**(settings | (train or {}))))


def fit(config, out, **given):
    trainer = Trainer(config, out, **given)
    try:
        return trainer, trainer.fit()
    finally:
        trainer.stream.close()


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (GRPO, {"kl_weight": 0.1, "epochs": 2, "mean": "sequences"}),
        (GRPO, {"world": Echo.Config(turns=2), "model": EXPERTS, "scale": "none", "baseline": "others"}),
        (TokenPPO, {"world": Echo.Config(turns=2), "group": 2, "questions": 8}),
    ],
    ids=["grpo", "experts", "ppo"],
)
def test_the_contract_of_tasks(kind, fields):
    """Interrupted in the midst of a rollout too: steps are half of one."""
    check_task(run(kind, **fields), ranks=False)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    config = run(world=Echo.Config(turns=2), train={"batch_size": 16, "steps": 2, "accumulation": 2})
    one, _ = fit(config, tmp_path / "one")
    shared = config.replace(train=config.train.replace(parallel="ddp", device="cpu"))
    spawn(train_rank, args=(shared, str(tmp_path), 2), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, value in found[0]["weights"].items():
        assert torch.equal(value, found[1]["weights"][name])
        assert torch.allclose(value, one.model.state_dict()[name], atol=1e-4)
    assert found[0]["tokens"].equal(found[1]["tokens"])


def test_a_policy_learns_to_echo(tmp_path):
    config = run(
        questions=12, group=4, slots=48, train={"steps": 20, "batch_size": 48, "log_every": 1, "learning_rate": 1e-2}
    )
    trainer, result = fit(config, tmp_path / "run")
    records = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    first, last = (sum(record["reward"] for record in part) / 5 for part in (records[:5], records[-5:]))
    assert first < 0.3
    assert last > 2 * first
    assert result.headline == trainer.task.evaluate(trainer.model, 4, trainer._context)["mean_reward"]
    for record in records:
        # Engine and model are compared in every rollout.
        assert record["rollout_gap"] < 1e-4
        assert record["rollout_divergence"] == pytest.approx(0, abs=1e-6)
        assert record["divergence"] == pytest.approx(0, abs=1e-6)
        assert record["ratio_clipped"] == 0
    assert records[-1]["episodes_played"] == 20 * 48


def test_a_checkpoint_is_a_model_that_can_be_loaded(tmp_path):
    trainer, _ = fit(run(TokenPPO), tmp_path / "run")
    model, tokenizer = load_model(tmp_path / "run")
    assert tokenizer is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trainer.model.policy.state_dict()[name])


def test_what_was_given_is_what_training_starts_from(tmp_path):
    given = MODEL.build(seed=7)
    trainer, _ = fit(run(train={"steps": 0}), tmp_path / "run", model=given)
    assert trainer.model.policy is given
    with pytest.raises(ConfigError, match=r"another config than task\.model"):
        Trainer(run(), tmp_path / "other", model=EXPERTS.build(seed=0))
    with pytest.raises(ConfigError, match="model is a Linear"):
        Trainer(run(), tmp_path / "another", model=torch.nn.Linear(2, 2))


def test_routing_is_replayed_and_flips_are_counted(tmp_path):
    """After a first epoch the router goes other ways; with replay no token does."""
    flips = {}
    for replay in (True, False):
        config = run(
            model=EXPERTS.replace(init_std=0.3),
            replay=replay,
            epochs=6,
            train={"steps": 12, "log_every": 1, "learning_rate": 0.05},
            entropy_weight=1.0,
        )
        fit(config, tmp_path / str(replay))
        records = [record for record in read_metrics(tmp_path / str(replay)) if record["kind"] == "train"]
        assert records[0]["flipped_experts"] == 0
        flips[replay] = [record["flipped_in_training"] for record in records]
    assert set(flips[True]) == {0.0}
    assert max(flips[False]) > 0


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (GRPO, {"temperature": 0.7, "clip_high": 0.3, "entropy_weight": 0.01, "mean": "fixed"}),
        (GRPO, {"sequence_ratio": True, "kl_weight": 0.1, "kl_estimator": "k2", "correct_cap": 2.0, "epochs": 2}),
        (GRPO, {"top_p": 0.9, "baseline": "none", "scale": "batch", "learns_information": True}),
        (TokenPPO, {"values_information": True, "value_clip": None, "normalize_advantage": False, "gamma": 0.9}),
        (TokenPPO, {"kl_in": "loss", "kl_estimator": "k3", "temperature": 1.3, "mean": "sequences", "epochs": 2}),
    ],
)
def test_options_train_and_engine_and_model_agree(tmp_path, kind, fields):
    settings = {"steps": 4, "log_every": 1, "accumulation": 2}
    fit(run(kind, world=Echo.Config(turns=2), train=settings, **fields), tmp_path / "run")
    for record in read_metrics(tmp_path / "run"):
        if record["kind"] == "train":
            assert math.isfinite(record["loss"])
            # At temperature 1, whatever was drawn at.
            assert record["rollout_gap"] < 1e-4
            assert record["reward"] >= 0


def test_drift_costs_what_it_is_said_to(tmp_path):
    """With nothing else to learn from, a policy goes back to where it began."""
    moved = {}
    for weight in (0.0, 5.0):
        config = run(
            kl_weight=weight, entropy_weight=0.5, epochs=2, train={"steps": 16, "log_every": 1, "learning_rate": 3e-2}
        )
        trainer, _ = fit(config, tmp_path / str(weight))
        first = MODEL.build(seed=0).state_dict()
        weights = trainer.model.policy.state_dict()
        moved[weight] = float(sum((weights[name] - first[name]).square().sum() for name in first))
        assert (trainer.task._reference is not None) == (weight > 0)
    assert moved[5.0] < moved[0.0]


def test_information_is_not_learned_from_unless_asked(tmp_path):
    def learned(**fields):
        trainer = Trainer(run(world=Echo.Config(turns=2), **fields), tmp_path / f"{len(fields)}")
        batch = trainer.stream.next_batch(8)
        trainer.stream.close()
        trainer.close()
        return batch, trainer.task.learned(batch)

    batch, own_BL = learned()
    assert own_BL.equal(batch.own_BL)
    information_BL = batch.real_BL & ~batch.own_BL & (batch.own_BL.cumsum(-1) > 0)
    assert int(information_BL.sum()) == 8 * 3
    # Mask and information together are the response.
    prompt_BL = batch.own_BL.cumsum(-1) == 0
    assert int(own_BL.sum() + information_BL.sum()) == int((batch.real_BL & ~prompt_BL).sum())
    assert not batch.advantage_BL[~own_BL].any()
    both, all_BL = learned(learns_information=True)
    assert int(all_BL.sum()) == int((both.own_BL | (both.real_BL & (both.own_BL.cumsum(-1) > 0))).sum())


def test_a_world_that_gives_nan_stops_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(Echo, "rewards", lambda self, outcomes: [0.0] * 3 + [float("nan")] * (len(outcomes) - 3))
    with pytest.raises(DataError, match="episode 3 of rollout 0 was given the reward nan"):
        fit(run(), tmp_path / "run")


@pytest.mark.parametrize(
    ("kind", "fields", "why"),
    [
        (GRPO, {"group": 1}, "group is 1"),
        (GRPO, {"kl_in": "reward", "kl_weight": 0.1}, "needs a critic"),
        (GRPO, {"model": MODEL.replace(vocab_size=4)}, "the world has 9 tokens"),
        (GRPO, {"train": {"batch_size": 6}}, "does not divide the 16 episodes"),
        (GRPO, {"train": {"precision": "bfloat16"}}, "use float32"),
        (GRPO, {"train": {"parallel": "fsdp"}}, "whole weights|torchrun"),
        (TokenPPO, {"kl_weight": -1.0}, "kl_weight"),
        (GRPO, {"model": MODEL.replace(streams=ParScale.Config(num_streams=2))}, "parallel streams"),
    ],
)
def test_configs_that_cannot_be(tmp_path, kind, fields, why):
    with pytest.raises(ConfigError, match=why):
        Trainer(run(kind, **fields), tmp_path / "run")


def test_the_first_signal_changes_nothing_of_the_step_that_it_comes_in(tmp_path, monkeypatch):
    """Calls that failed were not tried again, and the router learned that their models say nothing."""
    trainer = Trainer(run(), tmp_path / "run")
    trainer.task.world.broken_off = broken_off = threading.Event()
    step, seen = _EchoPlay.step, []

    def signalled(play, turn):
        if not seen:
            signal.raise_signal(signal.SIGINT)
        seen.append(broken_off.is_set())
        return step(play, turn)

    monkeypatch.setattr(_EchoPlay, "step", signalled)
    result = trainer.fit()
    trainer.stream.close()
    assert (result.status, result.step) == ("interrupted", 1)
    assert len(seen) > 1
    assert not any(seen)


def test_a_world_may_be_played_again_after_one_has_failed(tmp_path, monkeypatch):
    trainer = Trainer(run(), tmp_path / "run")
    world, stream = trainer.task.world, trainer.stream
    world.broken_off = broken_off = threading.Event()
    world.close = broken_off.clear
    trainer.task.act_with(trainer.model)
    with monkeypatch.context() as patched:
        patched.setattr(_EchoPlay, "step", lambda play, turn: (_ for _ in ()).throw(DataError("gone")))
        with pytest.raises(DataError, match="gone"):
            stream.play([0], [0], Drawn(turn_tokens=4), split="train")
    assert not broken_off.is_set()
    assert len(stream.play([0], [0], Drawn(turn_tokens=4), split="train")) == 1
    stream.close()


def test_a_further_ctrl_c_ends_what_still_waits_in_the_world(tmp_path, monkeypatch):
    """The wait for it was broken off, and it was no longer told that nobody reads what comes of it."""
    trainer = Trainer(run(), tmp_path / "run")
    world, stream = trainer.task.world, trainer.stream
    trainer.task.act_with(trainer.model)
    world.waits, world.broken_off = True, threading.Event()
    begun, closed, told = threading.Event(), threading.Event(), []

    def close():
        closed.set()
        told.append(world.broken_off.is_set())

    def waits(play, turn):
        begun.set()
        closed.wait(600)
        return Told()

    def pressed(number, frame):
        if not closed.is_set():
            raise KeyboardInterrupt

    def press():
        begun.wait()
        while not closed.wait(0.3):
            os.kill(os.getpid(), signal.SIGINT)

    world.close = close
    monkeypatch.setattr(_EchoPlay, "step", waits)
    usual = signal.signal(signal.SIGINT, pressed)
    presses = threading.Thread(target=press)
    presses.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            stream.play([0, 1], [0, 1], Drawn(turn_tokens=4), split="train")
    finally:
        closed.set()
        presses.join()
        signal.signal(signal.SIGINT, usual)
    assert told == [True]


def test_a_damaged_rollout_is_told(tmp_path):
    config = run(train={"steps": 3})
    fit(config, tmp_path / "run")
    notes = checkpoints(tmp_path / "run")[-1] / "rollout.json"
    held = json.loads(notes.read_text())
    notes.write_text(json.dumps(held | {"number": 7}))
    with pytest.raises((CheckpointError, DataError), match=r"damaged|not as it was written|SHA256"):
        Trainer(config.replace(train=config.train.replace(steps=4)), tmp_path / "run", resume=True)


def test_what_rewards_hang_on_is_kept(tmp_path, monkeypatch):
    """A world whose rewards grow with each rollout goes on where it was; an evaluation is no rollout."""

    def rewards(self, outcomes):
        self.count = getattr(self, "count", 0) + 1
        return [self.count + outcome.reward for outcome in outcomes]

    monkeypatch.setattr(Echo, "rewards", rewards)
    monkeypatch.setattr(Echo, "state_dict", lambda self: {"count": getattr(self, "count", 0)})
    monkeypatch.setattr(Echo, "load_state_dict", lambda self, state: setattr(self, "count", state["count"]))
    config = run(train={"steps": 4, "log_every": 1, "eval_every": 1})
    fit(config, tmp_path / "run")
    more = config.replace(train=config.train.replace(steps=6))
    trainer = Trainer(more, tmp_path / "run", resume=True)
    assert trainer.task.world.count == 2
    trainer.fit()
    told = [int(record["reward"]) for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    assert told == [1, 1, 2, 2, 3, 3]
    assert Outcome(1.0).measures == {}
