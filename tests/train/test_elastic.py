"""Processes that share one run and may be lost and come: ``parallel.elastic`` of the trainer."""

import logging
import math
import os
import shutil
import signal
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch

from anabranch.cluster.elastic import Coordinator
from anabranch.errors import ConfigError, DataError, PeerError
from anabranch.lm import Decoder, load_model
from anabranch.nn import MoE, SelfAttention, SwiGLU
from anabranch.routing import BiasBalancer, Router, SwitchLoss, ZLoss
from anabranch.testing import Ranks
from anabranch.train import Constant, Trainer, checkpoints, read_metrics, read_run_config
from anabranch.train import elastic as elastic_module
from anabranch.train.config import DiLoCoConfig, ElasticConfig, Parallel
from anabranch.train.elastic_layers import block_loss, elastic_layers
from anabranch.train.optimizer import optimizer_tensors
from anabranch.train.run import run_lock
from waiting import until

# Sums in another order.
CLOSE = {"rel": 2e-5, "abs": 2e-6}


def dense():
    return Decoder.Config(
        dim=16, num_layers=3, attention=SelfAttention.Config(num_heads=2), feed_forward=SwiGLU.Config(hidden_dim=24)
    )


def mixture(*balance):
    layer = MoE.Config(
        num_experts=4, hidden_dim=8, router=Router.Config(balance=balance or (SwitchLoss.Config(), ZLoss.Config()))
    )
    return Decoder.Config(dim=16, num_layers=3, attention=SelfAttention.Config(num_heads=2), feed_forward=layer)


def shared(run, coordinator, **settings):
    address = coordinator if isinstance(coordinator, str) else coordinator.address
    return run.replace(parallel=Parallel(elastic=ElasticConfig(coordinator=address, **settings)))


def losses(folder):
    return [line["loss"] for line in read_metrics(folder) if line["kind"] == "train"]


def weights(folder):
    return {name: value.detach().clone() for name, value in load_model(folder)[0].named_parameters()}


def check_same(folder, other):
    """To rounding: what was learned, told and measured."""
    assert losses(folder) == pytest.approx(losses(other), **CLOSE)
    first, second = weights(folder), weights(other)
    assert all((value - second[name]).abs().max() < 1e-4 for name, value in first.items())
    mine, theirs = ([line for line in read_metrics(f) if line["kind"] == "validation"] for f in (folder, other))
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    assert mine[-1]["nats_per_token"] == pytest.approx(theirs[-1]["nats_per_token"], rel=1e-4)


# The layers by themselves


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("make", [dense, mixture], ids=["dense", "mixture"])
def test_layers_that_hand_on_rows_have_the_losses_and_gradients_of_the_model(make, block):
    model = make().build(seed=0).train()
    token_BL = torch.randint(model.config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(1))
    target_BL = token_BL.roll(-1, 1)
    # Sequences with unlike many targets.
    target_BL[0, :7] = -100
    mean_B = torch.full((4,), float((target_BL != -100).sum()) / 4)
    expected, means = 0.0, {}
    targets = (target_BL != -100).sum()
    for first in range(0, 4, block):
        rows = slice(first, first + block)
        output = model(token_BL[rows], target_BL[rows])
        share = (target_BL[rows] != -100).sum() / targets
        terms = dict(output.terms)
        part = terms.pop("cross_entropy") * share + sum(terms.values()) * (block / 4)
        part.backward()
        expected += float(part.detach())
        for name, value in {**output.auxiliary, **output.metrics}.items():
            means[name] = means.get(name, 0.0) + float(value) * block / 4
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    layers, found, told = elastic_layers(model, precision="float32"), 0.0, {}
    for first in range(0, 4, block):
        rows = slice(first, first + block)
        value = token_BL[rows]
        for layer in layers:
            value = layer(value)
            assert all(len(part) == block for part in value)
        loss, terms = block_loss(value, (target_BL[rows], mean_B[rows]))
        (loss * block / 4).backward()
        found += float(loss.detach()) * block / 4
        for name, one in terms.items():
            told[name.removeprefix("metric ")] = told.get(name.removeprefix("metric "), 0.0) + one * block / 4
    assert found == pytest.approx(expected, rel=1e-5)
    assert told.keys() == {"cross_entropy", *means}
    assert all(told[name] == pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in means.items())
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6), name


# In one process, with the coordinator beside it


@pytest.mark.parametrize("clip", [1.0, 0.05])
def test_alone_it_is_the_plain_run(make_run, tmp_path, clip):
    run = make_run(dense(), clip=clip, steps=6)
    Trainer(run, tmp_path / "plain").fit()
    with Coordinator(replicas=1, stages=1) as host:
        result = Trainer(shared(run, host), tmp_path / "alone").fit()
        assert host.wait_for(lambda host: host.has_ended, 60)
    assert (result.status, result.step) == ("finished", 6)
    assert result.checkpoint == checkpoints(tmp_path / "alone")[-1]
    check_same(tmp_path / "alone", tmp_path / "plain")
    norms = [
        [line["gradient_norm"] for line in read_metrics(tmp_path / f) if line["kind"] == "train"]
        for f in ("alone", "plain")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_step_whose_gradient_is_not_finite_changes_nothing(make_run, tmp_path, monkeypatch):
    def spoiled(output, target):
        calls.append(1)
        loss, terms = block_loss(output, target)
        return (loss * math.inf if len(calls) == 9 else loss), terms

    run, calls = make_run(dense(), steps=4, schedule=Constant.Config()), []
    monkeypatch.setattr(elastic_module, "block_loss", spoiled)
    with Coordinator(replicas=1, stages=1) as host:
        result = Trainer(shared(run, host), tmp_path / "a").fit()
    # The third step has the samples 8 to 11.
    assert (result.status, result.skipped_steps) == ("finished", 1)
    norms = [line["gradient_norm"] for line in read_metrics(tmp_path / "a") if line["kind"] == "train"]
    assert [norm is None for norm in norms] == [False, False, True, False]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "a").values())


def test_it_goes_on_from_a_plain_run_and_a_plain_run_from_it(make_run, tmp_path):
    run = make_run(dense(), steps=9, schedule=Constant.Config())
    Trainer(run, tmp_path / "plain").fit()

    def go_on(steps, folder, **parallel):
        part = run.replace(train=run.train.replace(steps=steps), **parallel)
        return Trainer(part, tmp_path / folder, resume=(tmp_path / folder).exists()).fit()

    go_on(3, "mixed")
    with Coordinator(replicas=1, stages=1) as host:
        elastic = shared(run, host).parallel
        assert go_on(6, "mixed", parallel=elastic).step == 6
    go_on(9, "mixed")
    check_same(tmp_path / "mixed", tmp_path / "plain")


def test_parameters_that_have_not_made_the_same_steps_go_into_slices_and_come_back(make_run):
    """Such as experts that nobody was sent to: a run of them was refused, and one that had no part yet had moments of 0."""
    model = dense().replace(vocab_size=11).build(seed=0)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(3):
        for number, parameter in enumerate(model.parameters()):
            # In one, two or all of them; some in none.
            parameter.grad = torch.randn_like(parameter) if number % 5 and step <= number % 3 else None
        optimizer.step()
    before = optimizer_tensors(model, optimizer)
    steps = {value.item() for name, value in before.items() if name.endswith("/step")}
    assert steps == {1, 2, 3}
    assert len(before) < 3 * len(list(model.parameters()))
    made = elastic_module.Elastic(make_run(dense()), model, optimizer, None, SimpleNamespace(state_dict=dict))
    made.holds_folder, made._trainer = True, SimpleNamespace(gathered=(3, made._loaded()))
    after = made.moments(3)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_told_to_stop_it_waits_for_nobody(make_run, tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    def stop():
        # Once it is caught, or it would end this process.
        until(lambda: signal.getsignal(signal.SIGTERM) is not before)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    with Coordinator(replicas=2, stages=1) as host:
        threading.Thread(target=stop).start()
        result = Trainer(shared(make_run(dense()), host), tmp_path / "a").fit()
    assert (result.status, result.signal, result.step, result.checkpoint) == ("interrupted", "SIGTERM", 0, None)
    assert not (tmp_path / "a").exists()


def test_where_nobody_coordinates_it_is_said(make_run, tmp_path):
    with pytest.raises(PeerError, match=r"nothing answers at 127\.0\.0\.1:1"):
        Trainer(shared(make_run(dense()), "127.0.0.1:1"), tmp_path / "a").fit()


def test_what_does_not_go_together_is_told_before_training(make_run, tmp_path):
    run = make_run(dense())
    beside = shared(run, "127.0.0.1:1").parallel
    with pytest.raises(ConfigError, match=r"parallel\.diloco\.master is set"):
        Trainer(run.replace(parallel=beside.replace(diloco=DiLoCoConfig(master="127.0.0.1:2"))), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"parallel\.elastic\.host is '127\.0\.0\.1', where no other machine"):
        Trainer(shared(run, "10.0.0.1:1"), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"train\.accumulation \(parallel\.elastic\.block"):
        Trainer(shared(run.replace(train=run.train.replace(accumulation=2)), "127.0.0.1:1"), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"BiasBalancer\) learns from the loads of each step"):
        Trainer(shared(make_run(mixture(BiasBalancer.Config())), "127.0.0.1:1"), tmp_path / "a")
    tied = Trainer(shared(make_run(dense().replace(tie_embeddings=True)), "127.0.0.1:1"), tmp_path / "a")
    with pytest.raises(ConfigError, match="share the parameter"):
        tied.fit()


# Mends: a newcomer that is ahead, another length of sequences, a writer that stands still


def test_a_newcomer_that_is_ahead_reads_the_batches_of_the_others(make_run, tmp_path):
    """Its own folder is at step 6, the training at step 2: the next batch is the third of the text, not the seventh."""
    run = make_run(dense(), steps=9, schedule=Constant.Config())
    Trainer(run.replace(train=run.train.replace(steps=6)), tmp_path / "ahead").fit()
    late = Trainer(shared(run, "127.0.0.1:1"), tmp_path / "ahead", resume=True)
    assert late._progress.step == 6
    late._elastic._joined = lambda step: SimpleNamespace(steps=2, close=lambda *told, **more: None)
    assert late._elastic.before(6) == 2
    fresh = Trainer(run, tmp_path / "fresh").stream
    batches = [fresh.next_batch(run.train.batch_size) for _ in range(7)]
    found = late.stream.next_batch(run.train.batch_size)
    assert [same_batch(found, batch) for batch in batches].index(True) == 2


def test_a_newcomer_that_is_behind_passes_over_the_batches_that_it_missed(make_run, tmp_path):
    run = make_run(dense(), steps=9, schedule=Constant.Config())
    late = Trainer(shared(run, "127.0.0.1:1"), tmp_path / "behind")
    late._elastic._joined = lambda step: SimpleNamespace(steps=3, close=lambda *told, **more: None)
    assert late._elastic.before(0) == 3
    fresh = Trainer(run, tmp_path / "fresh").stream
    batches = [fresh.next_batch(run.train.batch_size) for _ in range(7)]
    found = late.stream.next_batch(run.train.batch_size)
    assert [same_batch(found, batch) for batch in batches].index(True) == 3


def same_batch(one, other):
    return torch.equal(one.token_BL, other.token_BL)


def test_a_process_with_another_length_of_sequences_is_refused(make_run, tmp_path):
    """Before it has any part in a step; the other waits on for one that fits."""
    run = make_run(dense())
    short = run.replace(data=run.data.replace(sequence_length=8))
    with Coordinator(replicas=2, stages=1) as host:
        ends = []

        def wait():
            try:
                Trainer(shared(run, host), tmp_path / "a").fit()
            except PeerError as error:
                ends.append(str(error))

        first = threading.Thread(target=wait)
        first.start()
        until(lambda: host.ranks == (0,))
        with pytest.raises(PeerError, match=r"its data\.sequence_length is 8, and those here have 16"):
            Trainer(shared(short, host), tmp_path / "b").fit()
        assert host.ranks == (0,)
        host.close()
        first.join(60)
    assert ends == ["the coordinator was closed"]


def test_what_all_have_learned_waits_for_a_writer_that_holds_the_folder_and_stands_still(make_run, tmp_path, caplog):
    """The folder is another's until it ends: nothing is written meanwhile, nothing raised, and it is said once."""
    run = make_run(dense(), steps=4)
    out, looks = tmp_path / "a", []
    trainer = Trainer(shared(run, "127.0.0.1:1"), out)
    trainer._elastic._trainer = SimpleNamespace(
        is_first=True,
        has_weights=True,
        gathered=(4, {}),
        wrote=lambda *told, **more: None,
        close=lambda *told, **more: None,
        steps=4,
    )
    # As of all that is learned.
    trainer._progress.step = 4
    with ExitStack() as held:
        held.enter_context(run_lock(out))

        def look():
            looks.append(sorted(path.name for path in out.iterdir()))
            if len(looks) == 3:
                held.close()
            return False

        trainer._elastic.is_stopped = look
        with caplog.at_level(logging.WARNING):
            where = trainer._saved_for_all()
    assert where == checkpoints(out)[-1]
    assert where.name.endswith("4")
    # Three looks while another had it: no run was in the folder yet.
    assert all("config.json" not in names for names in looks[:3])
    said = [record.getMessage() for record in caplog.records]
    assert sum("all is learned, and written as soon as that process has ended" in one for one in said) == 1
    assert sum("nothing is written for now" in one for one in said) == 1
    trainer.close()


def test_who_is_told_to_stop_does_not_wait_for_a_writer_that_stands_still(make_run, tmp_path):
    out = tmp_path / "a"
    trainer = Trainer(shared(make_run(dense(), steps=4), "127.0.0.1:1"), out)
    trainer._elastic._trainer = SimpleNamespace(is_first=True, close=lambda *told, **more: None)
    trainer._elastic.is_stopped = lambda: True
    with run_lock(out), pytest.raises(DataError, match="another process is training in"):
        trainer._saved_for_all()
    trainer.close()


# In processes of their own


def trained(rank, world, place, name, die=None, waits_at=None, resumes=False, way=signal.SIGKILL):
    """One process.

    ``die``: {rank: finished steps}, after which it is gone as if its machine was; or stands still, by another ``way``. ``waits_at``: after
    so many steps it waits until the test has made the file ``come``.
    """
    os.environ["ANABRANCH_NO_KERNELS"] = "1"
    # As torchrun would have told it, so that ranks are numbered as processes are, and a test can end the one that writes.
    assert os.environ["RANK"] == str(rank)
    run = read_run_config(f"{place}/config")
    trainer = Trainer(run, f"{place}/{name}", resume=resumes and os.path.exists(f"{place}/{name}/config.json"))
    after = trainer._elastic.after

    def between(**how):
        after(**how)
        until(lambda: trainer._progress.step != waits_at or os.path.exists(f"{place}/come"))
        if trainer._progress.step == (die or {}).get(rank):
            os.kill(os.getpid(), way)

    trainer._elastic.after = between
    result = trainer.fit()
    return {
        "status": result.status,
        "step": result.step,
        "checkpoint": str(result.checkpoint),
        "rank": trainer._elastic._trainer.rank,
    }


def together(
    run, tmp_path, *, replicas=2, stages=2, die=None, while_running=None, waits_at=None, name="shared", **settings
):
    with Coordinator(replicas=replicas, stages=stages) as host:
        shared(run, host, **settings).save(tmp_path / "config")
        arguments = (str(tmp_path), name, die, waits_at)
        with Ranks(replicas * stages, trained, *arguments, backend=None, timeout_s=120) as ranks:
            for rank in die or {}:
                ranks.expect_end(rank)
            if while_running is not None:
                while_running(ranks, host)
            found = ranks.wait()
        assert host.wait_for(lambda host: host.has_ended, 60)
        return found, host


def test_a_shared_run_learns_what_one_process_does_through_kills_and_a_newcomer(make_run, tmp_path):
    """Rank 0 dies, which writes; so another takes over the folder. A newcomer takes its place."""
    run = make_run(dense(), steps=12)
    Trainer(run, tmp_path / "plain").fit()

    def join(ranks, host):
        assert host.wait_for(lambda host: any(what == "lost" for _, what, _ in host.history))
        ranks.join(trained, str(tmp_path), "shared", None, None, True)
        assert host.wait_for(lambda host: 4 in host.ranks)
        (tmp_path / "come").touch()

    found, host = together(run, tmp_path, die={0: 4}, while_running=join, waits_at=8)
    assert {one["status"] for one in found} == {"finished"}
    assert {one["checkpoint"] for one in found} == {str(checkpoints(tmp_path / "shared")[-1])}
    check_same(tmp_path / "shared", tmp_path / "plain")
    assert [line["step"] for line in read_metrics(tmp_path / "shared") if line["kind"] == "train"] == list(range(1, 13))
    assert [details["rank"] for _, what, details in host.history if what == "lost"] == [0]
    assert 4 in host.layout.grid.ranks


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"block": 2, "micro_batches": 1}], ids=["block 1", "block 2"])
def test_a_mixture_with_losses_of_balance_is_shared_too(make_run, tmp_path, settings):
    run = make_run(mixture(), steps=6)
    parts = 4 // settings.get("block", 1)
    Trainer(run.replace(train=run.train.replace(accumulation=parts)), tmp_path / "plain").fit()
    found, _ = together(run, tmp_path, die={3: 2}, **settings)
    assert {one["status"] for one in found} == {"finished"}
    check_same(tmp_path / "shared", tmp_path / "plain")


@pytest.mark.slow
def test_layouts_and_losses_change_no_bit(make_run, tmp_path):
    run = make_run(dense(), steps=6)
    # Both without kernels of our own, which round otherwise.
    together(run, tmp_path, replicas=1, stages=1, name="alone")
    together(run, tmp_path, die={1: 3}, name="shared")
    assert losses(tmp_path / "shared") == losses(tmp_path / "alone")
    first, second = weights(tmp_path / "shared"), weights(tmp_path / "alone")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
def test_who_writes_the_end_and_dies_is_replaced(make_run, tmp_path, monkeypatch):
    run = make_run(dense(), steps=4, eval_every=None, checkpoint_every=None)
    Trainer(run, tmp_path / "plain").fit()
    found, _ = together(run, tmp_path, die={0: 4})
    assert len(found) == 3
    assert {one["checkpoint"] for one in found} == {str(checkpoints(tmp_path / "shared")[-1])}
    check_same(tmp_path / "shared", tmp_path / "plain")


@pytest.mark.slow
def test_a_newcomer_whose_folder_is_ahead_changes_no_loss(make_run, tmp_path):
    """It comes from a machine whose disk has a later checkpoint than the training, which was begun again from an older one."""
    run = make_run(dense(), steps=12, checkpoint_every=10)
    Trainer(run, tmp_path / "plain").fit()
    shutil.copytree(tmp_path / "plain", tmp_path / "ahead")
    shutil.rmtree(checkpoints(tmp_path / "ahead")[-1])
    assert len(checkpoints(tmp_path / "ahead")) == 1

    def join(ranks, host):
        assert host.wait_for(lambda host: any(what == "lost" for _, what, _ in host.history))
        ranks.join(trained, str(tmp_path), "ahead", None, None, True)
        assert host.wait_for(lambda host: 2 in host.ranks)
        (tmp_path / "come").touch()

    found, host = together(run, tmp_path, stages=1, die={1: 3}, while_running=join, waits_at=5)
    assert {one["status"] for one in found} == {"finished"}
    assert 2 in host.layout.grid.ranks
    check_same(tmp_path / "shared", tmp_path / "plain")


@pytest.mark.slow
def test_what_is_learned_is_written_when_a_writer_that_stands_still_has_ended(make_run, tmp_path):
    run = make_run(dense(), steps=8, checkpoint_every=2)
    Trainer(run, tmp_path / "plain").fit()
    with Coordinator(replicas=2, stages=1, patience_s=2.0) as host:
        shared(run, host).save(tmp_path / "config")
        arguments = (str(tmp_path), "shared", {0: 4}, None, False, signal.SIGSTOP)
        with Ranks(2, trained, *arguments, backend=None, timeout_s=120) as ranks:
            ranks.expect_end(0)
            assert host.wait_for(lambda host: host.version == 8, 100)
            # The other has all, and waits: the folder is the first one's, which stands still in it.
            until(lambda: "all is learned" in ranks.output(1))
            assert checkpoints(tmp_path / "shared")[-1].name.endswith("2")
            assert not host.has_ended
            os.kill(ranks.pid(0), signal.SIGKILL)
            (found,) = ranks.wait()
        assert host.wait_for(lambda host: host.has_ended, 60)
    assert found["status"] == "finished"
    check_same(tmp_path / "shared", tmp_path / "plain")


@pytest.mark.slow
def test_all_lost_it_goes_on_from_the_last_checkpoint(make_run, tmp_path):
    run = make_run(dense(), steps=6, checkpoint_every=2)
    Trainer(run, tmp_path / "plain").fit()
    with Coordinator(replicas=2, stages=1) as host:
        shared(run, host).save(tmp_path / "config")
        with Ranks(2, trained, str(tmp_path), "shared", {0: 4, 1: 4}, backend=None, timeout_s=120) as ranks:
            for rank in range(2):
                ranks.expect_end(rank)
            assert host.wait_for(lambda host: host.stopped is not None, 60)
        assert "the last checkpoint" in host.stopped
    # In another layout.
    with Coordinator(replicas=1, stages=1) as host:
        result = Trainer(shared(run, host), tmp_path / "shared", resume=True).fit()
    assert result.status == "finished"
    check_same(tmp_path / "shared", tmp_path / "plain")
