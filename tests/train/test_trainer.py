import logging
import math
import os
import signal
import threading
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from anabranch.errors import AnabranchError, BackendError, ConfigError, DataError
from anabranch.lm import Decoder, load_model
from anabranch.train import Trainer, checkpoints, evaluate, read_metrics, read_run_config
from anabranch.train.config import Parallel


def train(config, out, **options):
    trainer = Trainer(config, out, **options)
    return trainer, trainer.fit()


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_equal(one, two):
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def assert_close(one, two, tolerance):
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_three_steps_are_those_of_a_loop_written_out(tmp_path, make_run, dense_model):
    config = make_run(dense_model, steps=3, clip=0.5, weight_decay=0.1)
    trainer, _ = train(config, tmp_path)
    model = Decoder(dense_model, seed=0)
    stream = config.data.build().train(seed=0)
    decayed = [p for name, p in model.named_parameters() if p.dim() > 1 and "embedding" not in name]
    rest = [p for p in model.parameters() if all(p is not other for other in decayed)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    for step in range(3):
        batch = stream.next_batch(4)
        model(batch.token_BL, batch.target_BL).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            # no warmup: 2 % of 3 steps rounds to none
            group["lr"] = 1e-2 * (0.1 + 0.9 * (1 + math.cos(math.pi * step / 3)) / 2)
        optimizer.step()
        optimizer.zero_grad()
    assert_close(weights(trainer), model.state_dict(), 1e-6)


def test_result_metrics_and_saved_model_agree(tmp_path, make_run):
    config, events = make_run(), []
    trainer, result = train(config, tmp_path / "run", on_event=events.append)
    assert (result.status, result.signal, result.step, result.tokens) == ("finished", None, 6, 6 * 4 * 16)
    assert result.seconds > 0
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)
    assert result.peak_memory_bytes > 1e7
    records = read_metrics(tmp_path / "run")
    assert [(r["step"], r["kind"]) for r in records if r["kind"] == "validation"] == [
        (3, "validation"),
        (6, "validation"),
    ]
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    last = records[-1]
    assert (last["bits_per_byte"], last["nats_per_token"]) == (result.bits_per_byte, result.nats_per_token)
    assert result.routing["max_violation"] == last["max_violation"]
    for record in records:
        if record["kind"] == "train":
            assert record["loss"] == pytest.approx(
                record["cross_entropy"] + sum(record["auxiliary"].values()), rel=1e-5
            )
            assert set(record["auxiliary"]) == {"load_balancing", "z_loss"}
    # steps begin at 0, 1/6 ... 5/6 of training; from 0.2 to 0.8 of it the open slots grow from 4 to 8
    opened = [4 + math.floor(4 * min(max((step / 6 - 0.2) / 0.6, 0), 1)) for step in range(6)]
    assert [r["candidates_open"] for r in records if r["kind"] == "train"] == [[n] * 4 for n in opened]
    assert records[0]["loss"] > records[-2]["loss"]
    kinds = [event.kind for event in events]
    assert kinds == [
        "start",
        *["step"] * 3,
        "evaluation",
        "checkpoint",
        *["step"] * 3,
        "evaluation",
        "checkpoint",
        "stop",
    ]
    assert read_run_config(tmp_path / "run") == config
    model, tokenizer = load_model(tmp_path / "run")
    assert_equal(model.state_dict(), weights(trainer))
    assert tokenizer.vocab_size == 257
    again = evaluate(model, config.data.build().validation(batch_size=4, num_windows=16))
    assert again.bits_per_byte == pytest.approx(result.bits_per_byte, rel=1e-6)


def test_only_the_newest_checkpoints_are_kept(tmp_path, make_run):
    train(make_run(checkpoint_every=1, keep_checkpoints=2), tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000005", "step-00000006"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000005", "step-00000006"]


def test_accumulation_is_one_big_batch(tmp_path, make_run, exact_model):
    config = make_run(exact_model)
    (whole, _), (parts, _) = (
        train(config.replace(train=config.train.replace(accumulation=n)), tmp_path / str(n)) for n in (1, 4)
    )
    # AdamW divides by the size of the gradient, so rounding of tiny gradients shows in weights: lr 1e-2 times 1e-3
    assert_close(weights(whole), weights(parts), 1e-5)
    one, many = read_metrics(tmp_path / "1"), read_metrics(tmp_path / "4")
    for ours, theirs in zip(one, many, strict=True):
        if ours["kind"] == "train":
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-6)
            assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
            assert ours["max_violation_by_layer"] == theirs["max_violation_by_layer"]


def test_recompute_changes_no_bit(tmp_path, make_run, token_mask_model):
    (plain, _), (recomputed, _) = (
        train(make_run(token_mask_model, recompute=on), tmp_path / str(on)) for on in (False, True)
    )
    assert recomputed.model.recompute
    assert_equal(weights(plain), weights(recomputed))


def test_bfloat16_learns_with_float32_weights(tmp_path, make_run):
    trainer, narrow = train(make_run(precision="bfloat16", steps=12), tmp_path / "bf16")
    _, wide = train(make_run(steps=12), tmp_path / "fp32")
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert narrow.nats_per_token == pytest.approx(wide.nats_per_token, rel=0.02)
    assert narrow.nats_per_token != wide.nats_per_token


@pytest.mark.slow  # compiles
@pytest.mark.filterwarnings("default::DeprecationWarning")  # torch's own
def test_compiled_training_is_close(tmp_path, make_run):
    _, plain = train(make_run(eval_every=None), tmp_path / "plain")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    _, compiled = train(make_run(eval_every=None, compile=True), tmp_path / "compiled")
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert compiled.nats_per_token == pytest.approx(plain.nats_per_token, abs=1e-4)
    for ours, theirs in zip(read_metrics(tmp_path / "plain"), read_metrics(tmp_path / "compiled"), strict=True):
        assert ours["max_violation"] == pytest.approx(theirs["max_violation"], abs=0.1)


def test_clipping_bounds_the_update(tmp_path, make_run, dense_model):
    # with beta1 = beta2 = 0, eps = 1 and a clipped gradient g of norm c, AdamW moves by lr g / (|g| + 1)
    settings = {"steps": 1, "betas": (0.0, 0.0), "eps": 1.0, "weight_decay": 0.0, "clip": 1e-3, "learning_rate": 1.0}
    trainer, _ = train(make_run(dense_model, **settings), tmp_path)
    before = Decoder(dense_model, seed=0).state_dict()
    moved = math.sqrt(sum(float((tensor - before[name]).square().sum()) for name, tensor in weights(trainer).items()))
    assert moved == pytest.approx(1e-3, rel=0.01)
    assert read_metrics(tmp_path)[0]["gradient_norm"] > 1e-2  # as it was before


def poison(trainer, steps):
    """Make the gradient of some steps infinite, by a hook on a parameter."""

    def spoil(gradient):
        return gradient * math.inf if trainer._progress.step + 1 in steps else gradient

    next(trainer.model.parameters()).register_hook(spoil)


def test_a_step_with_a_broken_gradient_is_skipped(tmp_path, make_run):
    seen = {}
    config = make_run(steps=4, betas=(0.0, 0.0))

    def keep(event):
        if event.kind == "step":
            seen[event.step] = weights(trainer)

    trainer = Trainer(config, tmp_path, on_event=keep)
    poison(trainer, {2})
    result = trainer.fit()
    assert result.status == "finished"
    assert result.skipped_steps == 1
    learned = [name for name in seen[1] if "candidates" not in name]  # weights, biases of selection
    assert all(torch.equal(seen[1][name], seen[2][name]) for name in learned)
    assert not torch.equal(seen[2]["head.weight"], seen[3]["head.weight"])
    assert [record["skipped_steps"] for record in read_metrics(tmp_path) if record["kind"] == "train"] == [0, 1, 1, 1]
    assert all(torch.isfinite(tensor).all() for tensor in weights(trainer).values())


def test_too_many_broken_gradients_stop_training(tmp_path, make_run):
    trainer = Trainer(make_run(max_skipped=2), tmp_path)
    poison(trainer, {1, 2, 3, 4, 5, 6})
    with pytest.raises(
        AnabranchError, match=r"at step 2: the gradient was not finite 2 times in a row .* lower train\.learning_rate"
    ):
        trainer.fit()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_stops(tmp_path, make_run, number):
    def interrupt(event):
        if event.kind == "step" and event.step == 2:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    _, result = train(make_run(), tmp_path, on_event=interrupt)
    assert (result.status, result.signal, result.step) == ("interrupted", number.name, 2)
    assert result.checkpoint == checkpoints(tmp_path)[-1]
    assert result.checkpoint.name == "step-00000002"
    assert signal.getsignal(number) == handler
    _, result = train(make_run(), tmp_path, resume=True)
    assert (result.status, result.step) == ("finished", 6)


def test_a_second_signal_does_not_wait(tmp_path, make_run):
    def interrupt(event):
        if event.kind == "step":
            signal.raise_signal(signal.SIGINT)  # in this thread, so that two do not become one
            signal.raise_signal(signal.SIGINT)  # in this thread, so that two do not become one

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            train(make_run(), tmp_path, on_event=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_in_another_thread(tmp_path, make_run):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(make_run(steps=1), tmp_path)[1]))
    thread.start()
    thread.join()
    assert results[0].status == "finished"


def test_the_random_state_of_the_caller_stays(tmp_path, make_run, token_mask_model):
    trainer = Trainer(make_run(token_mask_model, steps=1), tmp_path)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    trainer.fit()
    assert torch.equal(torch.rand(3), expected)


def test_a_folder_with_a_run_is_not_overwritten(tmp_path, make_run):
    train(make_run(steps=1), tmp_path / "run")
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(DataError, match=r"run already holds a run \(config.json\); resume it with --resume, or choose"):
        Trainer(make_run(steps=1), tmp_path / "run")
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file is a file, and the run needs a folder"):
        Trainer(make_run(), tmp_path / "file")
    with pytest.raises(DataError, match=r"no training run in .*typo to resume; leave out --resume"):
        Trainer(make_run(), tmp_path / "typo", resume=True)


def test_a_config_that_does_not_fit_is_refused(tmp_path, make_run, dense_model, monkeypatch):
    with pytest.raises(ConfigError, match=r"model.vocab_size is 100, but the tokenizer has 257 tokens; set"):
        Trainer(make_run(dense_model.replace(vocab_size=100)), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"another config than config.model"):
        Trainer(make_run(), tmp_path / "a", model=Decoder(dense_model))
    with pytest.raises(ConfigError, match=r"train.device is 'tpu'; use auto, cpu, cuda or cuda:N"):
        Trainer(make_run(device="tpu"), tmp_path / "a")
    with pytest.raises(ConfigError, match="'ddp'; start it with torchrun"):
        Trainer(make_run(parallel="ddp"), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"parallel\.experts is 2; start it with torchrun"):
        Trainer(make_run().replace(parallel=Parallel(experts=2)), tmp_path / "a")
    with pytest.raises(
        ConfigError, match=r"train.compile is True, and rows that travel between processes \(parallel.experts=2\)"
    ):
        Trainer(make_run(compile=True).replace(parallel=Parallel(experts=2)), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"parallel\.context is 2; start it with torchrun"):
        Trainer(make_run().replace(parallel=Parallel(context=2)), tmp_path / "a")
    for beside, shared in (({"compile": True}, {}), ({}, {"experts": 2})):
        with pytest.raises(
            ConfigError, match=r"parallel\.context is 2, and .* is set; .* go with replicas or shards of weights alone"
        ):
            Trainer(make_run(**beside).replace(parallel=Parallel(context=2, **shared)), tmp_path / "a")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match=r"train.device is 'cuda', and there is no CUDA device here; use cpu"):
            Trainer(make_run(device="cuda"), tmp_path / "a")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"torchrun started 2 processes, and train.parallel is 'none'; set it to"):
        Trainer(make_run(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_given_weights_are_where_training_starts(tmp_path, make_run, dense_model):
    model = Decoder(dense_model, seed=5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer, result = train(make_run(dense_model, steps=0), tmp_path, model=model)
    assert_equal(weights(trainer), before)
    assert result.step == 0
    assert result.evaluation is not None
    assert result.checkpoint.name == "step-00000000"


def test_without_a_validation_split_nothing_is_evaluated(tmp_path, make_run, dense_model):
    config = make_run(dense_model, steps=3)
    _, result = train(config.replace(data=config.data.replace(validation_fraction=0.0)), tmp_path)
    assert result.evaluation is None
    assert math.isnan(result.bits_per_byte)
    assert {record["kind"] for record in read_metrics(tmp_path)} == {"train"}


@dataclass
class Call:
    step: int
    fraction: float


def test_step_hooks_see_every_step_and_the_start(tmp_path, make_run):
    trainer = Trainer(make_run(steps=4), tmp_path)
    calls = []
    trainer._hooks.after.append(lambda step, fraction: calls.append(Call(step, fraction)))
    trainer.fit()
    assert calls == [Call(0, 0.0), Call(1, 0.25), Call(2, 0.5), Call(3, 0.75), Call(4, 1.0)]


def test_no_warning_is_logged(tmp_path, make_run, caplog):
    with caplog.at_level(logging.WARNING):
        train(make_run(steps=1), tmp_path)
    assert caplog.records == []
