"""A run that is stopped, however, goes on as if nothing had happened."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata

import pytest
import torch
from safetensors.torch import load_file

from anabranch.data import Files, HuggingFaceTokenizer
from anabranch.errors import CheckpointError, ConfigError, DataError
from anabranch.lm import load_model
from anabranch.train import Trainer, checkpoints, read_metrics, read_run_config
from anabranch.train.checkpoint import read_checkpoint
from anabranch.train.run import LOCK
from tokenizers_of_every_make import like_qwen

TIMES = {"seconds", "tokens_per_second"}

RESUME = """
import sys, torch
torch.set_num_threads(1)
from anabranch.train import Trainer, read_run_config
result = Trainer(read_run_config(sys.argv[1]), sys.argv[1], resume=True).fit()
print(result.status, result.step)
"""


class Crash(BaseException):
    """Ends a process on the spot: no error that is met, after which there is time to save."""


def crash_at(step, kind="checkpoint"):
    def react(event):
        if (event.kind, event.step) == (kind, step):
            raise Crash

    return react


def metrics_of(out):
    return [{name: value for name, value in record.items() if name not in TIMES} for record in read_metrics(out)]


def state_of(path):
    """Everything in a checkpoint but how long it took."""
    tables = {file.name: json.loads(file.read_text()) for file in path.glob("*.json")}
    tables["trainer.json"]["progress"].pop("seconds")
    return tables, {file.name: load_file(file) for file in path.glob("*.safetensors")}


def assert_same_run(one, two):
    for record, other in zip(metrics_of(one), metrics_of(two), strict=True):
        assert [(name, value, other.get(name)) for name, value in record.items() if value != other.get(name)] == []
        assert record.keys() == other.keys()
    assert_same_state(one, two)


def assert_same_state(one, two):
    (tables, tensors), (other_tables, other_tensors) = (state_of(checkpoints(out)[-1]) for out in (one, two))
    assert tables == other_tables
    for file, values in tensors.items():
        assert values.keys() == other_tensors[file].keys()
        assert [name for name in values if not torch.equal(values[name], other_tensors[file][name])] == []


def test_a_new_process_goes_on_to_the_bit(tmp_path, make_run):
    config = make_run()
    Trainer(config, tmp_path / "straight").fit()
    with pytest.raises(Crash):
        Trainer(config, tmp_path / "resumed", on_event=crash_at(3)).fit()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RESUME, str(tmp_path / "resumed")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "finished 6\n"
    assert len(read_metrics(tmp_path / "resumed")) == 8  # 6 steps, 2 evaluations: none twice
    biases = load_file(checkpoints(tmp_path / "resumed")[-1] / "model.safetensors")
    assert any(name.endswith("expert_bias") and tensor.abs().sum() > 0 for name, tensor in biases.items())
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


def test_steps_after_the_checkpoint_are_done_again(tmp_path, make_run, token_mask_model):
    config = make_run(token_mask_model, precision="bfloat16", accumulation=2)
    Trainer(config, tmp_path / "straight").fit()
    with pytest.raises(Crash):
        Trainer(config, tmp_path / "resumed", on_event=crash_at(5, "step")).fit()
    assert metrics_of(tmp_path / "resumed")[-1]["step"] == 5
    Trainer(config, tmp_path / "resumed", resume=True).fit()
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


def fail_on(call, owner, name, error):
    """Make the ``call``-th call of ``owner.name`` (from 1) raise."""
    real, calls = getattr(owner, name), []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == call:
            raise error
        return real(*args, **options)

    setattr(owner, name, failing)


# Where it fails, in which call, and how many steps are then finished.
OUTSIDE = {
    "data": (lambda trainer: fail_on(10, trainer.stream, "next_batch", IndexError("a cache entry")), 4),
    "forward, in a second micro-batch": (lambda trainer: fail_on(10, trainer._stepper, "call", MemoryError()), 4),
    "gradient norm": (lambda trainer: fail_on(5, trainer._stepper, "gradient_norm", RuntimeError("out of memory")), 4),
    "metrics": (lambda trainer: fail_on(6, trainer._folder, "write", OSError(28, "No space left on device")), 5),
    "evaluation": (lambda trainer: fail_on(1, trainer, "_evaluate", RuntimeError("out of memory")), 3),
    "display": (lambda trainer: fail_on(6, trainer, "_on_event", BrokenPipeError(32, "Broken pipe")), 4),
}


@pytest.mark.parametrize("where", OUTSIDE)
def test_an_error_from_outside_loses_no_finished_step(tmp_path, make_run, where, caplog):
    config = make_run(checkpoint_every=None, accumulation=2)
    Trainer(config, tmp_path / "straight").fit()
    trainer = Trainer(config, tmp_path / "failed", on_event=lambda event: None)
    fail, finished = OUTSIDE[where]
    fail(trainer)
    with pytest.raises((IndexError, MemoryError, RuntimeError, OSError)):
        trainer.fit()
    assert [path.name for path in checkpoints(tmp_path / "failed")] == [f"step-{finished:08d}"]
    assert f"step {finished} is saved" in caplog.text
    assert Trainer(config, tmp_path / "failed", resume=True).fit().step == 6
    kept = [record for record in metrics_of(tmp_path / "failed") if record["step"] != finished]
    assert kept == [record for record in metrics_of(tmp_path / "straight") if record["step"] != finished]
    assert_same_state(tmp_path / "straight", tmp_path / "failed")


@pytest.mark.parametrize("name", ["step", "run_after", "_count_skipped"])
def test_a_state_in_the_midst_of_an_update_is_not_saved(tmp_path, make_run, name):
    trainer = Trainer(make_run(checkpoint_every=2), tmp_path)
    owner = {"step": trainer.optimizer, "run_after": trainer._hooks}.get(name, trainer)
    fail_on(4, owner, name, RuntimeError("in the midst"))
    with pytest.raises(RuntimeError, match="in the midst"):
        trainer.fit()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002"]


def test_an_error_while_saving_after_an_error_does_not_hide_it(tmp_path, make_run, caplog):
    trainer = Trainer(make_run(checkpoint_every=None), tmp_path)
    fail_on(3, trainer.stream, "next_batch", IndexError("the first"))
    fail_on(1, trainer, "_save", OSError("the second"))
    with pytest.raises(IndexError, match="the first"):
        trainer.fit()
    assert "step 2 could not be saved after an error: the second" in caplog.text


def test_two_trainers_of_one_folder(tmp_path, make_run):
    refused = []

    def try_too(event):
        if event.kind == "step" and event.step == 2:
            for resume in (False, True):
                with pytest.raises(DataError) as error:
                    Trainer(make_run(), tmp_path / "run", resume=resume)
                refused.append(str(error.value))

    assert Trainer(make_run(), tmp_path / "run", on_event=try_too).fit().status == "finished"
    expected = f"another process is training in {tmp_path / 'run'}; wait for it, stop it, or choose another folder"
    assert refused == [expected] * 2
    assert not (tmp_path / "run" / LOCK).exists()


def test_of_two_that_begin_at_once_one_trains(tmp_path, make_run):
    one, two = (Trainer(make_run(steps=2, seed=seed), tmp_path / "run") for seed in (0, 1))
    one.fit()
    saved = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(DataError, match="already holds a run"):
        two.fit()
    first, second = (Trainer(make_run(steps=4), tmp_path / "run", resume=True) for _ in range(2))
    first.fit()
    with pytest.raises(DataError, match=r"another process has trained in .* since this one began; resume it again"):
        second.fit()
    assert (tmp_path / "run" / "config.json").read_bytes() != saved  # of the one that went on
    assert checkpoints(tmp_path / "run")[-1].name == "step-00000004"


def test_stopped_before_the_first_checkpoint(tmp_path, make_run):
    config = make_run()
    Trainer(config, tmp_path / "straight").fit()
    with pytest.raises(Crash):
        Trainer(config, tmp_path / "resumed", on_event=crash_at(2, "step")).fit()
    Trainer(config, tmp_path / "resumed", resume=True).fit()
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")

    (old,) = tmp_path.glob("resumed/metrics.jsonl.old*")
    assert [json.loads(line)["step"] for line in old.read_text().splitlines()] == [1, 2]


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again_in_silence(tmp_path, make_run):
    Trainer(make_run(steps=4, checkpoint_every=2, eval_every=None), tmp_path).fit()
    shutil.rmtree(tmp_path / "checkpoints")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        DataError, match=r"step 4 .*has no checkpoint.*; put .*checkpoints back, or remove .*metrics.jsonl"
    ):
        Trainer(make_run(steps=4, checkpoint_every=2, eval_every=None), tmp_path, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "metrics.jsonl").unlink()
    assert Trainer(make_run(steps=4, checkpoint_every=2, eval_every=None), tmp_path, resume=True).fit().step == 4


def test_a_finished_run_stays_as_it_is(tmp_path, make_run):
    first = Trainer(make_run(), tmp_path).fit()
    before = metrics_of(tmp_path)
    again = Trainer(make_run(), tmp_path, resume=True).fit()
    assert (again.status, again.step, again.evaluation) == (first.status, first.step, first.evaluation)
    assert again.checkpoint == first.checkpoint
    assert metrics_of(tmp_path) == before


def test_a_finished_run_can_be_made_longer(tmp_path, make_run):
    Trainer(make_run(steps=3), tmp_path).fit()
    result = Trainer(make_run(steps=5, log_every=2, eval_every=None), tmp_path, resume=True).fit()
    assert (result.status, result.step) == ("finished", 5)
    assert read_run_config(tmp_path).train.steps == 5
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 3, 4, 5]


def test_another_config_is_refused_field_by_field(tmp_path, make_run, dense_model):
    Trainer(make_run(steps=1), tmp_path).fit()
    saved = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ConfigError) as error:
        Trainer(make_run(steps=9, learning_rate=0.5, clip=None), tmp_path, resume=True)
    assert str(error.value).startswith(f"cannot resume {tmp_path} with another config: ")
    assert "train.learning_rate was 0.01 and is now 0.5; train.clip was 1.0 and is now None;" in str(error.value)
    assert "train.steps" not in str(error.value)
    with pytest.raises(ConfigError, match=r"model\.num_layers was 4 and is now 2"):
        Trainer(make_run(dense_model), tmp_path, resume=True)
    assert (tmp_path / "config.json").read_bytes() == saved


def test_moved_data_is_known_by_its_content(tmp_path, make_run, text_file):
    config = make_run(steps=1)
    Trainer(config, tmp_path / "run").fit()
    moved = tmp_path / text_file.name
    moved.write_bytes(text_file.read_bytes())

    def with_paths(path):
        corpus = config.data.corpus.replace(paths=(str(path),))
        return config.replace(data=config.data.replace(corpus=corpus), train=config.train.replace(steps=2))

    assert Trainer(with_paths(moved), tmp_path / "run", resume=True).fit().step == 2
    moved.write_text("something else " * 200)
    with pytest.raises(DataError, match="cannot resume the data: fingerprint was"):
        Trainer(with_paths(moved), tmp_path / "run", resume=True)


def test_another_held_out_text_is_told(tmp_path, make_run, text_file):
    text = tmp_path / "text.txt"
    text.write_bytes(text_file.read_bytes())

    def run(steps):
        corpus = Files.Config(paths=(str(text),))
        config = make_run(steps=steps)
        return config.replace(data=config.data.replace(corpus=corpus))

    stored = Trainer(run(1), tmp_path / "run").fit().checkpoint / "trainer.json"
    text.write_bytes(text_file.read_bytes()[:-40] + b"#" * 40)  # the end of a text validates
    with pytest.raises(DataError, match=r"cannot resume the data: the held-out text .* not that of before"):
        Trainer(run(2), tmp_path / "run", resume=True)
    # Checkpoints of before it was stored are resumed as they were.
    state = json.loads(stored.read_text())
    del state["data"]
    stored.write_text(json.dumps(state))
    (stored.parent / "SHA256SUMS").unlink()
    assert Trainer(run(2), tmp_path / "run", resume=True).fit().step == 2


def test_the_same_tokens_of_other_bytes_are_other_held_out_text(tmp_path, make_run, dense_model):
    """A tokenizer that normalises gives NFD the tokens of NFC; bits per byte are others."""
    like_qwen().save(tmp_path / "tokenizer")
    text = tmp_path / "text.txt"

    def run(steps):
        config = make_run(dense_model.replace(vocab_size=300), steps=steps)
        tokenizer = HuggingFaceTokenizer.Config(path=str(tmp_path / "tokenizer"))
        return config.replace(data=config.data.replace(corpus=Files.Config(paths=(str(text),)), tokenizer=tokenizer))

    def write(form):
        text.write_text(unicodedata.normalize(form, "Zoë, naïve Å the cat\n" * 200))

    write("NFC")
    stored = Trainer(run(1), tmp_path / "run").fit().checkpoint / "trainer.json"
    state = json.loads(stored.read_text())
    write("NFD")
    with pytest.raises(DataError, match=r"the held-out text .* is not that of before"):
        Trainer(run(2), tmp_path / "run", resume=True)
    # Earlier checkpoints did not say how many: they are held to the tokens, and the next one says it.
    state["data"] = run(1).data.build().fingerprint(byte_lengths=False)
    stored.write_text(json.dumps(state))
    (stored.parent / "SHA256SUMS").unlink()
    after = Trainer(run(2), tmp_path / "run", resume=True).fit()
    assert after.step == 2
    assert json.loads((after.checkpoint / "trainer.json").read_text())["data"] == run(1).data.build().fingerprint()
    write("NFC")
    with pytest.raises(DataError, match="the held-out text"):
        Trainer(run(3), tmp_path / "run", resume=True)


def test_damaged_checkpoints_are_named(tmp_path, make_run):
    config = make_run(steps=1)
    path = Trainer(config, tmp_path).fit().checkpoint
    whole = (path / "optimizer.safetensors").read_bytes()
    (path / "optimizer.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        CheckpointError, match=r"cannot read .*optimizer\.safetensors.* to go on from the checkpoint before"
    ):
        Trainer(config, tmp_path, resume=True)
    (path / "trainer.json").write_text('{"schema": 99}')
    with pytest.raises(CheckpointError, match=r"schema in .* is 99; this version reads 1 to 1"):
        Trainer(config, tmp_path, resume=True)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Trainer(config, tmp_path, resume=True)


def test_leftovers_of_a_killed_process_are_removed(tmp_path, make_run):
    Trainer(make_run(steps=1), tmp_path).fit()
    for name in (".step-00000009.x1y2_3z4", ".step-00000001.old"):
        (tmp_path / "checkpoints" / name).mkdir()
    Trainer(make_run(steps=2), tmp_path, resume=True).fit()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")] == []


# Trains in forked children of one process that has torch loaded, so that many can be killed in a short time. A child tells of
# every checkpoint that it has finished; its parent kills it at a random moment after the first step.
KILLED = """
import os, random, signal, sys, time, torch
torch.set_num_threads(1)
from anabranch.train import Trainer, read_run_config
out, rounds = sys.argv[1], int(sys.argv[2])
draw = random.Random(0)
config = read_run_config(out)
for round in range(rounds + 1):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        tell = lambda event: os.write(writer, f"{event.kind} {event.step};".encode()) if event.kind in ("step", "checkpoint") else None
        Trainer(config, out, resume=True, on_event=tell).fit()
        os._exit(0)
    os.close(writer)
    told = os.read(reader, 65536).decode() if round < rounds else ""
    if round < rounds:
        time.sleep(draw.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
    while part := os.read(reader, 65536).decode():
        told += part
    status = os.waitpid(child, 0)[1]
    print(status, told, flush=True)
"""


@pytest.mark.parametrize(("steps", "rounds"), [(10, 3), pytest.param(60, 20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_loses_no_checkpoint(tmp_path, make_run, steps, rounds):
    config = make_run(steps=steps, checkpoint_every=1, eval_every=7)
    Trainer(config, tmp_path / "straight").fit()
    out = tmp_path / "killed"
    out.mkdir()
    config.save(out)
    command = [sys.executable, "-c", KILLED, str(out), str(rounds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    newest, statuses = 0, []
    for line in process.stdout:
        status, _, told = line.partition(" ")
        statuses.append(int(status))
        for event in filter(None, told.strip().split(";")):
            kind, step = event.split()
            assert int(step) > newest or statuses[-1] == 0 or kind == "step"
            if kind == "step":
                assert int(step) >= newest  # at most the steps since the last checkpoint are done again
            else:
                newest = int(step)
        found = checkpoints(out)
        if newest:
            state, _ = read_checkpoint(found[-1])
            assert state["step"] >= newest
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert statuses[0] == 9  # killed
    assert statuses[-1] == 0
    assert_same_run(tmp_path / "straight", out)
    assert load_model(out)[0].config == config.model
