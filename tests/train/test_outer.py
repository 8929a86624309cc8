"""Runs that learn together in rounds: ``parallel.diloco`` of the trainer."""

import os
import signal
import threading
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from anabranch.cluster.pccl import Communicator, DiLoCo, Kicked, MasterLost, Mismatch, PeerLost
from anabranch.errors import ConfigError
from anabranch.lm import load_model
from anabranch.testing import run_ranks
from anabranch.train import Trainer, checkpoints, read_metrics, read_run_config
from anabranch.train.config import DiLoCoConfig, Parallel
from anabranch.train.outer import Outer
from pccl_peers import BOUND_S, a_master, in_time, until_somebody_waits


def with_peers(run, **settings):
    return run.replace(parallel=Parallel(diloco=DiLoCoConfig(**settings)))


def weights(folder):
    return {name: value.detach().clone() for name, value in load_model(folder)[0].named_parameters()}


def trained(rank, world, place):
    """In a process of its own."""
    os.environ["ANABRANCH_NO_KERNELS"] = "1"
    # It is no rank of torchrun.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    return Trainer(read_run_config(f"{place}/{rank}.config"), f"{place}/{rank}").fit().status


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_two_runs_end_with_the_same_weights(make_run, tmp_path, asynchronous):
    run = make_run(steps=6)
    with a_master() as master:
        settings = {"master": master.address, "peers": 2, "every": 2, "asynchronous": asynchronous}
        for worker in range(2):
            (tmp_path / f"{worker}.config").mkdir()
            with_peers(run, worker=worker, **settings).save(tmp_path / f"{worker}.config")
        assert run_ranks(trained, 2, str(tmp_path), backend=None, timeout_s=120) == ["finished"] * 2
    first, second = weights(tmp_path / "0"), weights(tmp_path / "1")
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    losses = [[line["loss"] for line in read_metrics(tmp_path / name) if line["kind"] == "train"] for name in "01"]
    # Each has seen text of its own.
    assert len(losses[0]) == len(losses[1]) == 6
    assert losses[0] != losses[1]


def test_alone_it_learns_resumes_and_goes_on_where_it_was(make_run, tmp_path):
    with a_master() as master:
        run = with_peers(make_run(steps=4, checkpoint_every=2), master=master.address, every=2)
        Trainer(run, tmp_path / "a").fit()
        longer = run.replace(train=run.train.replace(steps=8))
        result = Trainer(longer, tmp_path / "a", resume=True).fit()
    assert result.step == 8
    assert [int(path.name.split("-")[-1]) for path in checkpoints(tmp_path / "a")][-1] == 8
    assert [line["step"] for line in read_metrics(tmp_path / "a") if line["kind"] == "train"] == list(range(1, 9))
    assert read_run_config(tmp_path / "a").parallel.diloco.every == 2


def test_an_outer_step_of_one_without_momentum_is_the_plain_run(make_run, tmp_path):
    """Learning rate 1 and no momentum: outer weights become what was learned."""
    with a_master() as master:
        plain = make_run(steps=4)
        alone = with_peers(plain, master=master.address, every=2, learning_rate=1.0, momentum=0.0)
        Trainer(plain, tmp_path / "plain").fit()
        Trainer(alone, tmp_path / "alone").fit()
    first, second = weights(tmp_path / "plain"), weights(tmp_path / "alone")
    assert all((value - second[name]).abs().max() < 1e-6 for name, value in first.items())


def told_to_stop(event):
    """A while after training has begun, and signals are caught."""
    if event.kind == "start":
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()


def test_what_is_saved_and_told_at_the_end_is_the_trained_model(make_run, tmp_path):
    """The last outer step of an asynchronous run comes before the last evaluation and checkpoint, also where these are due."""
    with a_master() as master:
        run = make_run(steps=4, checkpoint_every=2)
        late = with_peers(run, master=master.address, every=2, asynchronous=True)
        trainer = Trainer(late, tmp_path / "a")
        trainer.fit()
    held = dict(trainer.model.named_parameters())
    assert all(torch.equal(value, held[name].detach()) for name, value in weights(tmp_path / "a").items())
    told = [line for line in read_metrics(tmp_path / "a") if line["kind"] == "validation"]
    assert [line["step"] for line in told].count(4) == 1
    trainer._folder.write = lambda record: None
    trainer._evaluate()
    again = trainer._progress.evaluation
    measured = trainer.task.evaluate(trainer.model, trainer._held_out, trainer._context)
    assert {name: told[-1][name] for name in measured} == {name: again[name] for name in measured}


def test_told_to_stop_it_waits_for_nobody(make_run, tmp_path):
    with a_master() as master:
        waiting = with_peers(make_run(steps=4), master=master.address, every=2, peers=2)
        result = Trainer(waiting, tmp_path / "a", on_event=told_to_stop).fit()
    assert (result.status, result.signal, result.step) == ("interrupted", "SIGTERM", 0)
    # And where the others do not let it in, either.
    with a_master() as master, Communicator(master.address):
        late = with_peers(make_run(steps=4), master=master.address, every=2)
        result = Trainer(late, tmp_path / "b", on_event=told_to_stop).fit()
    assert (result.status, result.step) == ("interrupted", 0)


def test_told_to_stop_at_the_end_of_a_round_it_keeps_its_own_weights():
    """Another still trains that round."""
    is_gone, told = threading.Event(), []

    def trains_on(config, model):
        outer = Outer(config, model)
        outer.before(0)
        assert is_gone.wait(BOUND_S)
        outer.after(is_last=True)
        outer.close()
        told.append("done")

    with a_master() as master:
        config = DiLoCoConfig(master=master.address, every=1, peers=2)
        model, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        thread = threading.Thread(target=trains_on, args=(config, other), daemon=True)
        thread.start()
        outer = Outer(config, model)
        assert in_time(lambda: outer.before(0)) == 0
        with torch.no_grad():
            model.weight.add_(1.0)
        own = model.weight.detach().clone()
        outer.is_stopped = lambda: True
        assert in_time(lambda: outer.after(is_last=True)) is False
        outer.finish()
        outer.close()
        assert not told
        assert torch.equal(model.weight, own)
        is_gone.set()
        thread.join(BOUND_S)
    assert told == ["done"]


class Killed(BaseException):
    """As by kill -9: nothing is saved."""


def test_a_run_that_resumes_in_the_midst_of_a_round_does_no_step_twice(make_run, tmp_path):
    seen = []

    def killed_once(event):
        if event.kind == "step":
            seen.append(event.step)
            if seen == [1, 2, 3, 4, 5, 6, 7]:
                raise Killed

    with a_master() as master:
        run = with_peers(make_run(steps=8, checkpoint_every=3), master=master.address, every=4)
        with pytest.raises(Killed):
            Trainer(run, tmp_path / "a", on_event=killed_once).fit()
        # From the checkpoint of step 6.
        result = Trainer(run, tmp_path / "a", resume=True, on_event=killed_once).fit()
    assert result.step == 8
    assert seen == [1, 2, 3, 4, 5, 6, 7, 7, 8]
    assert [line["step"] for line in read_metrics(tmp_path / "a") if line["kind"] == "train"] == list(range(1, 9))


def saved_steps(folder):
    return [int(path.name.split("-")[-1]) for path in checkpoints(folder)]


def train_steps(folder):
    return [line["step"] for line in read_metrics(folder) if line["kind"] == "train"]


@contextmanager
def a_group_at(master, run, step, *, goes_to):
    """Another run of the same group, which has come to ``step`` when somebody joins it, and trains on with whoever does."""
    may_go, at_step, ended = threading.Event(), threading.Event(), []

    def wait(event):
        if event.kind == "step" and event.step == step:
            at_step.set()
            assert may_go.wait(BOUND_S)

    def train(folder):
        other = run.replace(train=run.train.replace(steps=goes_to), parallel=other_worker(run))
        ended.append(Trainer(other, folder, on_event=wait).fit())

    with TemporaryDirectory() as place:
        thread = threading.Thread(target=train, args=(Path(place) / "other",), daemon=True)
        thread.start()
        assert at_step.wait(BOUND_S)

        def let_go_when_somebody_waits():
            until_somebody_waits(master)
            may_go.set()

        threading.Thread(target=let_go_when_somebody_waits, daemon=True).start()
        yield ended
        may_go.set()
        thread.join(BOUND_S)


def other_worker(run):
    diloco = run.parallel.diloco
    return Parallel(diloco=diloco.replace(worker=diloco.worker + 1))


def killed_at(step):
    def on_event(event):
        if event.kind == "step" and event.step == step:
            raise Killed

    return on_event


def test_of_a_run_that_had_gone_further_than_its_group_nothing_newer_is_left(make_run, tmp_path):
    """Its old checkpoints once stayed the newest: killed again, it went on from those, and overwrote the others' weights."""
    run = make_run(steps=12, checkpoint_every=2, eval_every=8, keep_checkpoints=2)
    with a_master(dead_s=BOUND_S) as master:
        run = with_peers(run, master=master.address, every=2)
        with pytest.raises(Killed):
            Trainer(run, tmp_path / "a", on_event=killed_at(9)).fit()
    assert saved_steps(tmp_path / "a") == [6, 8]
    seen = []

    def watch(event):
        seen.append((event.kind, event.step, saved_steps(tmp_path / "a")))
        if event.kind == "step":
            # At no time is there a checkpoint or a line of what is given up.
            assert not [step for step in saved_steps(tmp_path / "a") if step > event.step]
            assert train_steps(tmp_path / "a") == sorted(set(train_steps(tmp_path / "a")))
            assert max(line["step"] for line in read_metrics(tmp_path / "a")) <= event.step
            if event.step == 7:
                raise Killed

    with a_master(dead_s=BOUND_S) as master:
        run = with_peers(run, master=master.address, every=2)
        with a_group_at(master, run, 2, goes_to=8), pytest.raises(Killed):
            Trainer(run, tmp_path / "a", resume=True, on_event=watch).fit()
    assert [step for kind, step, _ in seen if kind == "step"] == [3, 4, 5, 6, 7]
    assert saved_steps(tmp_path / "a") == [4, 6]
    trainer = Trainer(run, tmp_path / "a", resume=True)
    assert (trainer._progress.step, trainer._progress.evaluation) == (6, None)
    trainer.close()
    # Nothing is lost either.
    aside = sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir())
    assert aside[:2] == ["given-up-step-00000006", "given-up-step-00000008"]


def test_where_the_group_begins_anew_so_does_a_run_that_had_gone_further(make_run, tmp_path):
    run = make_run(steps=4, checkpoint_every=2, eval_every=2)
    with a_master(dead_s=BOUND_S) as master:
        run = with_peers(run, master=master.address, every=2)
        with pytest.raises(Killed):
            Trainer(run, tmp_path / "a", on_event=killed_at(3)).fit()
        trainer = Trainer(run, tmp_path / "a", resume=True)
        told = []

        def before(step):
            # As of a first meeting with one that has not trained yet.
            told.append(step)
            return 0 if len(told) == 1 else step

        trainer._outer.before, trainer._outer.after = before, lambda is_last=False: None
        assert trainer.fit().step == 4
    assert told[:2] == [2, 0]
    assert train_steps(tmp_path / "a") == [1, 2, 3, 4]
    assert (tmp_path / "a" / "metrics.jsonl.old1").exists()
    assert saved_steps(tmp_path / "a") == [2, 4]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("error", [MasterLost, Kicked, Mismatch, PeerLost, MemoryError])
def test_what_was_trained_is_saved_where_the_end_of_a_round_fails(make_run, tmp_path, monkeypatch, error, asynchronous):
    """With the weights that were trained here, which are whole; once nothing since the last checkpoint was."""
    run = make_run(steps=8, checkpoint_every=100, eval_every=100)
    rounds = []
    real = DiLoCo._reduce, DiLoCo._shared

    def fails(step):
        def call(self, *given):
            rounds.append(step)
            if self.steps >= 4 and len(rounds) > 2:
                raise error("it failed")
            return real[step](self, *given)

        return call

    monkeypatch.setattr(DiLoCo, "_reduce", fails(0))
    monkeypatch.setattr(DiLoCo, "_shared", fails(1))
    with a_master() as master:
        learning = with_peers(run, master=master.address, every=2, asynchronous=asynchronous)
        trainer = Trainer(learning, tmp_path / "a")
        with pytest.raises(error, match="it failed"):
            trainer.fit()
    step = trainer._progress.step
    assert step >= 4
    assert saved_steps(tmp_path / "a") == [step]
    held = dict(trainer.model.named_parameters())
    assert all(torch.equal(value, held[name].detach()) for name, value in weights(tmp_path / "a").items())
    assert train_steps(tmp_path / "a") == list(range(1, step + 1))
    monkeypatch.undo()
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    with a_master() as master:
        learning = with_peers(run, master=master.address, every=2, asynchronous=asynchronous)
        assert Trainer(learning, tmp_path / "a", resume=True).fit().step == 8
    assert train_steps(tmp_path / "a") == list(range(1, 9))


@pytest.mark.parametrize("is_told", [False, True])
def test_a_last_round_without_an_end_is_not_the_end_of_the_run(make_run, tmp_path, monkeypatch, is_told):
    """Once it was saved as finished, with weights that nobody had averaged, and nothing resumed it."""
    run, joined = make_run(steps=4, checkpoint_every=100, eval_every=100), []
    real = DiLoCo._reduce, Outer._join

    def fails(self):
        if self.steps >= 4:
            if is_told:
                os.kill(os.getpid(), signal.SIGTERM)
            raise PeerLost("it failed")
        return real[0](self)

    def join(self, *given):
        joined.append(given)
        return real[1](self, *given)

    with a_master() as master:
        learning = with_peers(run, master=master.address, every=2)
        with monkeypatch.context() as patched:
            patched.setattr(DiLoCo, "_reduce", fails)
            if is_told:
                result = Trainer(learning, tmp_path / "a").fit()
                assert (result.status, result.signal, result.step) == ("interrupted", "SIGTERM", 3)
            else:
                with pytest.raises(PeerLost, match="it failed"):
                    Trainer(learning, tmp_path / "a").fit()
        assert saved_steps(tmp_path / "a") == [3]
        monkeypatch.setattr(Outer, "_join", join)
        result = Trainer(learning, tmp_path / "a", resume=True).fit()
    assert (result.status, result.step, len(joined)) == ("finished", 4, 1)
    assert train_steps(tmp_path / "a") == [1, 2, 3, 4]


def test_a_newcomer_s_hooks_are_told_the_step_that_it_goes_on_from(make_run, tmp_path):
    """Its first step was once trained with what the hooks had set for step 0."""
    run = make_run(steps=8, checkpoint_every=100, eval_every=100)
    called = []
    with a_master(dead_s=BOUND_S) as master:
        run = with_peers(run, master=master.address, every=2)
        with a_group_at(master, run, 4, goes_to=8):
            trainer = Trainer(run, tmp_path / "a")
            hook = trainer._hooks.run_after
            trainer._hooks.run_after = lambda step: called.append(step) or hook(step)
            trainer.fit()
    assert called == [0, 4, 5, 6, 7, 8]


def test_what_does_not_fit_is_told_before_training(make_run, tmp_path):
    with pytest.raises(ConfigError, match=r"every is 4, which does not divide train\.steps=6"):
        Trainer(with_peers(make_run(steps=6), master="127.0.0.1:1", every=4), tmp_path / "a")
    with pytest.raises(ConfigError, match="every"):
        DiLoCoConfig(every=0)
