"""A rollout that is stopped, and a rate that is halved, where the policy has moved too far."""

from types import SimpleNamespace

import pytest
import torch

from anabranch.errors import CheckpointError
from anabranch.rl import Categorical
from anabranch.rl.target_kl import TargetKL
from anabranch.train import Trainer, checkpoints, read_metrics
from rl_worlds import rollouts, run

EPOCHS, BATCHES = 3, 2


def walked(target, far, num=3):
    """Paces of the steps of ``num`` rollouts; ``far`` gives (rollout, epochs done) -> divergence. And how often it was asked."""
    asked = []

    def divergence():
        asked.append((stream.rollout.number, stream.epochs_done))
        return far(stream.rollout.number, stream.epochs_done)

    stream = SimpleNamespace(rollout=None, epochs_done=0.0, divergence=divergence)
    paces = []
    for step in range(num * EPOCHS * BATCHES):
        # Before a step; then its mini-batch is taken, for which a rollout may be made first.
        paces.append(target.pace(stream))
        number, place = divmod(step, EPOCHS * BATCHES)
        stream.rollout, stream.epochs_done = SimpleNamespace(number=number), (place + 1) / BATCHES
    return paces, asked


def test_a_rollout_is_stopped_after_the_epoch_that_went_too_far():
    target = TargetKL(0.1, "stop", EPOCHS)
    paces, asked = walked(target, lambda number, done: 0.2 if (number, done) in ((0, 2), (1, 1)) else 0.1)
    assert paces == [1, 1, 1, 1, 0, 0] + [1, 1, 0, 0, 0, 0] + [1] * 6
    # Once it is stopped nothing is worked out, nor in the midst of an epoch.
    assert asked == [(0, 1), (0, 2), (1, 1), (2, 1), (2, 2)]
    assert target.told() == {"epochs_passed": 3.0}


def test_the_rate_is_halved_once_a_rollout_and_stays_so():
    target = TargetKL(0.1, "halve", EPOCHS)
    paces, asked = walked(target, lambda number, done: 0.2 if number != 1 else 0.05, num=4)
    assert paces == [1] * 6 + [0.5] * 6 + [0.5] * 6 + [0.25] * 6
    assert asked == [(0, 3), (1, 3), (2, 3)]
    assert target.told() == {"halvings": 2.0}


def test_without_a_target_nothing_is_looked_at():
    target = TargetKL(None, "stop", EPOCHS)
    paces, asked = walked(target, lambda number, done: 9.0)
    assert (set(paces), asked, target.told()) == ({1.0}, [], {})


@pytest.mark.parametrize("then", ["stop", "halve"])
def test_what_is_asked_twice_counts_once_and_goes_on_from_its_state(then):
    target = TargetKL(0.1, then, EPOCHS)
    done = 1.0 if then == "stop" else 3.0
    stream = SimpleNamespace(rollout=SimpleNamespace(number=4), epochs_done=done, divergence=lambda: 1.0)
    pace = target.pace(stream)
    other = TargetKL(0.1, then, EPOCHS)
    other.load_state_dict(target.state_dict())
    assert (target.pace(stream), other.pace(stream)) == (pace, pace)
    assert target.state_dict() == other.state_dict()
    # A rollout that was made and not begun with, as one that is resumed may have.
    stream.rollout, stream.epochs_done = SimpleNamespace(number=5), 0.0
    assert other.pace(stream) == (1.0 if then == "stop" else 0.5)
    with pytest.raises(CheckpointError, match="what came of target_kl cannot be read"):
        other.load_state_dict({"stopped": 1})
    other.load_state_dict({})
    assert other.state_dict() == target.state_dict()


def test_the_divergence_is_that_of_the_whole_rollout():
    stream = rollouts()
    stream.next_batch(8)
    assert stream.epochs_done == 0.25
    assert stream.divergence() == 0
    with torch.no_grad():
        stream.model.policy[-1].bias.copy_(torch.tensor([0.3, -0.2]))
    samples = stream.rollout.samples
    new = Categorical(stream.model(samples.observation_BD, "policy"))
    expected = Categorical(samples.parameter_BP).divergence(new).mean().item()
    assert stream.divergence() == pytest.approx(expected, rel=1e-5)
    # Processes have every second sample each, and divide by all.
    parts = 0.0
    for rank in range(2):
        stream.rank, stream.world_size = rank, 2
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.distributed.all_reduce", lambda total: None)
            parts += stream.divergence()
    assert parts == pytest.approx(expected, rel=1e-5)


def test_a_run_that_is_stopped_learns_from_first_epochs_alone_and_resumes_to_the_bit(tmp_path):
    """Two epochs of four mini-batches, the second always passed over: weights are those of a run of one epoch."""
    made = run(steps=24, target_kl=1e-12, train={"log_every": 8, "checkpoint_every": 5, "keep_checkpoints": 9})
    trainer = Trainer(made, tmp_path / "straight")
    trainer.fit()
    # The second epoch of each of three rollouts, four mini-batches long.
    assert trainer.task.steps_passed() == 12
    one = Trainer(run(steps=12, epochs=1), tmp_path / "one")
    one.fit()
    for name, value in one.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name
    lines = [line for line in read_metrics(tmp_path / "straight") if line["kind"] == "train"]
    assert [line["epochs_passed"] for line in lines] == [1, 2, 3]
    assert [line["learning_rate"] for line in lines] == [0, 0, 0]
    # Of a mini-batch that was only looked at.
    assert all(line["divergence"] > 0 and line["loss"] != 0 for line in lines)

    class StopError(Exception):
        pass

    def stop(event):
        if event.kind == "checkpoint" and event.step == 15:
            raise StopError

    cut = Trainer(made, tmp_path / "cut", on_event=stop)
    with pytest.raises(StopError):
        cut.fit()
    # Three of the second rollout's four are passed over by then.
    assert cut.task.steps_passed() == 7
    Trainer(made, tmp_path / "cut", resume=True).fit()
    ours, theirs = (checkpoints(tmp_path / name)[-1] for name in ("cut", "straight"))
    for name in ("model.safetensors", "optimizer.safetensors", "rollout.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_a_rate_that_is_halved_is_told(tmp_path):
    made = run(steps=24, target_kl=1e-12, on_target_kl="halve", train={"log_every": 8})
    Trainer(made, tmp_path).fit()
    lines = [line for line in read_metrics(tmp_path) if line["kind"] == "train"]
    assert [line["halvings"] for line in lines] == [0, 1, 2]
    assert [line["learning_rate"] for line in lines] == [1e-2, 5e-3, 2.5e-3]
